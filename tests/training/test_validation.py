"""Evaluation during training: what it measures, what it keeps, when it ends a stage, and that none
of it moves a bit of the training. Several ranks run this very file.
"""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runs import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.weights import LanguageModel
from ldalign.system import distributed, interrupt
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.interrupt import Stopped
from ldalign.system.metrics import MetricsLog
from ldalign.training.checkpoint import CheckpointPlan
from ldalign.training.policy import TrainSettings, train
from ldalign.training.validation import (
    ValidationPlan,
    Validator,
    best_weights,
    better,
    evaluations,
    steps_between,
)

CPU = torch.device("cpu")
# 6 rows in steps of 2, 4 times: 12 steps, that overfit.
SETTINGS = TrainSettings(
    epochs=4, global_batch=2, micro_tokens=45, learning_rate=3e-2, optimizer="adamw"
)
STEPS = 12
TIMES = {"tokens_per_second", "time/step", "memory/peak_gib"}


class Killed(BaseException):
    pass


def rows(count: int, seed: int) -> list[Pair]:
    """Responses of few tokens: which ones is learnt, and then these very rows by heart."""
    return [
        replace(pair, generated=None, real=[3 + token % 12 for token in pair.real])
        for pair in tiny.pairs(count, seed)
    ]


def plan(folder: Path, **changes: Any) -> ValidationPlan:
    base = ValidationPlan(rows(5, seed=9), every=2, keep=folder / "checkpoint")
    return replace(base, **changes)


def trained(
    folder: Path,
    validation: ValidationPlan | None,
    checkpoint_every: int | None = 1,
    **settings: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains tiny.mistral() by SFT: its last weights, on rank 0, and the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny.mistral()
    summary = train(
        model,
        rows(6, seed=1),
        replace(SETTINGS, **settings),
        compute_dtype=torch.float32,
        device=CPU,
        seed=0,
        stage="policy",
        metrics_path=folder / "metrics.jsonl",
        checkpoints=CheckpointPlan(folder / "checkpoint", minutes=None, steps=checkpoint_every),
        validation=validation,
    )
    return distributed.full_state(model, torch.float32), summary


def records(folder: Path, validation: bool) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of the one kind, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if ("validation/nll" in line) == validation]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in chosen]


def oracle(weights: dict[str, Tensor], chosen: list[Pair]) -> float:
    """Nats per response token in float64, row by row, with whole logits."""
    model = tiny.mistral()
    model.load_state_dict(weights)
    model.double()
    with torch.no_grad():
        total = sum(-tiny.logps(model, pair.prompt, pair.real).sum() for pair in chosen)
    return float(total) / sum(len(pair.real) for pair in chosen)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------ several ranks


def work(folder: Path) -> None:
    """What each of several ranks does: trains with validation, rank 0 keeps what came of it."""
    distributed.start("cpu")
    seen: list[float] = []

    def accuracy(model: LanguageModel) -> float:
        """A number of the whole copy that every rank gets, the same on all."""
        whole = distributed.whole_state(model, torch.float32)
        value = float(sum(p.double().sum() for p in whole.values()))
        assert distributed.on_all(lambda: value) == [value] * distributed.world_size()
        seen.append(value)
        return 0.0

    chosen = plan(folder, pairs=rows(2, seed=9), accuracy=accuracy)
    last, summary = trained(folder, chosen)
    if distributed.rank() == 0:
        save_file(last, folder / "last.safetensors")
        best = best_weights(chosen, summary)
        assert best is not None
        save_file(best, folder / "best.safetensors")
        (folder / "found.json").write_text(json.dumps([summary, seen]))
    distributed.barrier()
    distributed.stop()


def test_ranks_measure_and_keep_what_one_does(tmp_path: Path, in_process: None) -> None:
    """Two rows on three ranks: one of them has none."""
    work(tmp_path / "1")
    done = run_script(__file__, tmp_path / "3", ranks=3)
    assert done.returncode == 0, done.stderr
    (one, sums), (many, own) = (
        json.loads((tmp_path / n / "found.json").read_text()) for n in ("1", "3")
    )
    assert own == pytest.approx(sums, abs=1e-3) and len(own) == 7
    assert many["validation/step"] == one["validation/step"] < STEPS
    nll = [[r["validation/nll"] for r in records(tmp_path / n, True)] for n in ("1", "3")]
    assert nll[1] == pytest.approx(nll[0], abs=1e-4) and len(nll[0]) == 7
    best, last = (
        [load_file(tmp_path / n / f"{name}.safetensors") for n in ("1", "3")]
        for name in ("best", "last")
    )
    for a, b in (best, last):
        assert all((a[key] - b[key]).abs().max() < 1e-3 for key in b)
    assert not equal(last[1], best[1])


# ----------------------------------------------------------------------------------------- one rank


@pytest.fixture(autouse=True)
def one_rank(in_process: None) -> Iterator[None]:
    distributed.start("cpu")
    yield
    distributed.stop()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, ValidationPlan], None]:
    """Trains until just after the n-th line of metrics was written, and no further."""

    def until(folder: Path, lines: int, validation: ValidationPlan) -> None:
        write, count = MetricsLog.write, [0]

        def writing(log: MetricsLog, record: dict[str, Any], text: str) -> None:
            write(log, record, text)
            count[0] += 1
            if count[0] == lines:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, "write", writing)
            with pytest.raises(Killed):
                trained(folder, validation, checkpoint_every=2)

    return until


def test_it_measures_the_nll_of_the_weights_of_that_step(tmp_path: Path) -> None:
    trained(tmp_path / "run", plan(tmp_path / "run"))
    found = {r["global_step"]: r["validation/nll"] for r in records(tmp_path / "run", True)}
    assert list(found) == [0, 2, 4, 6, 8, 10, 12]
    begin = dict(tiny.mistral().named_parameters())
    assert found[0] == pytest.approx(oracle(begin, rows(5, seed=9)), rel=1e-5)
    for step in (4, 12):
        weights, _ = trained(tmp_path / str(step), None, max_steps=step)
        assert found[step] == pytest.approx(oracle(weights, rows(5, seed=9)), rel=1e-5)


def test_it_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    weights, summary = trained(tmp_path / "with", plan(tmp_path / "with"))
    expected, plain = trained(tmp_path / "without", None)
    assert equal(weights, expected)
    assert {k: v for k, v in summary.items() if not k.startswith("validation/")} == plain
    assert records(tmp_path / "with", False) == records(tmp_path / "without", False)


def test_the_best_weights_are_those_of_their_step(tmp_path: Path) -> None:
    chosen = plan(tmp_path / "run", dtype=torch.bfloat16)
    _, summary = trained(tmp_path / "run", chosen)
    found = {r["global_step"]: r["validation/nll"] for r in records(tmp_path / "run", True)}
    after = {step: nll for step, nll in found.items() if step}
    step = min(after, key=lambda s: after[s])
    assert 0 < step < STEPS and summary["validation/step"] == step
    assert summary["validation/nll"] == found[step]
    assert summary["validation/nll_start"] == found[0]
    assert summary["validation/nll_last"] == found[STEPS] > found[step]
    best = best_weights(chosen, summary)
    weights, _ = trained(tmp_path / "short", None, max_steps=step)
    assert best is not None and equal(best, {n: p.bfloat16() for n, p in weights.items()})


def test_the_last_are_wanted_or_are_the_best(tmp_path: Path) -> None:
    wanted = plan(tmp_path / "last", keep=None)
    _, summary = trained(tmp_path / "last", wanted)
    assert best_weights(wanted, summary) is None and summary["validation/step"] == STEPS
    assert summary["validation/nll"] == summary["validation/nll_last"]
    assert not list((tmp_path / "last").rglob("best_*"))
    # A slow training gains to its end.
    gains = plan(tmp_path / "gains")
    _, summary = trained(tmp_path / "gains", gains, learning_rate=1e-2)
    assert best_weights(gains, summary) is None and summary["validation/step"] == STEPS


def test_training_ends_where_it_has_stopped_to_gain(tmp_path: Path) -> None:
    chosen = plan(tmp_path / "run", early_stop=2)
    _, summary = trained(tmp_path / "run", chosen)
    steps = [r["global_step"] for r in records(tmp_path / "run", True)]
    ended = steps[-1]
    assert ended == summary["validation/step"] + 4 == summary["steps"] < STEPS
    assert summary["validation/ended_early"] == 1
    assert [r["global_step"] for r in records(tmp_path / "run", False)] == [*range(1, ended + 1)]
    # What is averaged is the epoch under way, 3 steps long.
    begun = (ended - 1) // 3 * 3
    losses = [r["loss"] for r in records(tmp_path / "run", False)[begun:]]
    assert summary["loss"] == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("values", "best", "ended"),
    [
        # A gain begins the count anew: the two at 12 and 14 end it, not those at 4 and 8.
        ([5.0, 3.0, 4.0, 2.0, 2.0, 1.0, 1.5, 1.0], 10, 14),
        ([1.0, 3.0, 4.0, 5.0], 2, 6),  # the start is no result, however good
        ([5.0, 4.0, 3.0, 2.0], 6, None),
    ],
)
def test_decisions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: list[float],
    best: int,
    ended: int | None,
) -> None:
    scripted = iter(values)
    monkeypatch.setattr(Validator, "_nll", lambda self: next(scripted))
    chosen = plan(tmp_path, early_stop=2)
    validator = Validator(chosen, tiny.mistral(), 100, 45, CPU, "policy")
    state: dict[str, Any] = {"step": 0}
    for step in range(0, 2 * len(values), 2):
        assert "ended" not in state
        shown = validator.after_step(step, False, state)
        assert shown is not None and validator.after_step(step + 1, False, state) is None
    found = validator.summary(state)
    assert found["validation/step"] == best and found["validation/nll_start"] == values[0]
    assert found["validation/nll"] == values[best // 2]
    assert found["validation/ended_early"] == (ended is not None)
    assert ended in (None, step)


@pytest.mark.parametrize("early_stop", [None, 2])
def test_a_killed_stage_decides_the_same_again(
    tmp_path: Path, killed: Callable[..., None], early_stop: int | None
) -> None:
    """Killed after each line of metrics (without early_stop: after some), a checkpoint every other
    step: both kinds of weights, metrics and summary have the bits of a run that nobody disturbed.
    """
    whole = plan(tmp_path / "whole", early_stop=early_stop)
    expected, summary = trained(tmp_path / "whole", whole, checkpoint_every=2)
    best = best_weights(whole, summary)
    assert best is not None
    lines = len((tmp_path / "whole/metrics.jsonl").read_text().splitlines())
    for line in range(1, lines + 1) if early_stop else (1, 7, lines - 1, lines):
        folder = tmp_path / f"killed_{line}"
        own = plan(folder, early_stop=early_stop)
        killed(folder, line, own)
        got, again = trained(folder, own, checkpoint_every=2)
        assert equal(got, expected) and again == summary, line
        kept = best_weights(own, again)
        assert kept is not None and equal(kept, best), line
        for kind in (False, True):
            assert records(folder, kind) == records(tmp_path / "whole", kind), line


def test_stopped_by_a_signal_where_it_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the evaluation that ends the stage: a checkpoint is written, and the stage that
    goes on from it is at its end.
    """
    whole = plan(tmp_path / "whole", early_stop=1)
    expected, summary = trained(tmp_path / "whole", whole)
    write = MetricsLog.write

    def stopping(log: MetricsLog, record: dict[str, Any], text: str) -> None:
        write(log, record, text)
        if record["global_step"] == summary["steps"] and "validation/nll" in record:
            patch.setattr(interrupt, "requested", lambda: signal.SIGTERM)

    own = plan(tmp_path / "run", early_stop=1)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stopping)
        with pytest.raises(Stopped):
            trained(tmp_path / "run", own)
    got, again = trained(tmp_path / "run", own)
    assert equal(got, expected) and again == summary
    assert records(tmp_path / "run", True) == records(tmp_path / "whole", True)


def test_what_a_checkpoint_refers_to_stays(tmp_path: Path, killed: Callable[..., None]) -> None:
    """The best weights of steps 2 and 4 are there where the two checkpoints kept know of these; the
    older go, and a file that is not the one that was written is refused.
    """
    folder = tmp_path / "run"
    killed(folder, 9, plan(folder))  # 0, 1, 2, 2, 3, 4, 4, 5, 6: before the evaluation of step 6
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert [n for n in names if n.startswith("step")] == ["step_00000002", "step_00000004"]
    kept = [n for n in names if n.startswith("best")]
    nll = {r["global_step"]: r["validation/nll"] for r in records(folder, True)}
    assert nll[4] < nll[2]  # so that each of the two has weights of its own
    assert kept == ["best_00000002.safetensors", "best_00000004.safetensors"]
    path = folder / "checkpoint" / kept[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"best_00000004.safetensors: missing or damaged"):
        trained(folder, plan(folder))
    path.unlink()
    with pytest.raises(InputError, match=r"best_00000004.safetensors: missing or damaged"):
        trained(folder, plan(folder))


def test_an_nll_that_is_not_finite_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldalign.training import validation

    monkeypatch.setattr(
        validation, "token_logprobs", lambda model, batch: torch.tensor([float("nan")])
    )
    with pytest.raises(NumericsError, match="policy: the NLL of the validation rows is nan"):
        trained(tmp_path, plan(tmp_path))


def test_right_answers_come_before_likelihood() -> None:
    a, b = {"step": 1, "nll": 2.0, "accuracy": 0.5}, {"step": 2, "nll": 1.0, "accuracy": 0.25}
    assert better(a, b) and not better(b, a) and better(a, None)
    tie = b | {"accuracy": 0.5}
    assert better(tie, a) and not better(a, tie) and not better(a, a)
    assert better({"step": 1, "nll": 1.0}, {"step": 2, "nll": 1.1})


def test_how_often() -> None:
    assert [steps_between(None, n) for n in (1, 3, 4, 5, 64)] == [1, 1, 1, 2, 16]
    assert steps_between(7, 64) == 7
    assert [evaluations(None, n) for n in (1, 3, 4, 5, 64)] == [2, 4, 5, 4, 5]
    assert evaluations(7, 64) == 11


if __name__ == "__main__":
    import sys

    work(Path(sys.argv[1]))
