"""Sinks: what they are given, and that none of them can stop or hold up a run."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ldalign.system import sinks
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.listeners import listening, tell
from ldalign.system.metrics import MetricsLog
from ldalign.system.sinks import Sink, check_sinks, finish_sinks, open_sinks

CONFIG = {"run": "runs/x", "beta": 0.1, "sampling": {"stop": []}}
POLICIES = [{"policy": "start", "nll/real": 2.0}, {"policy": "iteration_0", "nll/real": 1.5}]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, a sink that works gets everything."""
    for name in ("FINISH_SECONDS", "STOPPED_SECONDS"):
        monkeypatch.setattr(sinks, name, 600.0)


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def record(self, stage: str, step: int | None, values: Mapping[str, float]) -> None:
        self.given.append((stage, step, dict(values)))

    def report(self, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        self.given.append((text, list(policies)))

    def close(self, failed: bool) -> None:
        self.given.append(failed)


def work(*opened: Sink) -> None:
    """Two steps of a stage, its end, and a stage that was there before."""
    with listening(opened):
        log = MetricsLog(None, "iteration_0/policy")
        for step in (1, 2):
            log.write({"global_step": step, "loss": 0.5 / step, "note": "text"}, f"step {step}")
        tell(lambda listener: listener.ends("iteration_0/policy", {"steps": 2, "seconds": 1}, True))
        tell(lambda listener: listener.ends("data", {"rows/train": 7}, False))


def test_a_sink_gets_numbers_summaries_and_the_table() -> None:
    kept = Kept()
    sink = Sink("kept", lambda: kept)
    work(sink)
    finish_sinks([sink], False, "| table |", POLICIES)
    assert kept.given == [
        ("iteration_0/policy", 1, {"loss": 0.5}),
        ("iteration_0/policy", 2, {"loss": 0.25}),
        ("iteration_0/policy", None, {"steps": 2, "seconds": 1}),
        ("| table |", POLICIES),
        False,
    ]


def test_a_run_that_failed_has_no_table() -> None:
    kept = Kept()
    sink = Sink("kept", lambda: kept)
    finish_sinks([sink], True)
    assert kept.given == [True]


def fail(*_: object) -> None:
    raise RuntimeError("its own\nbug")


def leave(*_: object) -> None:
    raise SystemExit(3)


def hang(*_: object) -> None:
    threading.Event().wait()


@pytest.mark.parametrize("way", [fail, leave, hang])
@pytest.mark.parametrize("at", ["open", "record", "report", "close"])
def test_a_sink_that_fails_is_switched_off(
    at: str,
    way: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, whole = Kept(), Kept()
    setattr(kept, at, way)
    other = Sink("whole", lambda: whole)
    sink = Sink("odd", lambda: way() if at == "open" else kept)  # type: ignore[arg-type,return-value]
    work(sink, other)
    finish_sinks([other], False, "table", POLICIES)
    if way is hang:
        monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.05)
    finish_sinks([sink], False, "table", POLICIES)
    said = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(said) == 1 and said[0].startswith("WARNING: log=odd: ")
    assert {"fail": "its own bug", "leave": "SystemExit: 3", "hang": "0.05 s"}[
        way.__name__
    ] in said[0]
    assert len(whole.given) == 5


def test_a_sink_that_does_not_keep_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sinks, "AHEAD", 3)
    sink = Sink("slow", hang)  # type: ignore[arg-type]
    with listening([sink]):
        for step in range(10):
            MetricsLog(None, "guide").write({"global_step": step, "loss": 1.0}, "")
    assert capsys.readouterr().err.count("WARNING: log=slow: TimeoutError: 3 records wait") == 1


# ---------------------------------------------------------------------------------- the libraries


def test_all_are_waited_for_no_longer_than_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who stops a run gives it some seconds: three libraries that hang take them once."""
    clock, waited = [100.0], []

    def join(thread: threading.Thread, seconds: float) -> None:
        waited.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(sinks, "STOPPED_SECONDS", 5.0)
    ended = threading.Event()
    opened = [Sink(name, lambda: ended.wait() and Kept()) for name in "abc"]
    monkeypatch.setattr(sinks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threading.Thread, "join", join)
    finish_sinks(opened, True)
    monkeypatch.undo()
    ended.set()
    assert waited == [5.0, 0.0, 0.0]
    said = capsys.readouterr().err
    assert said.count("TimeoutError: it has not taken everything in 5 s") == 3


def test_a_folder_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `wandb`, which the library itself makes where a script is started."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(EnvironmentProblem, match="log: trackio is not installed; pip install"):
        check_sinks(["trackio"])


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="log: trackio is not installed; pip install 'tra"):
        check_sinks(["trackio"])
    check_sinks([])


class FakeRun:
    """The run object of wandb and of trackio, as far as it is used."""

    url = "https://example.org/run"

    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.logged, self.defined = given, list[Any](), list[Any]()
        self.summary: dict[str, Any] = {}
        self.ended: list[Any] = []

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self.logged.append((step, dict(values)))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def finish(self, **how: Any) -> None:
        self.ended.append(how)


def fake(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[ModuleType, list[FakeRun]]:
    """A library of that name, which is there for as long as the test; and its runs."""
    module, runs = ModuleType(name), list[FakeRun]()
    module.__spec__ = ModuleSpec(name, None)

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(given))
        return runs[-1]

    module.init = init  # type: ignore[attr-defined]
    module.teardown = lambda exit_code: runs[-1].ended.append(exit_code)  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    module.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return module, runs


def test_trackio_gets_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = fake(monkeypatch, "trackio")
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    check_sinks(["trackio"])
    (sink,) = open_sinks(["trackio"], tmp_path / "mine", CONFIG)
    work(sink)
    finish_sinks([sink], False, "table", POLICIES)
    (run,) = runs
    assert run.given == {"project": "ldalign", "name": "mine", "config": CONFIG}
    assert run.logged == [
        (1, {"iteration_0/policy/loss": 0.5}),
        (2, {"iteration_0/policy/loss": 0.25}),
        (0, {"stage/iteration_0/policy/steps": 2, "stage/iteration_0/policy/seconds": 1}),
        (0, {"report/start/nll/real": 2.0, "report/iteration_0/nll/real": 1.5}),
    ]
    assert run.ended == [{}]


def test_wandb_gets_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = fake(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    (sink,) = open_sinks(["wandb"], tmp_path / "mine", CONFIG)
    work(sink)
    finish_sinks([sink], False, "table", POLICIES)
    (run,) = runs
    assert run.given == {
        "project": "theirs",
        "name": "mine",
        "config": CONFIG,
        "dir": str(tmp_path / "mine"),
        "settings": {"console": "off", "silent": True},
    }
    axis = "iteration_0/policy/global_step"
    assert run.defined == [(axis, None), ("iteration_0/policy/*", axis)]
    assert run.logged == [
        (None, {axis: 1, "iteration_0/policy/loss": 0.5}),
        (None, {axis: 2, "iteration_0/policy/loss": 0.25}),
        (None, {"report": (["policy", "nll/real"], [["start", 2.0], ["iteration_0", 1.5]])}),
    ]
    assert run.summary == {"iteration_0/policy/steps": 2, "iteration_0/policy/seconds": 1}
    assert run.ended == [{"exit_code": 0}, 0]


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("new", [False, True], ids=["by api", "by login"])
def test_wandb_never_asks_for_a_key(
    new: bool,
    key: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, runs = fake(monkeypatch, "wandb")

    def old_login(key: str | None = None) -> bool:
        raise AssertionError("it asks at the terminal")

    def new_login(verify: bool = True, prompt: bool = True) -> bool:
        assert not prompt and not verify
        return key is not None

    module.login = new_login if new else old_login  # type: ignore[attr-defined]
    if not new:
        module.api = ModuleType("api")  # type: ignore[attr-defined]
        module.api.api_key = key
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (sink,) = open_sinks(["wandb"], tmp_path, CONFIG)
    finish_sinks([sink], False)
    assert len(runs) == (key is not None)
    assert ("set WANDB_API_KEY" in capsys.readouterr().err) == (key is None)


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra log)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "mine"
    run.mkdir()
    (sink,) = open_sinks(["wandb"], run, CONFIG)
    work(sink)
    finish_sinks([sink], False, "table", POLICIES)
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"iteration_0/policy/loss" in file.read_bytes()


def test_tensorboard_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra log)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(["tensorboard"], tmp_path, CONFIG)
    work(sink)
    finish_sinks([sink], False, "| table |", POLICIES)
    assert "WARNING" not in capsys.readouterr().err

    def read(folder: Path) -> Any:
        return EventAccumulator(str(folder)).Reload()

    stage = read(tmp_path / "tensorboard/iteration_0/policy")
    assert [(s.step, s.value) for s in stage.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [s.value for s in stage.Scalars("stage/steps")] == [2]
    whole = read(tmp_path / "tensorboard")
    (config,) = whole.Tensors("config/text_summary")
    assert b"beta: 0.1" in config.tensor_proto.string_val[0]
    (table,) = whole.Tensors("report/text_summary")
    assert table.tensor_proto.string_val[0] == b"| table |"
