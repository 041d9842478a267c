"""The optimizer loop by itself on a task of four numbers: what it times, refuses and lets go of."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.system.memory import OutOfMemory
from ldalign.training import loop
from ldalign.training.batches import global_batches
from ldalign.training.checkpoint import CheckpointPlan
from ldalign.training.loop import LoopSettings, Step, optimize
from ldalign.training.optim import Optimizer, make_optimizer

STEPS = 4


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield


class Toy:
    """The mean square of a linear layer's outputs of 1 to 8; two rows a step.

    fails, spoils: the step (from 1) that raises, or whose loss is NaN.
    """

    def __init__(self, fails: int = 0, spoils: int = 0) -> None:
        self.fails, self.spoils, self.calls = fails, spoils, 0
        self.steps: list[Step] = []
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1)

    def prepare(self, epoch: int, indices: np.ndarray) -> Tensor:
        return torch.tensor(indices + 1.0, dtype=torch.float32)[:, None]

    def accumulate(
        self, batch: Tensor, indices: np.ndarray, after_micro: Callable[[], object]
    ) -> Tensor:
        self.calls += 1
        if self.calls == self.fails:
            raise RuntimeError("planted")
        loss = self.model(batch).square().mean()
        loss.backward()
        after_micro()
        return loss.detach().double()[None] * (np.nan if self.calls == self.spoils else 1)

    def check(self, step: int, found: Any) -> None:
        pass

    def record(self, step: Step, state: Any) -> None:
        self.steps.append(step)

    def ids(self, indices: np.ndarray) -> list[str]:
        return [f"row-{i}" for i in indices]

    def largest(self, indices: np.ndarray) -> str:
        return "two numbers"

    def train(
        self, folder: Path, plan: CheckpointPlan | None = None, validator: Any = None
    ) -> dict[str, Any]:
        settings = LoopSettings(
            rows=8, global_batch=2, epochs=1, steps=STEPS, stop=STEPS, learning_rate=0.1,
            warmup_ratio=0.0, schedule="linear", max_grad_norm=0.0,
        )  # fmt: skip
        return optimize(
            self.model, make_optimizer(self.model, "adamw", 0.1), self, settings, seed=0,
            stage="toy", lower="nothing", begin={}, metrics_path=folder / "metrics.jsonl",
            checkpoints=plan, validator=validator,
        )  # fmt: skip


def test_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps to come take what those of this start took on average, checkpoints included."""
    clock = [100.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Slow(Toy):
        def accumulate(self, *given: Any) -> Tensor:
            clock[0] += 2.0 * (self.calls + 1)  # 2, 4, 6 and 8 seconds
            return super().accumulate(*given)

    task = Slow()
    assert task.train(tmp_path) == {"step": STEPS}
    assert [step.number for step in task.steps] == [1, 2, 3, 4]
    assert [step.seconds for step in task.steps] == [2.0, 4.0, 6.0, 8.0]
    assert [step.left for step in task.steps] == [2.0 * 3, 3.0 * 2, 4.0 * 1, 0.0]

    plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1)
    with pytest.raises(RuntimeError, match="planted"):
        Slow(fails=3).train(tmp_path, plan)
    task = Slow()
    task.train(tmp_path, plan)
    assert [(step.number, step.left) for step in task.steps] == [(3, 2.0), (4, 0.0)]


class Told(Toy):
    """Also finds the sum of a step's rows, is told of it, and has a record of every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, Any, float]] = []

    def accumulate(self, batch: Tensor, *given: Any) -> Tensor:
        return torch.cat([super().accumulate(batch, *given), batch.sum().double()[None]])

    def check(self, step: int, found: Any) -> None:
        self.told.append((step, found, self.model.weight.item()))

    def record(self, step: Step, state: Any) -> Any:
        super().record(step, state)
        return None if step.number % 2 else ({"global_step": step.number}, "told")


def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Rows in the order of seed and stage, each step's own rate, and what it found said before the
    weights are touched.
    """
    task, plain = Told(), Toy()
    task.train(tmp_path)
    optimizer = make_optimizer(plain.model, "adamw", 0.1)
    batches = list(global_batches(8, 2, 1, 0, "toy"))
    assert len(batches) == len(task.steps) == len(task.told) == STEPS
    for n, (epoch, indices) in enumerate(batches):
        rows, step, weight = plain.prepare(epoch, indices), task.steps[n], plain.model.weight.item()
        loss = plain.model(rows).square().mean()
        loss.backward()
        rate = 0.1 * (1 - n / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        grads = [p.grad.flatten() for p in plain.model.parameters() if p.grad is not None]
        norm = torch.cat(grads).norm().item()
        optimizer.zero_grad()
        assert (step.number, step.epoch) == (n + 1, 0)
        assert step.indices.tolist() == indices.tolist()
        found = [step.loss, step.grad_norm, step.learning_rate]
        assert found == pytest.approx([loss.item(), norm, rate], rel=1e-5)
        assert task.told[n][:2] == (n, [rows.sum().item()])
        assert task.told[n][2] == pytest.approx(weight, rel=1e-5)
    torch.testing.assert_close(task.model.weight, plain.model.weight)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [2, 4]


def test_a_step_that_is_refused_can_be_looked_at_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is made of what led to it, due or not; the rows are in a file until the next
    start tries them again, which says so.
    """
    said: list[str] = []
    monkeypatch.setattr(loop, "say", said.append)
    plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=None)
    task = Toy(spoils=3)
    with pytest.raises(NumericsError, match="^toy: step 3: loss nan, gradient norm [0-9]"):
        task.train(tmp_path, plan)
    assert [path.name for path in plan.folder.iterdir()] == ["step_00000002"]
    text = (tmp_path / loop.REFUSED).read_text()
    found = json.loads(text)
    assert (found["stage"], found["step"], found["loss"]) == ("toy", 3, "nan")
    assert len(found["rows"]) == 2
    assert np.isfinite(float(found["grad_norm"]))
    assert text == json.dumps(found, indent=1) + "\n"

    again = Toy()
    assert not said
    again.train(tmp_path, plan)
    assert said == ["toy: goes on at step 3 of 4"]
    assert [step.number for step in again.steps] == [3, 4]
    assert not (tmp_path / loop.REFUSED).exists()
    whole = Toy()
    whole.train(tmp_path / "whole")
    assert torch.equal(again.model.weight, whole.model.weight)


def test_a_cpu_looks_at_its_heap_after_each_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, bool]] = []
    monkeypatch.setattr(loop.Heap, "after_micro", lambda heap: given.append((id(heap), heap.kept)))
    Toy().train(tmp_path)
    assert len(given) == STEPS and len(set(given)) == 1 and given[0][1]


class Looks:
    """Stands in for a Validator: what it is asked, and whether that ends the training."""

    def __init__(self, ends: int = -1) -> None:
        self.ends, self.asked = ends, list[Any]()

    def check(self, state: Any) -> None:
        self.asked.append("check")

    def after_step(self, step: int, last: bool, state: Any) -> tuple[dict[str, Any], str] | None:
        self.asked.append((step, last))
        state.setdefault(loop.STATE, {})
        if step == self.ends:
            state["ended"] = True
        return None if step % 2 else ({"global_step": step, "looked": True}, "looked")


def steps_kept(plan: CheckpointPlan) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in plan.folder.glob("step_*"))


def test_what_a_validator_is_asked(tmp_path: Path) -> None:
    """Before the first step and after each, and again from where a loop goes on; what it finds is
    written down. Of the last step no checkpoint is made: the result is there.
    """
    plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1)
    looks = Looks()
    Toy().train(tmp_path, plan, looks)
    assert looks.asked == ["check", (0, False), (1, False), (2, False), (3, False), (4, True)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [0, 2, 4]
    assert steps_kept(plan) == [2, 3]

    looks = Looks()
    Toy().train(tmp_path, plan, looks)
    assert looks.asked == ["check", (4, True)]


def test_before_the_first_step_a_validator_is_asked_once(tmp_path: Path) -> None:
    """Not again where that step was refused, nor of weights that have been trained without."""
    refused = CheckpointPlan(tmp_path / "refused", minutes=None, steps=None)
    looks = Looks()
    with pytest.raises(NumericsError):
        Toy(spoils=1).train(tmp_path, refused, looks)
    assert looks.asked == ["check", (0, False)]
    looks = Looks()
    Toy().train(tmp_path, refused, looks)
    assert looks.asked == ["check", (1, False), (2, False), (3, False), (4, True)]

    without = CheckpointPlan(tmp_path / "without", minutes=None, steps=None)
    with pytest.raises(NumericsError):
        Toy(spoils=3).train(tmp_path, without)
    looks = Looks()
    Toy().train(tmp_path, without, looks)
    assert looks.asked == ["check", (3, False), (4, True)]


def test_a_validator_may_end_the_loop(tmp_path: Path) -> None:
    plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1)
    task, looks = Toy(), Looks(ends=3)
    state = task.train(tmp_path, plan, looks)
    assert len(task.steps) == 3 and looks.asked[-1] == (3, False)
    assert state["step"] == 3 and state["ended"] and steps_kept(plan) == [1, 2]


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (Toy, "accumulate", "step 1: two numbers"),
        (Optimizer, "step", "step 1: two numbers"),
        (Looks, "after_step", "validation after step 0"),
    ],
    ids=["gradient", "optimizer", "validation"],
)
def test_memory_that_does_not_suffice(
    owner: type, name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was for, then what to lower. The optimizer's averages are made in the first step."""

    def failing(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(OutOfMemory, match=f"^{where}: out of memory; nothing$"):
        Toy().train(tmp_path, validator=Looks())
