"""The disk that a run still needs, and the refusal to begin one that there is no room for.

Counted: the policies and guides to be written, the checkpoints beside them while they are trained,
the texts; less what a stage that was cut short has there already. Only the largest share of the
checkpoints counts, as those of a stage go when it is finished.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ldalign.data.tokenizer import COPIED_FILES
from ldalign.models.weights import check_model, count_parameters
from ldalign.run.context import Context
from ldalign.run.plan import guide_is_policy, guide_steps, stage_work, to_do
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import PARTIAL

RECORD_BYTES = 40  # a sampled token in its file: text and id
ROW_BYTES = 100  # of a row in data/, beside its text: id, roles, quotes


class Need(NamedTuple):
    """Bytes of one stage."""

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
    """What the planned stages need that are not finished. All ranks call it, before a model is
    loaded.

    folder: the run folder, or where it will be made. Raises EnvironmentProblem where the need is
    more than is free.
    """
    return distributed.on_rank0(lambda: _check(ctx, planned, folder))


def _check(ctx: Context, planned: Sequence[str], folder: Path) -> Disk:
    todo, free = to_do(ctx, planned), shutil.disk_usage(folder).free
    parameters = count_parameters(check_model(ctx.start))
    needs, held = [_data(ctx)], 0
    for name in todo:
        need, checkpoints = _stage(ctx, name, parameters)
        needs.append(need)
        held = max(held, checkpoints)
    disk = Disk(at_worst(needs), sum(name.endswith("/policy") for name in todo), held, free)
    if disk.needed > free:
        raise EnvironmentProblem(
            f"{folder}: the run needs about {disk.needed} bytes of disk ({described(disk)}), "
            f"{free} bytes are free; make room, give another folder (run=NAME), or lower "
            f"{_what_to_lower(ctx, disk)}"
        )
    return disk


def described(disk: Disk) -> str:
    """In words and GiB: the need and what it is made of."""
    beside = (
        (f", checkpoints of {disk.checkpoints / 2**30:.2f} GiB beside them")
        if disk.checkpoints
        else ""
    )
    return (
        f"{disk.needed / 2**30:.2f} GiB at most: {disk.policies} policies and other files{beside}"
    )


def at_worst(needs: Sequence[Need]) -> int:
    """Bytes more than now, at the worst moment of stages that are made one after the other."""
    worst = before = 0
    for need in needs:
        worst = max(worst, before + need.most - need.there)
        before += need.kept - need.there
    return worst


def _data(ctx: Context) -> Need:
    """The stage `data`, which every script makes."""
    texts = 0
    if to_do(ctx, ["data"]):
        for row in [*ctx.train.rows, *ctx.heldout.rows]:
            history = sum(len(message["content"]) for message in row.history)
            texts += ROW_BYTES + len(row.response) + len(row.rejected or "") + history
    return Need(texts, texts)


def _stage(ctx: Context, name: str, parameters: int) -> tuple[Need, int]:
    """What a stage needs, and how much of that its checkpoints take. parameters: of the policy."""
    training, step = ctx.config.training, name.split("/")[-1]
    work = stage_work(ctx, name)
    weights, averages, steps = 0, 0, work.steps
    kept = RECORD_BYTES * work.generated
    if step == "policy":
        weights = parameters * getattr(torch, training.master_dtype).itemsize
        adamw = training.optimizer == "adamw" or not name.startswith("iteration_")
        averages = parameters * getattr(torch, training.state_dtype).itemsize * (2 if adamw else 1)
        kept = parameters * (2 if ctx.config.policy_dtype == "bfloat16" else 4)
        kept += sum(
            (ctx.start / file).stat().st_size
            for file in COPIED_FILES
            if (ctx.start / file).is_file()
        )
    elif step == "guide":
        # two towers in float32, trained by AdamW
        weights = 2 * 4 * _tower_parameters(ctx, parameters)
        kept, averages, steps = weights, 2 * weights, guide_steps(ctx)
    held = _checkpoints(ctx, steps)
    one = weights + averages
    # They are still there when what was trained is written.
    most = max(held * one, min(held, ctx.config.checkpoint.keep) * one + kept)
    partial = (ctx.run.path / name).with_name(step + PARTIAL)
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    return Need(kept, most, there), held * one


def _checkpoints(ctx: Context, steps: int) -> int:
    """The most that lie there at a time in a stage of so many steps: those kept and one being
    written.
    """
    c = ctx.config.checkpoint
    if c.minutes is not None:  # possibly after every step; none after the last
        made = steps - 1
    else:
        made = (steps - 1) // c.steps if c.steps is not None else 0
    return max(0, min(c.keep + 1, made))


def _tower_parameters(ctx: Context, parameters: int) -> int:
    """Of one tower of the guide."""
    g = ctx.config.guide
    if guide_is_policy(g):
        return parameters
    if g.folder is not None:
        return count_parameters(check_model(Path(g.folder).expanduser()))
    return (
        12 * g.layers * g.width**2
        + (g.vocabulary + max(1024, g.max_tokens + g.latent_tokens)) * g.width
    )


def _what_to_lower(ctx: Context, disk: Disk) -> str:
    """The keys that the need depends on."""
    c, keys = ctx.config.checkpoint, []
    if disk.checkpoints:
        keys += [f"checkpoint.keep={c.keep}"] if c.keep > 2 else []
        keys += ["the checkpoints (checkpoint.minutes=null checkpoint.steps=null: none)"]
    if ctx.config.policy_dtype != "bfloat16":
        keys.append(f"policy_dtype={ctx.config.policy_dtype}")
    keys.append(f"iterations={ctx.config.iterations}" if disk.policies > 1 else "max_rows")
    return ", ".join(keys)
