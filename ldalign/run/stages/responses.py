"""iteration_t/responses: what the policy answers to its own data's prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ldalign.data.tokenizer import Tokenizer
from ldalign.generation.answers import make_answers
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.external import read_losers
from ldalign.generation.generate import text_of
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import hash_model_folder
from ldalign.run.settings import SAMPLING_KEYS, RunConfig
from ldalign.system import distributed
from ldalign.system.files import hash_file, read_jsonl, write_jsonl
from ldalign.system.metrics import Bar, Metrics

RESPONSES = "iteration_{}/responses/responses.jsonl"  # in the run folder


def responses_stage(ctx: Context, t: int, policy: Path, samples: int = 1) -> list[Response]:
    """Samples responses from `policy`, those of a row one after the other, or takes the first
    iteration's as given.

    The records carry what was sampled, token by token. A run that was cut short is gone on with.
    """
    name, config = f"iteration_{t}/responses", ctx.config
    rows, pairs = ctx.used
    given = Path(config.responses).expanduser() if config.responses and t == 0 else None
    sampling = sampling_of(config)
    keys = [
        f"iteration/{t}/{row.id}" + (f"/{n}" if samples > 1 else "")
        for row in rows
        for n in range(samples)
    ]
    requests = [Request(key, pairs[i // samples].prompt, i) for i, key in enumerate(keys)]

    def record(request: Request, r: Response) -> dict[str, Any]:
        text = text_of(ctx.tokenizer.decode(r.ids), sampling)
        return {
            "id": rows[request.index // samples].id,
            "response": text,
            "finish_reason": r.finish_reason,
            "n_tokens": len(r.ids),
            "token_ids": r.ids,
            "logp": r.logp,
        }

    def make(folder: Path) -> Metrics:
        path = folder / "responses.jsonl"
        if given is not None:
            prompts = ctx.run.path / "data/train.jsonl"
            losers = read_losers(given, rows, pairs, ctx.train.rows, ctx.tokenizer, prompts)
            records = [
                record(request, loser) for request, loser in zip(requests, losers, strict=True)
            ]
            if distributed.rank() == 0:
                write_jsonl(path, records)
        else:
            model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
            engine = new_engine(config, requests, ctx.tokenizer)
            with Bar(name, -(-len(requests) // distributed.world_size()), "rows") as progress:
                records = make_answers(
                    path, requests, new_decoder(model, release=True), engine, record, progress
                )
        tokens = sum(r["n_tokens"] for r in records)
        cut = sum(r["finish_reason"] == "length" for r in records)
        return {
            "rows": len(requests),
            "tokens": tokens,
            "len/rejected": tokens / len(requests),
            "losers/given": float(given is not None),
            "losers/truncated_frac": cut / len(requests),
        }

    parents: dict[str, str | int | float] = {
        "data": ctx.used_hash,
        **ctx.tokenizer.template_parents,
    }
    if given is not None:
        parents["responses"] = hash_file(given) if given.is_file() else "absent"
    else:
        parents |= {
            "policy": hash_model_folder(policy),
            "iteration": t,
            "dtype": str(ctx.dtype),
            **({"samples": samples} if samples > 1 else {}),
            **ctx.keys("max_new_tokens", *SAMPLING_KEYS, "seed"),
        }
    # a given file is read at once, and may be mended
    ctx.run.stage(name, parents, make, resume=given is None)
    return read_responses(ctx, t)


def read_responses(ctx: Context, t: int) -> list[Response]:
    """What iteration t sampled, a row's responses one after the other."""
    records = read_jsonl(ctx.run.path / RESPONSES.format(t))
    return [Response(r["token_ids"], r["finish_reason"], r["logp"]) for r in records]


def response_texts(ctx: Context, responses: Sequence[Response]) -> list[str]:
    """Their texts, each up to its stop string, as in the records."""
    sampling = sampling_of(ctx.config)
    return [text_of(ctx.tokenizer.decode(r.ids), sampling) for r in responses]


def sampling_of(config: RunConfig) -> Sampling:
    """How training responses are sampled."""
    s = config.sampling
    return Sampling(
        config.max_new_tokens,
        s.temperature,
        s.top_k,
        s.top_p,
        s.min_p,
        s.repetition_penalty,
        tuple(s.stop),
    )


def new_engine(
    config: RunConfig, requests: Sequence[Request], tokenizer: Tokenizer
) -> Callable[[Decoder], Engine]:
    """Of a decoder: the engine that samples as the config says."""
    s = config.sampling
    longest = max((len(request.prompt) for request in requests), default=1) + config.max_new_tokens
    cache_bytes = None if s.cache_gib is None else int(s.cache_gib * 2**30)
    rows = min(s.batch_rows, max(1, len(requests)))
    return lambda decoder: Engine(
        decoder,
        sampling_of(config),
        tokenizer.end_ids,
        config.seed,
        longest=longest,
        rows=rows,
        cache_bytes=cache_bytes,
        decode=tokenizer.decode,
    )
