"""The stage agreement: whether a judge calls the sample that lies farther away the worse one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ldalign.data.pairs import Pair
from ldalign.data.rows import Row
from ldalign.evaluation.agreement import lines, summary, verdict
from ldalign.models.guide import Latent
from ldalign.models.guide_folder import (
    identity_latent,
    is_trained_guide,
    pooled_guide,
    redrawn,
)
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Stage
from ldalign.run.stages.agreement_samples import (
    AGREEMENT_SAMPLES_STAGE,
    SAMPLES,
    agreement_samples_stage,
)
from ldalign.run.stages.distances import latent_distances, open_guide
from ldalign.run.stages.guide import GUIDE_STAGE, guide_hash, guide_pairs
from ldalign.run.stages.judged import judge_parents, open_judge
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, write_jsonl
from ldalign.system.metrics import Bar, Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS
from ldalign.training.latent_map import standardise
from ldalign.training.scoring import response_logps

AGREEMENT_STAGE = Stage("agreement")
SIDES = ("first", "second")


def agreement_stage(ctx: Context, policy: Path, guide: Path | None, start: Path) -> Metrics:
    """Counts how often the guide and the judge agree on which of two samples of the policy's is
    worse, into agreement/ with every pair they saw; returns the figures.

    Beside the guide stand, of the same pairs, what `ldalign.evaluation.agreement.RIVALS` names.
    guide: its folder; None with weights=pooled. start: the policy that self-play starts from.
    """
    samples = agreement_samples_stage(ctx, policy)
    rows = ctx.heldout.rows[: ctx.config.agreement.rows]

    def make(folder: Path) -> Metrics:
        records = [
            _pair(one, other) for one, other in zip(samples[0::2], samples[1::2], strict=True)
        ]
        differ = [i for i, r in enumerate(records) if r["first"] != r["second"]]
        parts = folder / PARTS
        for name, found in _measured(ctx, policy, guide, start, rows, samples, differ, parts):
            for n, i in enumerate(differ):
                for side, value in zip(SIDES, found[2 * n : 2 * n + 2].tolist(), strict=True):
                    records[i][f"{side}_{name}"] = value
        preferences = open_judge(ctx, policy).prefer(
            [rows[i] for i in differ],
            [records[i]["first"] for i in differ],
            [records[i]["second"] for i in differ],
            parts / "judge",
        )
        for preference, i in zip(preferences, differ, strict=True):
            records[i]["preference"] = None if math.isnan(preference) else preference
        for record in records:
            record["verdict"] = verdict(record)
        if distributed.rank() == 0:
            write_jsonl(folder / "agreement.jsonl", records)
        return summary(records)

    parents: Parents = {
        "samples": hash_file(ctx.run.path / AGREEMENT_SAMPLES_STAGE.folder() / SAMPLES),
        "guide": "none" if guide is None else guide_hash(guide),
        "start": hash_model_folder(start),
        "dtype": str(ctx.dtype),
        **judge_parents(ctx, policy),
        **ctx.keys("distance", "max_length", "seed"),
    }
    metrics = ctx.run.stage(AGREEMENT_STAGE.folder(), parents, make, resume=True)
    for line in lines(metrics):
        say(line)
    return metrics


def _measured(
    ctx: Context,
    policy: Path,
    guide: Path | None,
    start: Path,
    rows: Sequence[Row],
    samples: Sequence[Mapping[str, Any]],
    differ: Sequence[int],
    parts: Path,
) -> list[tuple[str, torch.Tensor]]:
    """(name, values (2 n,)) of all that calls a sample worse, larger is worse; of the two samples
    of the n prompts in `differ`, one after the other.
    """
    chosen = [rows[i] for i in differ for _ in SIDES]
    texts = [samples[2 * i + side] for i in differ for side in (0, 1)]
    pairs = []
    for n, i in enumerate(j for j in differ for _ in SIDES):
        pair = ctx.heldout.pairs[i]
        room = ctx.config.max_length - len(pair.prompt)
        # An empty sample is read as one that ended at once.
        ids = texts[n]["token_ids"][:room] or [ctx.tokenizer.end_ids[0]]
        pairs.append(replace(pair, generated=list(ids)))

    trained = open_guide(ctx, guide, start)
    read = guide_pairs(ctx, trained, chosen, pairs)
    beside: dict[str, Latent] = {}  # that read what the guide's encoder has read
    before = None
    # What two trained towers began as is known of the run's own guide alone.
    own_guide = guide == ctx.run.path / GUIDE_STAGE.folder(0)
    if guide is not None and (trained.shared or own_guide):
        before = redrawn(trained, ctx.config.seed, start if trained.chat else _gpt2(ctx))
        standardise(before, read)
        # Of other queries its states are others.
        if trained.shared and trained.config.readout == "mean":
            beside["untrained"] = before.latent
    # The tower of the run's own frozen guide is the policy that the mean states are of.
    same = own_guide and trained.shared and trained.chat is not None
    if guide is None or (same and trained.config.readout == "mean"):
        beside["pooled"] = identity_latent(trained).to(ctx.device)
    columns = latent_distances(ctx, trained, read, parts / "distances", list(beside.values()))
    found = list(zip(("distance", *beside), columns.unbind(1), strict=True))
    if before is not None and "untrained" not in beside:
        values = latent_distances(ctx, before, read, parts / "untrained")[:, 0]
        found.append(("untrained", values))
    del trained, before
    if "pooled" not in beside:
        pooled = pooled_guide(start, ctx.dtype, ctx.device, ctx.template)
        read = guide_pairs(ctx, pooled, chosen, pairs)
        found.append(("pooled", latent_distances(ctx, pooled, read, parts / "pooled")[:, 0]))
        del pooled
    found.append(("nll", _nll(ctx, policy, pairs, parts / "nll")))
    lengths = [float(len(pair.generated or ())) for pair in pairs]
    found.append(("length", torch.tensor(lengths, dtype=torch.float64)))
    return found


def _nll(ctx: Context, policy: Path, pairs: Sequence[Pair], path: Path) -> torch.Tensor:
    """(N,) float64: minus the mean log-prob a token of each pair's sample under the policy."""
    model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device)).requires_grad_(False)
    micro = ctx.config.training.micro_tokens
    with Bar("log-probs", len(pairs), "samples") as progress:
        logps = response_logps(model, pairs, micro, ctx.device, lambda n: progress(n, 0), path)
    counts = torch.tensor([len(pair.generated or ()) for pair in pairs], dtype=torch.float64)
    return -logps[:, 1].double() / counts


def _gpt2(ctx: Context) -> Path | None:
    """The GPT-2 that a guide's towers began as, where the config names it."""
    given = ctx.config.guide.folder
    folder = Path(given) if given else None
    return folder if folder is not None and not is_trained_guide(folder) else None


def find_guide(ctx: Context) -> Path:
    """The folder of the trained guide: the one that the key guide.folder gives, else the run's own
    (begun from a GPT-2, maybe).

    Raises InputError where there is none.
    """
    given = Path(ctx.config.guide.folder) if ctx.config.guide.folder else None
    own = ctx.run.path / GUIDE_STAGE.folder(0)
    folder = given if given is not None and is_trained_guide(given) else own
    if not is_trained_guide(folder):
        raise InputError(
            f"{folder}: no trained guide is there; make one with train/guide.py, or give it "
            "(guide=FOLDER)"
        )
    return folder


def _pair(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": first["id"],
        "first": first["response"],
        "second": second["response"],
        "first_tokens": first["n_tokens"],
        "second_tokens": second["n_tokens"],
    }
