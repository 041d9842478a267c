"""The stage agreement: whether a judge calls the sample that lies farther away the worse one."""

import math
from pathlib import Path
from typing import Any

from ldalign.evaluation.agreement import CHANCE, summary, verdict
from ldalign.models.guide_folder import is_trained_guide
from ldalign.run.context import Context
from ldalign.run.manifest import Parents
from ldalign.run.stage import Stage
from ldalign.run.stages.agreement_samples import (
    AGREEMENT_SAMPLES_STAGE,
    SAMPLES,
    agreement_samples_stage,
)
from ldalign.run.stages.distances import latent_distances
from ldalign.run.stages.guide import GUIDE_STAGE, guide_hash
from ldalign.run.stages.judged import judge_parents, open_judge
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, write_jsonl
from ldalign.system.metrics import Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS

AGREEMENT_STAGE = Stage("agreement")


def agreement_stage(ctx: Context, policy: Path, guide: Path) -> Metrics:
    """Counts how often the guide and the judge agree on which of two samples of the policy's is
    worse, into agreement/ with every pair they saw; returns the figures.
    """
    samples = agreement_samples_stage(ctx, policy)
    rows = ctx.heldout.rows[: ctx.config.agreement.rows]

    def make(folder: Path) -> Metrics:
        records = [
            _pair(one, other) for one, other in zip(samples[0::2], samples[1::2], strict=True)
        ]
        differ = [i for i, r in enumerate(records) if r["first"] != r["second"]]
        both = [(i, side) for i in differ for side in ("first", "second")]
        texts = [records[i][side] for i, side in both]
        distances = latent_distances(
            ctx, guide, [rows[i] for i, _ in both], texts, folder / PARTS / "distances"
        ).tolist()
        preferences = open_judge(ctx, policy).prefer(
            [rows[i] for i in differ],
            [records[i]["first"] for i in differ],
            [records[i]["second"] for i in differ],
            folder / PARTS / "judge",
        )
        for n, i in enumerate(differ):
            records[i] |= {
                "first_distance": distances[2 * n],
                "second_distance": distances[2 * n + 1],
                "preference": None if math.isnan(preferences[n]) else preferences[n],
            }
        for record in records:
            record["verdict"] = verdict(record)
        if distributed.rank() == 0:
            write_jsonl(folder / "agreement.jsonl", records)
        return summary(records)

    parents: Parents = {
        "samples": hash_file(ctx.run.path / AGREEMENT_SAMPLES_STAGE.folder() / SAMPLES),
        "guide": guide_hash(guide),
        **judge_parents(ctx, policy),
        **ctx.keys("distance"),
    }
    metrics = ctx.run.stage(AGREEMENT_STAGE.folder(), parents, make, resume=True)
    say(_sentence(metrics))
    return metrics


def find_guide(ctx: Context) -> Path:
    """The folder of the trained guide: the one that the key guide.folder gives, else the run's own
    (begun from a GPT-2, maybe).

    Raises InputError where there is none.
    """
    given = Path(ctx.config.guide.folder).expanduser() if ctx.config.guide.folder else None
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


def _sentence(metrics: Metrics) -> str:
    rest = (
        f"of {metrics['agreement/prompts']:.0f} prompts; {metrics['agreement/ties']:.0f} ties, "
        f"{metrics['agreement/no_verdict']:.0f} without verdict, "
        f"{metrics['agreement/identical']:.0f} identical"
    )
    if "agreement/rate" not in metrics:
        return f"agreement: no pair was decided, {rest}"
    rate, low, high, pairs = (
        metrics[f"agreement/{name}"] for name in ("rate", "low", "high", "rows")
    )
    return (
        f"agreement: {rate:.1%} ({low:.1%} to {high:.1%}; chance {CHANCE:.0%}) on {pairs:.0f} "
        f"pairs, {rest}; the longer is worse: {metrics.get('agreement/length_rate', math.nan):.1%}"
    )
