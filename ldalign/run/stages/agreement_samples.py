"""The stage agreement_samples: two answers to every held-out prompt, for a judge to compare."""

from pathlib import Path
from typing import Any, cast

from ldalign.data.store import data_hash
from ldalign.generation.answers import make_answers
from ldalign.generation.decoders import new_decoder
from ldalign.generation.engine import Request
from ldalign.generation.generate import text_of
from ldalign.generation.sampling import Response
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.responses import new_engine, sampling_of, sampling_parents
from ldalign.system import distributed
from ldalign.system.files import again, read_jsonl, reading
from ldalign.system.metrics import Bar, Metrics

SAMPLES = "samples.jsonl"


def _cost(ctx: Context, name: str) -> Cost:
    pairs = ctx.heldout.pairs[: ctx.config.agreement.rows]
    return Cost(
        scored=int(pairs.prompts.lengths.sum()), generated=2 * int(pairs.real.lengths.sum())
    )


AGREEMENT_SAMPLES_STAGE = Stage("agreement_samples", _cost)


def agreement_samples_stage(ctx: Context, policy: Path) -> list[dict[str, Any]]:
    """Samples two answers to every held-out prompt into agreement_samples/samples.jsonl; returns
    its records, the two of a row one after the other.

    A run that was cut short is gone on with.
    """
    name = AGREEMENT_SAMPLES_STAGE.folder()
    rows, pairs = ctx.heldout.rows[: ctx.config.agreement.rows], ctx.heldout.pairs
    sampling = sampling_of(ctx.config)
    requests = [
        Request(f"agreement/{row.id}/{n}", pair.prompt, 2 * i + n)
        for i, (row, pair) in enumerate(zip(rows, pairs, strict=False))
        for n in (0, 1)
    ]

    def record(request: Request, r: Response) -> dict[str, Any]:
        text = text_of(ctx.tokenizer.decode(r.ids), sampling)
        return {
            "id": rows[request.index // 2].id,
            "sample": request.index % 2,
            "response": text,
            "finish_reason": r.finish_reason,
            "n_tokens": len(r.ids),
            "token_ids": r.ids,
        }

    def make(folder: Path) -> Metrics:
        model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
        decoder = new_decoder(model, release=True, weights=ctx.config.sampling.weights)
        share = -(-len(requests) // distributed.world_size())
        with Bar(name, share, "samples", most=ctx.config.max_new_tokens) as progress:
            made = make_answers(
                folder / SAMPLES,
                requests,
                decoder,
                new_engine(ctx.config, requests, ctx.tokenizer),
                record,
                progress,
            )
        return {"rows": len(rows), "tokens": sum(r["n_tokens"] for r in made)}

    parents: Parents = {
        "policy": hash_model_folder(policy),
        "data (held-out rows)": data_hash(rows),
        "dtype": str(ctx.dtype),
        "kept": "token ids",  # which the samples of earlier versions lack
        **ctx.tokenizer.template_parents,
        **sampling_parents(ctx.config),
    }
    ctx.run.stage(name, parents, make, resume=True)
    path = ctx.run.path / name / SAMPLES
    with reading(path, again(path.parent)):
        return read_jsonl(path)
