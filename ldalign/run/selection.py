"""Which iteration's policy is a run's result: by validation, or the last (`select`).

The choice stands in RUN/selected.json, which whoever goes on from a run reads: `policy=RUN` is the
policy that it names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldalign.run.context import SELECTED, Context
from ldalign.run.folder import iterations, read_summary, shown_name
from ldalign.run.stages.policy import POLICY_STAGE, start_name
from ldalign.run.stranger import read_if_there
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import holds, write_text
from ldalign.training.validation import better

# Of a training stage's summary: what validation found of its policy, of where it began, of its last
# step; and the step whose weights its policy has.
FOUND = "validation"


@dataclass(frozen=True)
class Selected:
    """The policy that a run ends with."""

    policy: str  # its name in the run: iteration_1
    folder: str  # its model folder, below the run's unless it is absolute
    select: str  # best or last, as it came about
    why: str  # a sentence
    validation: dict[str, dict[str, float]]  # nll and accuracy, by policy; {}: none was measured


def select(ctx: Context, start: Path) -> Selected:
    """Chooses among the iterations' policies, and writes RUN/selected.json. All ranks call it when
    every iteration is finished.

    start: the folder of the policy that self-play started from, which is the result of no iteration
    at all.
    """

    def write() -> None:
        path, text = ctx.run.path / SELECTED, json.dumps(asdict(found), indent=1) + "\n"
        if not holds(path, text.encode("utf-8")):
            write_text(path, text)

    found = _select(ctx, start)
    on_rank0(write)
    return found


def _select(ctx: Context, start: Path) -> Selected:
    count, first = ctx.config.iterations, start_name(ctx.config)
    if not count:
        below = start.is_relative_to(ctx.run.path)
        folder = start.relative_to(ctx.run.path) if below else start.absolute()
        why = f"the {shown_name(first)}, as the run has no iteration"
        return Selected(first, str(folder), "last", why, {})
    summaries = [read_summary(ctx.run.path / POLICY_STAGE.folder(t)) for t in range(count)]
    found = validation(first, summaries)
    name, why = f"iteration_{count - 1}", _why_last(ctx, count)
    if ctx.select == "best":
        name, why = _best(found, summaries, first)
    return Selected(name, POLICY_STAGE.folder(name), ctx.select, why, found)


def validation(first: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """What validation found of every policy: nll and accuracy, by its name; {} where it was not
    measured. summaries: of the iterations' training stages. first: the name of the start policy.
    """
    found = {}
    if summaries and f"{FOUND}/nll" in summaries[0]:
        found[first] = _figures(summaries[0], "_start")
    for t, summary in enumerate(summaries):
        if f"{FOUND}/nll" in summary:
            found[f"iteration_{t}"] = _figures(summary, "")
    return found


def _figures(summary: Mapping[str, Any], suffix: str) -> dict[str, float]:
    keys = {name: f"{FOUND}/{name}{suffix}" for name in ("nll", "accuracy")}
    return {name: summary[key] for name, key in keys.items() if key in summary}


def _best(
    found: Mapping[str, dict[str, float]], summaries: Sequence[Mapping[str, Any]], first: str
) -> tuple[str, str]:
    """The name of the best iteration, and why it is the one, with what speaks against it."""
    best = 0
    for t in range(1, len(summaries)):
        best = t if better(found[f"iteration_{t}"], found[f"iteration_{best}"]) else best
    name, count, summary = f"iteration_{best}", len(summaries), summaries[best]
    by = "accuracy" if "accuracy" in found[name] else "NLL"
    of = f"the best of {count} iterations" if count > 1 else "the only iteration, at its best"
    why = (
        f"{of} by validation {by}, {said_figures(found[name])} after step "
        f"{summary[f'{FOUND}/step']:.0f} of {summary['steps']:.0f}"
    )
    if better(found[first], found[name]):
        why += f"; the {shown_name(first)} was better, {said_figures(found[first])}"
    return name, why


def said_figures(figures: Mapping[str, float]) -> str:
    """The figures of one evaluation in words."""
    parts = [f"{100 * figures['accuracy']:.1f} % right"] if "accuracy" in figures else []
    return ", ".join([*parts, f"{figures['nll']:.4f} nats/token"])


def _why_last(ctx: Context, count: int) -> str:
    why = "select=last" if ctx.validation.rows else "no rows are set aside for validation"
    return f"the last of {count} iterations ({why})" if count > 1 else f"the only iteration ({why})"


def read_selected(run: Path) -> dict[str, Any]:
    """Reads a run's choice; {} where it has made none, or the policy that it names is gone.

    Raises InputError where it is not what `select` writes.
    """
    path = run / SELECTED
    again = "delete it: the run's command writes it again"
    found = read_if_there(path, again)
    for key in ("policy", "folder", "why"):
        if found and not isinstance(found.get(key), str):
            raise InputError(f"{path}: damaged: {key} is {found.get(key)!r:.80}; {again}")
    known = {f"iteration_{t}" for t in iterations(run)}
    return found if found.get("policy") in known | {"start", "sft"} else {}
