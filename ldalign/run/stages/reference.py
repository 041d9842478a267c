"""The stage iteration_t/reference: log-probs of both responses under the reference policy."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from ldalign.data.pairs import Pair, usable
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Cost, Stage
from ldalign.system import distributed
from ldalign.system.files import save_tensors, write_json
from ldalign.system.metrics import Bar, Metrics
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.training.scoring import response_logps

LOGPS = "reference.safetensors"  # in the stage folder


def _cost(ctx: Context, name: str) -> Cost:
    return Cost(scored=sum(len(p.prompt) + 2 * len(p.real) for p in ctx.used[1]))


REFERENCE_STAGE = Stage("reference", _cost)


def reference_stage(
    ctx: Context, t: int, policy: Path, pairs: Sequence[Pair], made_from: Parents, cut: int = 0
) -> list[Pair]:
    """Scores both responses of every pair under the reference policy; returns the pairs with these
    log-probs (natural, summed over a response's tokens).

    Pairs that will not be trained on are not scored, and carry zeros. made_from: what the pairs'
    tokens depend on, beside the data and max_length. cut: how many of the sampled responses
    max_length cut (they have no end token), for the summary.
    """
    name = REFERENCE_STAGE.folder(t)
    kept = [pair for pair in pairs if usable(pair)]

    def make(folder: Path) -> Metrics:
        model = load_model(policy, ctx.dtype, ctx.device).requires_grad_(False)
        with Bar(name, len(kept), "pairs") as progress:
            logps = response_logps(
                model,
                kept,
                ctx.config.training.micro_tokens,
                ctx.device,
                lambda n: progress(n, 0),
                folder / PARTS / "logps",
            )
        if distributed.rank() == 0:
            save_tensors({"logps": logps}, folder / LOGPS)
            write_json(folder / "rows.json", [pair.id for pair in kept])
        if not kept:
            return {"losers/cut": cut}
        real, generated = logps.mean(0).tolist()
        return {"logps/ref_chosen": real, "logps/ref_rejected": generated, "losers/cut": cut}

    parents = {
        "policy": hash_model_folder(policy),
        "data": ctx.used_hash,
        **ctx.tokenizer.template_parents,
        "dtype": str(ctx.dtype),
        **made_from,
        **ctx.keys("max_length"),
    }
    ctx.run.stage(name, parents, make, resume=True)
    folder = ctx.run.path / name
    ids = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    logps = dict(zip(ids, load_file(folder / LOGPS)["logps"].tolist(), strict=True))
    return [
        replace(pair, ref_real=logps[pair.id][0], ref_generated=logps[pair.id][1])
        if usable(pair)
        else pair
        for pair in pairs
    ]
