"""The stage iteration_t/responses: what the policy answers to its own data's prompts."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ldalign.data.ragged import TokenLists
from ldalign.data.tokenizer import Tokenizer
from ldalign.generation.answers import make_answers
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.external import read_losers
from ldalign.generation.generate import text_of
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.mistral import Mistral
from ldalign.models.stored_tensors import read_config
from ldalign.models.weights import load_model
from ldalign.run.context import Context, named_keys
from ldalign.run.keys import SAMPLING_KEYS
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.data import DATA_STAGE
from ldalign.system import distributed
from ldalign.system.files import again, hash_file, iter_jsonl, reading, write_jsonl
from ldalign.system.metrics import Bar, Metrics


def _cost(ctx: Context, name: str) -> Cost:
    samples = 2 if ctx.config.method in ("self_reward", "rlaif") else 1
    return Cost(
        scored=int(ctx.used[1].prompts.lengths.sum()),
        generated=samples * int(ctx.used[1].real.lengths.sum()),
    )


RESPONSES_STAGE = Stage("responses", _cost)
RESPONSES = f"{RESPONSES_STAGE.folder('iteration_{}')}/responses.jsonl"  # in the run folder


class Responses(NamedTuple):
    """What was sampled, those of a row one after the other."""

    tokens: TokenLists
    finish_reasons: list[str]


def responses_stage(ctx: Context, t: int, policy: Path, samples: int = 1) -> Responses:
    """Samples responses from `policy`, those of a row one after the other, or takes the first
    iteration's as given.

    The records carry what was sampled, token by token. A run that was cut short is gone on with.
    """
    name, config = RESPONSES_STAGE.folder(t), ctx.config
    rows, pairs = ctx.used
    given = Path(config.responses) if config.responses and t == 0 else None
    sampling = sampling_of(config)
    keys = [
        f"iteration/{t}/{row.id}" + (f"/{n}" if samples > 1 else "")
        for row in rows
        for n in range(samples)
    ]

    def request(i: int, key: str) -> Request:
        pair = pairs[i // samples]
        draft = pair.real if config.sampling.draft_tokens else ()
        return Request(key, pair.prompt, i, draft=draft)

    requests = [request(i, key) for i, key in enumerate(keys)]

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
            prompts = ctx.run.path / DATA_STAGE.folder() / "train.jsonl"
            losers = read_losers(given, rows, pairs, ctx.train.rows, ctx.tokenizer, prompts)
            records = [
                record(request, loser) for request, loser in zip(requests, losers, strict=True)
            ]
            if distributed.rank() == 0:
                write_jsonl(path, records)
        else:
            model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
            engine = new_engine(config, requests, ctx.tokenizer)
            share = -(-len(requests) // distributed.world_size())
            with Bar(name, share, "rows", most=config.max_new_tokens) as progress:
                decoder = new_decoder(model, release=True, weights=config.sampling.weights)
                records = make_answers(path, requests, decoder, engine, record, progress)
        tokens = sum(r["n_tokens"] for r in records)
        cut = sum(r["finish_reason"] == "length" for r in records)
        return {
            "rows": len(requests),
            "tokens": tokens,
            "len/rejected": tokens / len(requests),
            "losers/given": float(given is not None),
            "losers/truncated_frac": cut / len(requests),
        }

    source = _given_parents(given) if given else _sampling_parents(ctx, t, policy, samples)
    parents = {"data": ctx.used_hash, **ctx.tokenizer.template_parents, **source}
    # A given file is read at once, and may be mended: there is nothing to go on from.
    ctx.run.stage(name, parents, make, resume=given is None)
    return read_responses(ctx, t, samples)


def _given_parents(given: Path) -> Parents:
    return {"responses": hash_file(given) if given.is_file() else "absent"}


def _sampling_parents(ctx: Context, t: int, policy: Path, samples: int) -> Parents:
    return {
        "policy": hash_model_folder(policy),
        "iteration": t,
        "dtype": str(ctx.dtype),
        **({"samples": samples} if samples > 1 else {}),
        **sampling_parents(ctx.config),
    }


def sampling_parents(config: RunConfig) -> Parents:
    """The keys that responses depend on; `sampling.weights` where it is not the default: responses
    made before there was a choice stay valid.
    """
    parents = dict(named_keys(config, "max_new_tokens", *SAMPLING_KEYS, "seed"))
    if config.sampling.weights == RunConfig().sampling.weights:
        del parents["sampling.weights"]
    return parents


def read_responses(ctx: Context, t: int, samples: int = 1) -> Responses:
    """The responses that iteration t sampled, those of a row one after the other.

    Raises InputError where these are not `samples` of every row, in the policy's token ids.
    """
    path = ctx.run.path / RESPONSES.format(t)
    reasons: list[str] = []
    expected, vocabulary = samples * len(ctx.used[1]), read_config(ctx.start)["vocab_size"]

    def tokens() -> Iterator[list[int]]:
        for record in iter_jsonl(path):
            reasons.append(str(record["finish_reason"]))
            ids = np.array(record["token_ids"], dtype=np.int32)
            if ids.ndim != 1 or ((ids < 0) | (ids >= vocabulary)).any():
                raise ValueError(f"response {len(reasons)} has other ids than the vocabulary's")
            yield ids.tolist()

    with reading(path, again(path.parent)):
        found = TokenLists.of(tokens())
        if len(found) != expected:
            raise ValueError(f"{len(found)} responses in place of {expected}")
    return Responses(found, reasons)


def response_texts(ctx: Context, responses: Responses) -> list[str]:
    """The texts of responses, each up to its stop string, as in the records."""
    sampling = sampling_of(ctx.config)
    return [text_of(ctx.tokenizer.decode(ids), sampling) for ids in responses.tokens]


def sampling_of(config: RunConfig) -> Sampling:
    """The sampling of training responses that the config asks for."""
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
    """A function that makes, over a decoder, the engine that samples for
    `requests` as the config says.
    """
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
        draft_tokens=s.draft_tokens,
        decode=tokenizer.decode,
    )
