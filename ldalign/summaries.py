"""Stages with a summary: what each of a run's stages says of itself in numbers, and the run's
metrics.jsonl.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from ldalign.context import Context
from ldalign.pipeline import Parents
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.files import PARTIAL, write_json, write_text
from ldalign.system.memory import naming
from ldalign.system.metrics import Metrics, say

# What helps where memory does not suffice and nothing within the stage knows better.
LOWER = (
    "lower training.micro_tokens, sampling.batch_rows or max_length, or use more ranks or a "
    "smaller model"
)
SUMMARY = "summary.json"  # in every stage folder: what a report shows of it, and its wall time

# Of an iteration, in the order of the method. A guide of the first one has no number.
STEPS = (
    "responses",
    "guide",
    "distances",
    "judged",
    "reference",
    "pair_rewards",
    "policy",
    "evaluation",
    "reward",
)


def stage(
    ctx: Context, name: str, parents: Parents, make: Callable[[Path], Metrics], resume: bool = False
) -> Metrics:
    """`RunFolder.stage`, with what `make` returns (on rank 0) and the wall time in summary.json;
    returns that summary.

    The run's metrics.jsonl is put together again from all stages, where it is not up to date.
    """

    def timed(folder: Path) -> None:
        began = time.perf_counter()
        with naming(lambda: name, LOWER):
            summary = make(folder)
        if distributed.rank() == 0:
            write_json(
                folder / SUMMARY, {**summary, "seconds": round(time.perf_counter() - began, 2)}
            )

    made = ctx.run.stage(name, parents, timed, resume)
    summary: Metrics = json.loads((ctx.run.path / name / SUMMARY).read_text(encoding="utf-8"))
    say(f"{name}: done ({summary['seconds']:.0f} s)" if made else f"{name}: already done")
    # also if done before: the run may have been killed right then
    on_rank0(lambda: _join_metrics(ctx.run.path))
    return summary


def stage_names(run: Path) -> list[str]:
    """The finished stages of a run folder, in the order of the method."""
    names = [
        "data",
        "start/evaluation",
        "start/reward",
        "sft/policy",
        "sft/evaluation",
        "sft/reward",
    ]
    names += [f"iteration_{t}/{step}" for t in sorted({0, *iterations(run)}) for step in STEPS]
    # the first responses' has no number
    names.insert(names.index("iteration_0/distances"), "guide")
    names += ["continual_sft/policy", "continual_sft/evaluation", "continual_sft/reward"]
    names += ["agreement_samples", "agreement"]
    for name in [name for name in names if name.endswith("/evaluation")]:
        folders = [
            path
            for path in sorted((run / name).parent.glob("benchmarks/*"))
            if path.suffix != PARTIAL
        ]
        names[names.index(name) + 1 : names.index(name) + 1] = [
            str(path.relative_to(run)) for path in folders
        ]
    return [name for name in names if (run / name / SUMMARY).is_file()]


def benchmark_summaries(run: Path) -> dict[str, Metrics]:
    """What every finished benchmark of a run folder says of itself, by stage name
    (POLICY/benchmarks/TASK).
    """
    names = [name for name in stage_names(run) if "/benchmarks/" in name]
    return {name: json.loads((run / name / SUMMARY).read_text(encoding="utf-8")) for name in names}


def shown_name(policy: str) -> str:
    """A policy's folder as a reader says it: iteration_0 -> iteration 0."""
    return {"sft": "start (after SFT)", "continual_sft": "continual SFT"}.get(
        policy, policy.replace("_", " ")
    )


def iterations(run: Path) -> list[int]:
    """The numbers of the iterations in a run folder."""
    numbers = (path.name.removeprefix("iteration_") for path in run.glob("iteration_*"))
    return sorted(int(n) for n in numbers if n.isdecimal())


def _join_metrics(run: Path) -> None:
    """metrics.jsonl of the run: every stage's own lines, then its summary as one line (evaluation:
    prefix eval_).
    """
    lines: list[str] = []
    for name in stage_names(run):
        path = run / name / "metrics.jsonl"
        lines += [path.read_text(encoding="utf-8")] if path.is_file() else []
        prefix = "eval_" if name.endswith("/evaluation") else ""
        summary = json.loads((run / name / SUMMARY).read_text(encoding="utf-8"))
        lines.append(
            json.dumps(
                {"stage": name, **{f"{prefix}{key}": value for key, value in summary.items()}}
            )
            + "\n"
        )
    path, text = run / "metrics.jsonl", "".join(lines)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
