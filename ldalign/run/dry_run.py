"""`--dry-run`: all that can be checked before work begins, and what the work left will take.

Checked: settings, data, template and ids of every row (`open_context`); names and shapes of the
policy's and the guide's tensors, from their files' headers; the run folder; room on the disk.
Warned of: rows and answers that the settings cut. Estimated: tokens, optimizer steps, memory (of
this machine's ranks, or of GPUs elsewhere), disk, time, of the stages that are not finished. What
cannot be is said at the end, after all else. Nothing is written into the run folder.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldalign.kernels.pieces import WORKSPACE_BYTES
from ldalign.models.mistral import Mistral, MistralConfig
from ldalign.models.weights import check_model, context_length
from ldalign.run.context import SAMPLED, Context
from ldalign.run.disk import described, disk_need, refuse_full_disk
from ldalign.run.folder import is_foreign
from ldalign.run.lengths import Counts, quantiles
from ldalign.run.lock import LOCK, lock
from ldalign.run.plan import stage_of, to_do
from ldalign.run.positions import for_longer_rows
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
from ldalign.system.metrics import in_words, say
from ldalign.training.memory_model import (
    TrainingShape,
    frozen_guide_memory,
    guide_memory,
    training_memory,
)

PROBE_SECONDS = 0.1  # a matrix product is timed for this long
OVERHEAD_GIB = 0.4  # interpreter, torch and its libraries


@dataclass(frozen=True)
class Gpus:
    """GPUs that a run is meant for; this machine need not have them."""

    count: int
    gib: float  # of memory, each

    @classmethod
    def of(cls, text: str) -> "Gpus":
        """Reads "8x80", or "80" for one. Raises InputError for anything else."""
        found = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6}(?:\.\d+)?)", text)
        gpus = cls(int(found[1] or 1), float(found[2])) if found else cls(0, 0.0)
        if not gpus.count or not gpus.gib:
            raise InputError(
                f"gpus={text}: give COUNTxGIB, such as gpus=8x80 (8 GPUs of 80 GiB each), or "
                "gpus=80 for one"
            )
        return gpus

    @property
    def text(self) -> str:
        """The same in words."""
        return f"{self.count} GPU{'s' * (self.count > 1)} of {self.gib:g} GiB"


def dry_run(ctx: Context, planned: Sequence[str], gpus: Gpus | None = None) -> str:
    """Checks what `open_context` has not checked; returns the page to print. All ranks call it.

    gpus: what memory is estimated for, in place of this machine's ranks. Raises InputError for a
    model, guide or run folder that cannot be used, EnvironmentProblem where the disk has no room:
    where there are problems beside the model's, the page is printed before, and all are named.
    """
    model = check_model(ctx.start)
    assert isinstance(model, Mistral)  # `open_policy` refuses anything else
    lines = [
        f"policy: {ctx.start}: {ctx.parameters / 1e6:.1f} million weights, "
        "all names and shapes right"
    ]
    costs: dict[str, Cost] = {}
    problems: list[InputError | EnvironmentProblem] = []

    def stage_lines() -> Iterator[str]:
        check_guide(ctx.config, planned)
        costs.update({name: stage_of(name).cost(ctx, name) for name in to_do(ctx, planned)})
        yield f"stages: {len(costs)} to be made, {len(planned) - len(costs)} are there"
        for name, cost in costs.items():
            if cost.steps:
                tokens = f", {cost.trained} tokens to train on" if cost.trained else ""
                yield f"{name}: {cost.steps} optimizer steps{tokens}"

    def time_lines() -> Iterable[str]:
        known = costs or not problems  # else the stages could not be counted
        return _time_lines(ctx, model.config, list(costs.values()), gpus) if known else []

    sections: tuple[Callable[[], Iterable[str]], ...] = (
        lambda: _data_lines(ctx),
        lambda: _cut_lines(ctx, planned),
        stage_lines,
        lambda: _memory(ctx, model, list(costs), gpus),
        lambda: _disk_lines(ctx, planned),
        time_lines,
    )
    for section in sections:
        try:
            for line in section():
                lines.append(line)
        except (InputError, EnvironmentProblem) as error:
            if str(error) not in map(str, problems):  # sections may look at the same thing
                problems.append(error)
    lines.append("dry run: nothing was made")
    if problems:
        say("\n".join(lines))
        raise _together(problems)
    return "\n".join(lines)


def _together(
    problems: Sequence[InputError | EnvironmentProblem],
) -> InputError | EnvironmentProblem:
    """One error that names all; of the first one's kind, and so with its exit code."""
    if len(problems) == 1:
        return problems[0]
    text = f"{len(problems)} problems: {' | '.join(map(str, problems))}"
    return (InputError if isinstance(problems[0], InputError) else EnvironmentProblem)(text)


# ------------------------------------------------------------------------------------------- checks


def _existing(run: Path) -> Path:
    """The run folder, or the nearest folder above it that is there. Raises where
    a run could not be made.

    A run that is there already may be read-only: it is looked at, with a warning.
    """
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is a file; give a folder (run=NAME)")
    if run.is_dir() and is_foreign(run):
        raise InputError(
            f"{run}: holds something that is no run; give a new or empty folder (run=NAME)"
        )
    if (run / LOCK).is_file():
        with writing(run), lock(run, write=False):  # raises where another process has it
            pass
    folder = run.absolute()
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    if (run / LOCK).is_file() and not writable:
        say(f"WARNING: {run}: cannot be written to: the run cannot go on there")
    elif not folder.is_dir() or not writable:
        raise EnvironmentProblem(f"{folder}: cannot be written to; give another folder (run=NAME)")
    return folder


# ---------------------------------------------------------------------------------------- estimates


def _data_lines(ctx: Context) -> Iterator[str]:
    splits = {"training": ctx.train, "held-out": ctx.heldout, "validation": ctx.validation}
    for name, prepared in splits.items():
        if prepared.rows:
            prompts = _tokens(prepared.pairs.prompts.lengths)
            responses = _tokens(prepared.pairs.real.lengths)
            yield f"{name} rows: {len(prepared.rows)}; prompt {prompts}; response {responses}"


def _tokens(sizes: Counts) -> str:
    median, high, most = quantiles(sizes)
    return f"median {median} tokens, 95 % {high}, longest {most}"


def _cut_lines(ctx: Context, planned: Sequence[str]) -> Iterator[str]:
    """Warnings of what the settings leave out or cut, which a demonstration may and a run of one's
    own data may not want.
    """
    config, real = ctx.config, ctx.train.pairs.real.lengths
    steps = {name.rpartition("/")[2] for name in planned}
    used, usable = len(ctx.used[0]), len(ctx.train.rows) + int(ctx.counts.get("rows/unused", 0))
    if config.max_rows is not None and used < usable and config.iterations:
        yield (
            f"WARNING: max_rows={config.max_rows}: an iteration uses {used} of {usable} rows that "
            "are left beside those held out; for all: max_rows=null"
        )
    # Lengths from the data are as long as nearly all rows ask, or as the policy reads.
    if len(real) and steps & {*SAMPLED} and "max_new_tokens" not in ctx.from_data:
        high, new = quantiles(real)[1], config.max_new_tokens
        if high > new:
            yield (
                f"WARNING: max_new_tokens={new}: {np.mean(real > new):.0%} of the real responses "
                f"are longer (95 % have up to {high} tokens), and sampled ones are cut there; give "
                f"max_new_tokens={high} or more, or 0 (from the data)"
            )
    cut = int(ctx.counts.get("rows/cut", 0))
    longer = config.max_length < context_length(ctx.start)  # what the policy could read
    if cut and not (longer and "max_length" in ctx.from_data):
        yield (
            f"WARNING: max_length={config.max_length}: cuts the end of {cut} of "
            f"{len(ctx.train.rows)} training responses; "
            f"{for_longer_rows(ctx.start, config.max_length)}"
        )


@dataclass(frozen=True)
class _Ranks:
    """The processes whose memory is estimated."""

    count: int
    device: str  # its type
    dtype: torch.dtype  # of computing
    available: float  # bytes for `sharing` of them
    sharing: int = 1
    gpus: Gpus | None = None  # None: this machine's
    logits: int | None = None  # `TrainingShape.logits`


def _ranks(ctx: Context, gpus: Gpus | None) -> _Ranks:
    """This machine's ranks, which share the memory of its CPUs; or one a GPU.

    Raises InputError where the GPUs cannot be divided as training.shard_ranks has it.
    """
    if gpus is None:
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ctx.device.type != "cuda" else 1
        there = available_bytes(ctx.device)
        return _Ranks(distributed.world_size(), ctx.device.type, ctx.dtype, there, sharing)
    shards = ctx.config.training.shard_ranks
    if shards and gpus.count % shards:
        raise InputError(
            f"gpus: {gpus.count} GPUs cannot be split by training.shard_ranks={shards}; give a "
            "multiple of it, or another training.shard_ranks"
        )
    # This machine may have no bfloat16, and other kernels.
    dtype = torch.bfloat16 if ctx.config.dtype == "auto" else ctx.dtype
    most = WORKSPACE_BYTES
    return _Ranks(gpus.count, "cuda", dtype, gpus.gib * 2**30, gpus=gpus, logits=most)


def _memory(ctx: Context, model: Mistral, todo: Sequence[str], gpus: Gpus | None) -> Iterator[str]:
    """What training takes of memory in the stages to do."""
    trains = any(stage_of(name) is POLICY_STAGE for name in todo)
    guides = GUIDE_STAGE.folder(0) in todo
    if not trains and not guides:
        return
    ranks = _ranks(ctx, gpus)
    if trains:
        yield from _memory_lines(ctx, model, ranks)
    if guides:
        plan = guide_plan(ctx)
        yield plan.why
        if plan.reads_ids:
            yield from _guide_memory_lines(ctx, model, plan, ranks)
        check_reach(ctx, plan)


def _memory_lines(ctx: Context, model: Mistral, on: _Ranks) -> list[str]:
    """Peak of one rank while it trains. Steps are taken to be of full micro-batches, with their
    share of response tokens.
    """
    t, config = ctx.config.training, ctx.config
    pairs = ctx.used[1] if len(ctx.used[1]) else ctx.train.pairs
    sizes = pairs.prompts.lengths + 2 * pairs.real.lengths
    longest, both = int(sizes.max()), int(sizes.sum())
    step = config.global_batch * both / len(pairs) / on.count
    tokens = int(max(longest, min(t.micro_tokens, step)))
    adamw = t.optimizer == "adamw" or config.sft.epochs or config.continual_sft.epochs
    shape = TrainingShape(
        weight_bytes=getattr(torch, t.master_dtype).itemsize,
        state_bytes=getattr(torch, t.state_dtype).itemsize * (2 if adamw else 1),
        compute_bytes=on.dtype.itemsize,
        checkpointing=t.checkpointing,
        tokens=tokens,
        responses=2 * int(pairs.real.lengths.sum()) * tokens // both,
        micros=max(1, round(step / tokens)),
        ranks=on.count,
        shards=t.shard_ranks or on.count,
        whole=t.whole,
        device=on.device,
        logits=on.logits,
    )
    parts = training_memory(model, shape) | {"program": OVERHEAD_GIB * 2**30}
    if ctx.validation.rows and config.validation.metric == "accuracy":
        parts["whole copy that answers in validation"] = ctx.parameters * on.dtype.itemsize
    return _shown("memory", parts, tokens, on)


def _shown(title: str, parts: Mapping[str, float], tokens: int, on: _Ranks) -> list[str]:
    """The estimate, and a warning where it is more than there is: on the CPU the machine's ranks
    share its memory.
    """
    shown = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    needed, there = sum(parts.values()), on.available / 2**30
    what = f"{needed / 2**30:.1f} GiB a rank, {tokens} tokens at a time ({shown})"
    fits = on.sharing * needed <= on.available
    if on.gpus is None:
        lines = [f"{title}: {what}; {there:.1f} available"]
    else:
        verdict = "fits" if fits else "does not fit"
        computed = "computed from the shapes, not measured"
        lines = [f"{title} on {on.gpus.text}: {what}: {verdict}; {computed}"]
    if not fits:
        lines.append(
            f"WARNING: {title}: does not fit: {on.sharing * needed / 2**30:.1f} GiB for "
            f"{on.sharing} rank{'s' * (on.sharing > 1)}, of {there:.1f} available; lower "
            "training.micro_tokens or max_length, set training.checkpointing=full, or use more "
            "ranks (GPUs)"
        )
    return lines


def _guide_memory_lines(ctx: Context, model: Mistral, plan: GuidePlan, on: _Ranks) -> list[str]:
    """Peak of one rank while it trains a guide of the policy's size: one tower as it is, or two in
    float32 with AdamW.
    """
    g, pairs = ctx.config.guide, ctx.used[1]
    # Two towers read it all.
    rows, read = max(1, len(pairs)), guide_tokens(ctx) * (1 if plan.frozen else 2)
    step = g.global_batch * read / rows / on.count
    tokens = int(max(min(ctx.config.training.micro_tokens, step), read / rows))
    counted = pairs.real.lengths if g.loss_tokens is None else pairs.real.cut(g.loss_tokens).lengths
    responses = 2 * int(counted.sum())
    shape = TrainingShape(
        weight_bytes=4,
        state_bytes=8,
        compute_bytes=on.dtype.itemsize,
        checkpointing="none",
        tokens=tokens,
        responses=responses * tokens // max(1, read),
        micros=max(1, round(step / tokens)),
        ranks=on.count,
        shards=on.count,
        device=on.device,
        logits=on.logits,
    )
    parts = (frozen_guide_memory if plan.frozen else guide_memory)(model, shape)
    return _shown("guide memory", parts | {"program": OVERHEAD_GIB * 2**30}, tokens, on)


def _disk_lines(ctx: Context, planned: Sequence[str]) -> Iterator[str]:
    # `_existing` tries the lock, so one rank alone calls it.
    folder = Path(distributed.on_rank0(lambda: str(_existing(Path(ctx.config.run)))))
    disk = disk_need(ctx, planned, folder)
    yield f"disk: {described(disk)}; {disk.free / 2**30:.1f} GiB free in {folder}"
    refuse_full_disk(ctx, disk, folder)


def _time_lines(
    ctx: Context, config: MistralConfig, costs: Sequence[Cost], gpus: Gpus | None
) -> Iterator[str]:
    """A sentence on the time, from the measured speed of two products."""
    wide, narrow = _speeds(ctx, config)
    seconds = _seconds(ctx.parameters, wide, narrow, costs)
    small = ctx.config.needs_guide and not guide_plan(ctx).reads_ids
    left_out = "the guide and loading" if small else "loading"
    elsewhere = " on this machine, not on those GPUs" if gpus else ""
    yield (
        f"time, rough (a third to three times): {duration(seconds)} without {left_out}{elsewhere}, "
        f"if a product of {ctx.config.training.micro_tokens} rows runs at {wide / 1e9:.0f} GFLOP/s "
        f"and one of a decoding step at {narrow / 1e9:.0f}, as measured now, and sampled responses "
        "are as long as the real ones"
    )


def duration(seconds: float) -> str:
    """A time in words, to the minute."""
    minutes = round(seconds / 60)
    return in_words(60 * minutes) if minutes else "under 1 min"


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
