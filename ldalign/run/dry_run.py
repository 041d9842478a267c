"""`--dry-run`: all that can be checked before work begins, and what the
work left will roughly take.

Checked: settings, data, template and ids of every row (`open_context`); names and shapes of the
policy's and the guide's tensors, from their files' headers; the run folder; room on the disk.
Estimated: tokens, optimizer steps, memory, disk, time, of the stages that are not finished. Nothing
is written into the run folder.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.weights import check_model
from ldalign.run.context import Context
from ldalign.run.disk import check_disk, described
from ldalign.run.folder import RunFolder
from ldalign.run.plan import stage_of, to_do
from ldalign.run.stage import Cost
from ldalign.run.stages.guide import (
    GUIDE_STAGE,
    GuidePlan,
    check_guide,
    check_reach,
    guide_plan,
    guide_tokens,
)
from ldalign.run.stages.policy import POLICY_STAGE
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import writing
from ldalign.system.memory import available_bytes
from ldalign.system.metrics import say
from ldalign.training.memory_model import (
    TrainingShape,
    frozen_guide_memory,
    guide_memory,
    training_memory,
)

PROBE_SECONDS = 0.1  # a matrix product is timed for this long
OVERHEAD_GIB = 0.4  # interpreter, torch and its libraries


def dry_run(ctx: Context, planned: Sequence[str]) -> str:
    """Checks what `open_context` has not checked; returns the page to print. All ranks call it.

    Raises InputError for a model, guide or run folder that cannot be used, EnvironmentProblem where
    the disk has no room.
    """
    model = check_model(ctx.start)
    assert isinstance(model, Mistral)  # `open_policy` refuses anything else
    check_guide(ctx.config, planned)
    costs = {name: stage_of(name).cost(ctx, name) for name in to_do(ctx, planned)}
    lines = [
        f"policy: {ctx.start}: {ctx.parameters / 1e6:.1f} million weights, "
        "all names and shapes right",
        *_data_lines(ctx),
        f"stages: {len(costs)} to be made, {len(planned) - len(costs)} are there",
    ]
    for name, cost in costs.items():
        if cost.steps:
            tokens = f", {cost.trained} tokens to train on" if cost.trained else ""
            lines.append(f"{name}: {cost.steps} optimizer steps{tokens}")
    if any(stage_of(name) is POLICY_STAGE for name in costs):
        lines += _memory_lines(ctx, model)
    if GUIDE_STAGE.folder(0) in costs:
        plan = guide_plan(ctx)
        check_reach(ctx, plan)
        lines.append(plan.why)
        if plan.reads_ids:
            lines += _guide_memory_lines(ctx, model, plan)
    lines += [
        _disk_line(ctx, planned),
        _time_line(ctx, model.config, list(costs.values())),
        "dry run: nothing was made",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- checks


def _existing(run: Path) -> Path:
    """The run folder, or the nearest folder above it that is there. Raises where
    a run could not be made.

    A run that is there already may be read-only: it is looked at, with a warning.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is a file; give a folder (run=NAME)")
    if run.is_dir() and any(run.iterdir()) and not (run / "lock").exists():
        raise InputError(
            f"{run}: holds something that is no run; give a new or empty folder (run=NAME)"
        )
    if (run / "lock").is_file():
        with writing(run), RunFolder.lock(run, write=False):  # raises where another process has it
            pass
    folder = run.absolute()
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    if (run / "lock").is_file() and not writable:
        say(f"WARNING: {run}: cannot be written to: the run cannot go on there")
    elif not folder.is_dir() or not writable:
        raise EnvironmentProblem(f"{folder}: cannot be written to; give another folder (run=NAME)")
    return folder


# ---------------------------------------------------------------------------------------- estimates


def _data_lines(ctx: Context) -> list[str]:
    lines = []
    splits = {"training": ctx.train, "held-out": ctx.heldout, "validation": ctx.validation}
    for name, prepared in splits.items():
        if prepared.rows:
            prompts = _tokens(prepared.pairs.prompts.lengths)
            responses = _tokens(prepared.pairs.real.lengths)
            lines.append(
                f"{name} rows: {len(prepared.rows)}; prompt {prompts}, response {responses}"
            )
    return lines


def _tokens(sizes: npt.NDArray[np.int64]) -> str:
    high = np.percentile(sizes, 95)
    return f"{np.mean(sizes):.0f} tokens (95 %: {high:.0f}, most {sizes.max()})"


def _memory_lines(ctx: Context, model: Mistral) -> list[str]:
    """Peak of one rank while it trains. Steps are taken to be of full micro-batches, with their
    share of response tokens.
    """
    t, config, ranks = ctx.config.training, ctx.config, distributed.world_size()
    pairs = ctx.used[1] if len(ctx.used[1]) else ctx.train.pairs
    sizes = pairs.prompts.lengths + 2 * pairs.real.lengths
    longest, both = int(sizes.max()), int(sizes.sum())
    step = config.global_batch * both / len(pairs) / ranks
    tokens = int(max(longest, min(t.micro_tokens, step)))
    adamw = t.optimizer == "adamw" or config.sft.epochs or config.continual_sft.epochs
    shape = TrainingShape(
        weight_bytes=getattr(torch, t.master_dtype).itemsize,
        state_bytes=getattr(torch, t.state_dtype).itemsize * (2 if adamw else 1),
        compute_bytes=ctx.dtype.itemsize,
        checkpointing=t.checkpointing,
        tokens=tokens,
        responses=2 * int(pairs.real.lengths.sum()) * tokens // both,
        micros=max(1, round(step / tokens)),
        ranks=ranks,
        shards=t.shard_ranks or ranks,
        whole=t.whole,
        device=ctx.device.type,
    )
    parts = training_memory(model, shape) | {"program": OVERHEAD_GIB * 2**30}
    if ctx.validation.rows and config.validation.metric == "accuracy":
        parts["whole copy that answers in validation"] = ctx.parameters * ctx.dtype.itemsize
    return _shown(ctx, "memory", parts, tokens)


def _shown(ctx: Context, title: str, parts: Mapping[str, float], tokens: int) -> list[str]:
    """The estimate, and a warning where it is more than there is: on the CPU the machine's ranks
    share its memory.
    """
    shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    ranks = 1 if ctx.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, there = sum(parts.values()), available_bytes(ctx.device)
    lines = [
        f"{title}: {needed / 2**30:.1f} GiB a rank, {tokens} tokens at a time ({shown}); "
        f"{there / 2**30:.1f} available"
    ]
    if ranks * needed > there:
        lines.append(
            f"WARNING: {title}: does not fit: {ranks * needed / 2**30:.1f} GiB for {ranks} "
            f"rank(s), of {there / 2**30:.1f} available; lower training.micro_tokens or "
            "max_length, set training.checkpointing=full, or use more ranks (GPUs)"
        )
    return lines


def _guide_memory_lines(ctx: Context, model: Mistral, plan: GuidePlan) -> list[str]:
    """Peak of one rank while it trains a guide of the policy's size: one tower as it is, or two in
    float32 with AdamW.
    """
    g, ranks, pairs = ctx.config.guide, distributed.world_size(), ctx.used[1]
    # Two towers read it all.
    rows, read = max(1, len(pairs)), guide_tokens(ctx) * (1 if plan.frozen else 2)
    step = g.global_batch * read / rows / ranks
    tokens = int(max(min(ctx.config.training.micro_tokens, step), read / rows))
    counted = pairs.real.lengths if g.loss_tokens is None else pairs.real.cut(g.loss_tokens).lengths
    responses = 2 * int(counted.sum())
    shape = TrainingShape(
        weight_bytes=4,
        state_bytes=8,
        compute_bytes=ctx.dtype.itemsize,
        checkpointing="none",
        tokens=tokens,
        responses=responses * tokens // max(1, read),
        micros=max(1, round(step / tokens)),
        ranks=ranks,
        shards=ranks,
        device=ctx.device.type,
    )
    parts = (frozen_guide_memory if plan.frozen else guide_memory)(model, shape)
    return _shown(ctx, "guide memory", parts | {"program": OVERHEAD_GIB * 2**30}, tokens)


def _disk_line(ctx: Context, planned: Sequence[str]) -> str:
    # `_existing` tries the lock, so one rank alone calls it.
    folder = Path(distributed.on_rank0(lambda: str(_existing(Path(ctx.config.run)))))
    disk = check_disk(ctx, planned, folder)
    return f"disk: {described(disk)}; {disk.free / 2**30:.1f} GiB free in {folder}"


def _time_line(ctx: Context, config: MistralConfig, costs: Sequence[Cost]) -> str:
    """A sentence on the time, from the measured speed of two products."""
    wide, narrow = _speeds(ctx, config)
    seconds = _seconds(ctx.parameters, wide, narrow, costs)
    small = ctx.config.needs_guide and not guide_plan(ctx).reads_ids
    left_out = "the guide and loading" if small else "loading"
    return (
        f"time, rough (a third to three times): {seconds / 60:.1f} min without {left_out}, if a "
        f"product of {ctx.config.training.micro_tokens} rows runs at {wide / 1e9:.0f} GFLOP/s and "
        f"one of a decoding step at {narrow / 1e9:.0f}, as measured now, and sampled responses are "
        "as long as the real ones"
    )


def rough_seconds(ctx: Context, costs: Sequence[Cost]) -> float:
    """A rough time for stages of these costs with the policy's weights, in seconds, from the speed
    measured now.
    """
    model = check_model(ctx.start)
    assert isinstance(model, Mistral)
    return _seconds(ctx.parameters, *_speeds(ctx, model.config), costs)


def _speeds(ctx: Context, config: MistralConfig) -> tuple[float, float]:
    """Operations a second of a product as in training, and as in a step of sampling."""
    wide = _flops(ctx, config, ctx.config.training.micro_tokens)
    return wide, _flops(ctx, config, min(ctx.config.sampling.batch_rows, len(ctx.used[1])))


def _seconds(parameters: int, wide: float, narrow: float, costs: Sequence[Cost]) -> float:
    """The time of costs at these speeds, on all ranks together: 6 operations a weight and token to
    train, 2 to score or generate.
    """
    total = sum(
        parameters * ((6 * cost.trained + 2 * cost.scored) / wide + 2 * cost.generated / narrow)
        for cost in costs
    )
    return total / distributed.world_size()


def _flops(ctx: Context, config: MistralConfig, rows: int) -> float:
    """Operations a second of (rows, D) @ (D, F) in the compute dtype."""
    a = torch.ones(rows, config.hidden_size, dtype=ctx.dtype, device=ctx.device)
    b = torch.ones(config.hidden_size, config.intermediate_size, dtype=ctx.dtype, device=ctx.device)
    a @ b  # the first call also sets things up
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        a @ b
        done += 1
        if ctx.device.type == "cuda":
            torch.cuda.synchronize()
    return 2 * done * rows * b.numel() / (time.perf_counter() - began)
