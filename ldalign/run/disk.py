"""The disk that a run still needs, and the refusal to begin one that there is no room for.

Counted: the policies and guides to be written, the checkpoints and best weights beside them while
they are trained, the texts; less what a stage that was cut short has there already. Only the
largest share of the checkpoints counts, as those of a stage go when it is finished.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldalign.run.context import Context
from ldalign.run.plan import stage_of, to_do
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import PARTIAL

RECORD_BYTES = 40  # a sampled token in its file: text and id


class Need(NamedTuple):
    """The bytes that one stage needs."""

    kept: int  # when it is finished
    most: int  # while it is made
    there: int = 0  # in its unfinished folder already


class Disk(NamedTuple):
    """What the run still needs, and what its folder's file system has."""

    needed: int  # bytes, at the worst moment
    policies: int  # to be written
    checkpoints: int  # bytes, the most that those of one stage take
    free: int  # bytes


def check_disk(ctx: Context, planned: Sequence[str], folder: Path) -> Disk:
    """Compares what the planned stages need that are not finished with what is free. All ranks
    call it, before a model is loaded.

    folder: the run folder, or where it will be made. Raises EnvironmentProblem where the need is
    more than is free.
    """
    disk = disk_need(ctx, planned, folder)
    refuse_full_disk(ctx, disk, folder)
    return disk


def disk_need(ctx: Context, planned: Sequence[str], folder: Path) -> Disk:
    """What the planned stages need that are not finished, and what is free in `folder`. All ranks
    call it.
    """
    return distributed.on_rank0(lambda: _need(ctx, planned, folder))


def _need(ctx: Context, planned: Sequence[str], folder: Path) -> Disk:
    todo, free = to_do(ctx, planned), shutil.disk_usage(folder).free
    needs, held = [], 0
    for name in todo:
        need, checkpoints = _stage(ctx, name)
        needs.append(need)
        held = max(held, checkpoints)
    policies = sum(stage_of(name) is POLICY_STAGE for name in todo)
    return Disk(at_worst(needs), policies, held, free)


def refuse_full_disk(ctx: Context, disk: Disk, folder: Path) -> None:
    """Raises EnvironmentProblem where the need is more than is free."""
    if disk.needed > disk.free:
        raise EnvironmentProblem(
            f"{folder}: the run needs about {disk.needed} bytes of disk ({described(disk)}), "
            f"{disk.free} bytes are free; make room, give another folder (run=NAME), or lower "
            f"{_what_to_lower(ctx, disk)}"
        )


def described(disk: Disk) -> str:
    """The need and what it is made of, in words and GiB."""
    needed, checkpoints = disk.needed / 2**30, disk.checkpoints / 2**30
    beside = f", checkpoints of {checkpoints:.2f} GiB beside them" if disk.checkpoints else ""
    policies = "1 policy" if disk.policies == 1 else f"{disk.policies} policies"
    return f"{needed:.2f} GiB at most: {policies} and other files{beside}"


def at_worst(needs: Sequence[Need]) -> int:
    """Bytes more than now, at the worst moment of stages that are made one after the other."""
    worst = before = 0
    for need in needs:
        worst = max(worst, before + need.most - need.there)
        before += need.kept - need.there
    return worst


def _stage(ctx: Context, name: str) -> tuple[Need, int]:
    """What a stage needs, and how many bytes of that its checkpoints take."""
    cost = stage_of(name).cost(ctx, name)
    kept = cost.kept + RECORD_BYTES * cost.generated
    held, one = _checkpoints(ctx, cost.steps), cost.checkpoint
    # They are still there when what was trained is written.
    most = max(held * one, min(held, ctx.config.checkpoint.keep) * one + kept)
    # Every checkpoint may have best weights of its own, beside the newest ones.
    most += min(cost.bests, held + 2) * cost.best
    partial = ctx.run.path / f"{name}{PARTIAL}"
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return Need(kept, most, there), held * one


def _checkpoints(ctx: Context, steps: int) -> int:
    """The most that lie there at a time in a stage of so many steps: those
    kept and one being written.
    """
    c = ctx.config.checkpoint
    if c.minutes is not None:  # possibly after every step; none after the last
        made = steps - 1
    else:
        made = (steps - 1) // c.steps if c.steps is not None else 0
    return max(0, min(c.keep + 1, made))


def _what_to_lower(ctx: Context, disk: Disk) -> str:
    """The keys that the need depends on."""
    c, keys = ctx.config.checkpoint, []
    if disk.checkpoints:
        keys += [f"checkpoint.keep={c.keep}"] if c.keep > 2 else []
        keys.append("the checkpoints (checkpoint.minutes=null checkpoint.steps=null: none)")
    if ctx.config.policy_dtype != "bfloat16":
        keys.append(f"policy_dtype={ctx.config.policy_dtype}")
    keys.append(f"iterations={ctx.config.iterations}" if disk.policies > 1 else "max_rows")
    return ", ".join(keys)
