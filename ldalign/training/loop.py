"""The optimizer loop, the only one: the policy and the guide are both trained by it.

What is trained hands in its rows, the function that adds up a global batch's gradient, and what a
record shows (`Task`); the loop does the rest, the same for both: the order of the rows, clipping,
the refusal of a step that is not finite, the learning rate, the step itself, metrics, checkpoints,
and requests to stop. Row order is a function of the seed and the epoch, and every other draw of the
seed and the row, so a loop that goes on from a checkpoint repeats the very same steps. Between two
steps a `Validator` may measure the model, and end the loop before its last step.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ldalign.system import distributed, interrupt
from ldalign.system.errors import NumericsError
from ldalign.system.files import write_text
from ldalign.system.memory import Heap, asking_once, naming
from ldalign.system.metrics import MetricsLog, say
from ldalign.training.batches import global_batches
from ldalign.training.checkpoint import CheckpointPlan, Checkpoints, State
from ldalign.training.optim import Optimizer, Schedule, learning_rate_factor
from ldalign.training.validation import STATE, Validator

REFUSED = "non_finite_step.json"  # beside metrics.jsonl: the rows of a step that was not done


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast the loop goes; the same on all ranks."""

    rows: int  # how many there are to train on
    global_batch: int  # rows an optimizer step, over all ranks and micro-batches
    epochs: int  # the most that are begun
    steps: int  # of the whole schedule
    stop: int  # steps after which the loop ends, at most `steps`
    learning_rate: float  # peak
    warmup_ratio: float  # share of the steps
    schedule: Schedule
    max_grad_norm: float  # 0: no clipping


@dataclass(frozen=True)
class Step:
    """One optimizer step that was done."""

    number: int  # from 1
    epoch: int  # from 0
    indices: np.ndarray  # of its rows
    loss: float  # over all ranks
    grad_norm: float  # before clipping
    learning_rate: float
    seconds: float
    left: float  # about how many seconds the steps after it take, evaluations in between too


Prepared = TypeVar("Prepared")


class Task(Protocol[Prepared]):
    """What is trained: its rows, its gradient, and what its records show. All ranks call each."""

    def prepare(self, epoch: int, indices: np.ndarray) -> Prepared:
        """Returns what `accumulate` reads of a global batch; made while the device is at work on
        the one before.
        """
        ...

    def accumulate(
        self, batch: Prepared, indices: np.ndarray, after_micro: Callable[[], object]
    ) -> Tensor:
        """Adds the gradient of one global batch to the parameters; returns (1 + n,) float64 on the
        device: what this rank adds to its loss, and to n numbers of the task's own.

        after_micro: called after each micro-batch. Nothing in it makes the host wait for a GPU.
        """
        ...

    def check(self, step: int, found: Sequence[float]) -> None:
        """Looks at what `accumulate` found in step `step` (from 0), before the weights are touched;
        raises NumericsError where it cannot be right. found (n,): its numbers, over all ranks.
        """
        ...

    def record(self, step: Step, state: State) -> tuple[Mapping[str, Any], str] | None:
        """The record of a step that was done and the line a person reads; None: this step has none.

        state: the loop's, saved in checkpoints; the task may keep sums of its own there.
        """
        ...

    def ids(self, indices: np.ndarray) -> list[str]:
        """The rows' ids, for errors."""
        ...

    def largest(self, indices: np.ndarray) -> str:
        """In words, what a micro-batch of these rows holds at the most, for memory errors."""
        ...


def optimize(
    model: nn.Module,
    optimizer: Optimizer,
    task: Task[Prepared],
    settings: LoopSettings,
    *,
    seed: int,
    stage: str,
    lower: str,
    begin: State,
    metrics_path: Path | None = None,
    checkpoints: CheckpointPlan | None = None,
    validator: Validator | None = None,
) -> State:
    """Trains `model`, which is sharded already, in place; returns the state at the end.

    begin: the state before the first step; "step" is added to it, the number of steps done. stage:
    named in records and errors. lower: what to lower where memory does not suffice. With
    `checkpoints` it goes on from the newest one that is there. validator: what measures the model
    before the first step and after some others; it may end the loop.

    Raises NumericsError, naming rows, on a loss or gradient that is not finite, before the weights
    are touched; EnvironmentProblem where memory does not suffice; Stopped where a signal asked to
    stop, between two steps.
    """
    metrics_log = MetricsLog(metrics_path, stage)
    keeper = Checkpoints(checkpoints, model, optimizer, metrics_path)
    state: State = keeper.resume() or {"step": 0, **begin}
    if first := state["step"]:
        say(f"{stage}: goes on at step {first + 1} of {settings.stop}")
    heap = Heap(next(model.parameters()).device)
    started = time.perf_counter()
    forget_refused_step(metrics_path)
    batches = global_batches(settings.rows, settings.global_batch, settings.epochs, seed, stage)

    def validate(step: int) -> None:
        if validator is None:
            return
        with naming(lambda: f"validation after step {step}", lower):
            shown = validator.after_step(step, step == settings.stop, state)
        if shown is not None:
            metrics_log.write(*shown)

    if validator is not None:
        validator.check(state)
    # A request to stop waits until a checkpoint can be written.
    with interrupt.held(), keeper.finished():
        if state["step"] == 0 and STATE not in state:
            validate(0)
        # What was done before the loop was cut short is passed over.
        steps, ahead = itertools.tee(itertools.islice(enumerate(batches), first, settings.stop))
        next(ahead, None)
        batch: Prepared | None = None
        for (step, (epoch, indices)), following in itertools.zip_longest(steps, ahead):
            if state.get("ended"):
                break
            began = time.perf_counter()

            def what(step: int = step, indices: np.ndarray = indices) -> str:
                return f"step {step + 1}: {task.largest(indices)}"

            with naming(what, lower):
                with asking_once():
                    if batch is None:
                        batch = task.prepare(epoch, indices)
                    mine = task.accumulate(batch, indices, heap.after_micro)
                sums = distributed.total(mine)
                gradient_norm, clip = distributed.clip_grad_norm(model, settings.max_grad_norm)
                batch = None if following is None else task.prepare(*following[1])
                # The one place in a step where the host waits for the device.
                norm, loss, *found = torch.cat([gradient_norm.double()[None], sums]).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                keeper.write(step, state)  # what led here can be looked at, and gone on from
                refuse_step(task.ids(indices), stage, step, loss, norm, metrics_path)
            task.check(step, found)
            factor = learning_rate_factor(
                step, settings.steps, settings.warmup_ratio, settings.schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            with naming(what, lower):  # the first step allocates the optimizer's averages
                optimizer.step(clip)
            optimizer.zero_grad()
            state["step"] = step + 1
            now = time.perf_counter()
            done = Step(
                step + 1,
                epoch,
                indices,
                loss,
                norm,
                settings.learning_rate * factor,
                now - began,
                (now - started) / (step + 1 - first) * (settings.stop - step - 1),
            )
            if (shown := task.record(done, state)) is not None:
                metrics_log.write(*shown)
            validate(step + 1)
            last = step + 1 == settings.stop or bool(state.get("ended"))
            keeper.after_step(step + 1, last, state)
    return state


def forget_refused_step(metrics_path: Path | None) -> None:
    """Removes the file that an earlier start may have left: this one tries the step again."""
    if metrics_path is not None and distributed.rank() == 0:
        metrics_path.with_name(REFUSED).unlink(missing_ok=True)


def refuse_step(
    rows: Sequence[str], stage: str, step: int, loss: float, norm: float, metrics_path: Path | None
) -> NoReturn:
    """Raises NumericsError for a step whose loss or gradient norm, summed over all ranks, is not
    finite; all ids of its rows go into a file beside metrics.jsonl.

    All ranks call it alike, and nobody has touched the weights. step: from 0.
    """
    where = ""
    if metrics_path is not None:
        path = metrics_path.with_name(REFUSED)
        found = {
            "stage": stage,
            "step": step + 1,
            "loss": str(loss),
            "grad_norm": str(norm),
            "rows": list(rows),
        }
        text = json.dumps(found, indent=1) + "\n"
        distributed.on_rank0(lambda: write_text(path, text))
        where = f" (all {len(rows)} in {path})"
    first = f"{', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''}"
    raise NumericsError(
        f"{stage}: step {step + 1}: loss {loss}, gradient norm {norm}; the weights were not "
        f"changed. Rows of the batch: {first}{where}. Lower the stage's learning_rate or look at "
        "these rows"
    )
