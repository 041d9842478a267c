"""The stage iteration_t/reference: log-probs of both responses under the reference policy."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ldalign.data.pairs import Pairs
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Cost, Stage
from ldalign.system import distributed
from ldalign.system.files import again, reading, save_tensors, write_json
from ldalign.system.metrics import Bar, Metrics
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.training.scoring import response_logps

LOGPS = "reference.safetensors"  # in the stage folder


def _cost(ctx: Context, name: str) -> Cost:
    return Cost(scored=ctx.used_tokens)


REFERENCE_STAGE = Stage("reference", _cost)


def reference_stage(
    ctx: Context, t: int, policy: Path, pairs: Pairs, made_from: Parents, cut: int = 0
) -> Pairs:
    """Scores both responses of every pair under the reference policy; returns the pairs with these
    log-probs (natural, summed over a response's tokens).

    Pairs that will not be trained on are not scored, and carry zeros. made_from: what the pairs'
    tokens depend on, beside the data and max_length. cut: how many of the sampled responses
    max_length cut (they have no end token), for the summary.
    """
    name = REFERENCE_STAGE.folder(t)
    used = pairs.usable
    kept = pairs.take(used)
    # The policy begins with its weights as training keeps them, which may be coarser than they are
    # computed in here: the reference is that policy.
    start = getattr(torch, ctx.config.training.master_dtype)
    rounded = start.itemsize < ctx.dtype.itemsize

    def make(folder: Path) -> Metrics:
        model = load_model(policy, ctx.dtype, ctx.device).requires_grad_(False)
        if rounded:
            for p in model.parameters():
                p.copy_(p.to(start))
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
            write_json(folder / "rows.json", list(kept.ids))
        if not len(kept):
            return {"losers/cut": cut}
        real, generated = logps.mean(0).tolist()
        return {"logps/ref_chosen": real, "logps/ref_rejected": generated, "losers/cut": cut}

    parents = {
        "policy": hash_model_folder(policy),
        "data": ctx.used_hash,
        **ctx.tokenizer.template_parents,
        "dtype": str(ctx.dtype),
        **({"start": str(start)} if rounded else {}),
        **made_from,
        **ctx.keys("max_length"),
    }
    ctx.run.stage(name, parents, make, resume=True)
    references, path = pairs.references.copy(), ctx.run.path / name / LOGPS
    with reading(path, again(path.parent)):
        logps = load_file(path)["logps"].numpy()
        if logps.shape != references[used].shape:
            raise ValueError(f"log-probs of shape {logps.shape} for {len(kept)} pairs")
        references[used] = logps
    return pairs.changed(references=references)
