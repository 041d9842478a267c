"""The matrix's rows on the run folder: its date, what a refused command leaves, disk room."""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from faults import differing, outcome
from runs import ROOT
from toy_context import open_toy

from ldalign.data import tokenizer
from ldalign.data.records import json_lines
from ldalign.data.sources import find_files
from ldalign.data.tokenizer import load_tokenizer
from ldalign.models import toy, weights
from ldalign.run import disk, folder, manifest
from ldalign.run.folder import RunFolder
from ldalign.run.lock import lock
from ldalign.run.settings import RunConfig
from ldalign.run.stranger import read_object
from ldalign.system import distributed, sinks
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.untrusted import read_bytes
from ldalign.train import align, generate, sft
from ldalign.training import checkpoint

DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + toy.TEMPLATE
HELLO = [{"role": "user", "content": "Hello"}]
SetDay = Callable[[int, int, int], None]


def arguments(run: Path, *more: str) -> list[str]:
    """Few rows and short answers, by the model beside the run folder."""
    return [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={run}",
        f"cache={run.parent}",
        f"policy={run.parent}/model",
        "max_rows=4",
        "max_new_tokens=3",
        "sft.epochs=0",
        "evaluation.rows=0",
        "report=table",
        *more,
    ]


@pytest.fixture
def set_day(monkeypatch: pytest.MonkeyPatch) -> SetDay:
    """Sets the clock's date."""

    def set_to(*day: int) -> None:
        clock = type("Clock", (date,), {"today": staticmethod(lambda: date(*day))})
        for module in (folder, tokenizer):
            monkeypatch.setattr(module, "date", clock)

    return set_to


@pytest.fixture
def begun(tmp_path: Path, set_day: SetDay, in_process: None) -> Path:
    """A run folder with rows and responses, begun on 30 January 2026; its template writes dates."""
    model = toy.write_toy_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(DATED)
    set_day(2026, 1, 30)
    generate.main(arguments(tmp_path / "run"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    [
        "lock",
        "config.yaml.partial",
        "environment.json",
        "metrics.jsonl",
        "iteration_0",
        "guide.partial/metrics.jsonl",
        "report/live.html.partial",
    ],
)
def test_C3_a_run_folder_that_leads_out(name: str, tmp_path: Path) -> None:
    """Something in a run folder, which may be a stranger's, is a link out of it, or a pipe.

    Expected: one line with its name, before anything there is read or written.
    """
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.write_text("theirs")
    (run / name).parent.mkdir(parents=True)
    (run / "lock").touch()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    with (
        pytest.raises(InputError, match=rf"run/{name}: is a link out of the run folder"),
        RunFolder(run, "seed: 1\n"),
    ):
        pass
    assert outside.read_text() == "theirs" and not list(tmp_path.glob("run/*.json.partial"))
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(InputError, match="neither a file"), RunFolder(run, "seed: 1\n"):
        pass


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EIO])
@pytest.mark.parametrize(
    "read",
    [
        read_bytes,
        lambda path: load_config(RunConfig, path),
        lambda path: read_object(path, "delete it"),
        lambda path: find_files(str(path)),
        lambda path: list(json_lines(path)),
    ],
    ids=["model", "config", "run", "data", "rows"],
)
def test_T6_a_file_system_that_is_gone(
    read: Callable[[Path], Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is read lies on a file system that is stale, timed out or broken.

    Expected: exit 3, one line with the file.
    """
    path = tmp_path / "rows.json"
    path.write_text("{}")

    def gone(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "open", gone)
    with pytest.raises(EnvironmentProblem, match=f"rows.json: cannot be read: {os.strerror(code)}"):
        read(path)


def test_C3_a_damaged_summary(tmp_path: Path) -> None:
    """The summary of a finished stage is damaged, and another stage is made.

    Expected: one line with its name.
    """
    with RunFolder(tmp_path / "run", "seed: 1\n") as run:
        run.stage("sft/policy", {}, lambda folder: {"loss": 1.0})
        path = tmp_path / "run/sft/policy/summary.json"
        path.write_text(path.read_text()[:-5])
        with pytest.raises(InputError, match=r"sft/policy/summary\.json: damaged"):
            run.stage("sft/evaluation", {}, lambda folder: {"nll/real": 1.0})


def test_C3_files_of_any_size(tmp_path: Path) -> None:
    """Files of a run folder that have become holes of a terabyte.

    Expected: one line with the name of what is needed; what can be made again is, and none is read.
    """
    path, huge = tmp_path / "run", 10**12
    with RunFolder(path, "seed: 1\n") as run:
        run.stage("sft/policy", {}, lambda folder: {"loss": 1.0})
    whole = (path / "metrics.jsonl").read_bytes()
    os.truncate(path / "metrics.jsonl", huge)
    with RunFolder(path, "seed: 1\n") as run:
        run.stage("sft/policy", {}, lambda folder: {})
    assert (path / "metrics.jsonl").read_bytes() == whole
    (path / "guide.partial").mkdir()
    for name in ("guide.partial/parents.json", "guide.partial/rows"):
        (path / name).touch()
        os.truncate(path / name, huge)
    with (
        pytest.raises(InputError, match=r"guide\.partial/parents\.json: not readable; delete"),
        RunFolder(path, "seed: 1\n") as run,
    ):
        run.stage("guide", {}, lambda folder: {}, resume=True)
    os.truncate(path / "started.json", huge)
    with (
        pytest.raises(InputError, match=r"started\.json: not readable; write the day"),
        RunFolder(path, "seed: 1\n") as run,
    ):
        run.record()


def test_C3_a_stages_metrics_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's metrics.jsonl is larger than any that was written.

    Expected: one line with the file.
    """

    def make(place: Path) -> dict[str, float]:
        (place / "metrics.jsonl").write_text('{"step": 1}\n')
        return {}

    monkeypatch.setattr(folder, "MAX_METRICS", 5)
    with (
        pytest.raises(InputError, match=r"sft/policy/metrics\.jsonl: damaged: more than 5 bytes"),
        RunFolder(tmp_path / "run", "seed: 1\n") as run,
    ):
        run.stage("sft/policy", {}, make)


def state_of(run: Path) -> dict[str, tuple[int, bytes]]:
    """(time of change, content) of every file but the lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "lock"]
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files
    }


def test_T12_prompts_keep_the_day_the_run_began(
    begun: Path, set_day: SetDay, capfd: pytest.CaptureFixture[str]
) -> None:
    """A chat template writes today's date (strftime_now), and the run is
    gone on with on another day.

    Expected: the same prompts, nothing is made again; a new run has its own day. A lost or other
    date is refused.
    """
    assert json.loads((begun / "started.json").read_text()) == {"date": "2026-01-30"}
    manifest = json.loads((begun / "iteration_0/responses/manifest.json").read_text())
    assert manifest["parents"]["template's date"] == "2026-01-30"
    before = state_of(begun / "iteration_0"), state_of(begun / "data")
    set_day(2026, 2, 1)
    generate.main(arguments(begun))
    assert "iteration_0/responses: already done" in capfd.readouterr().err
    assert (state_of(begun / "iteration_0"), state_of(begun / "data")) == before
    for run, day in ((begun, "30 Jan 2026"), (begun.with_name("new"), "01 Feb 2026")):
        tokenizer = load_tokenizer(begun.parent / "model", today=RunFolder(run, "").began)
        assert f"Today is {day}." in tokenizer.render(HELLO)

    (begun / "started.json").write_text("{")
    with pytest.raises(InputError, match=r"started\.json: not readable; write the day"):
        generate.main(arguments(begun))
    (begun / "started.json").unlink()
    with pytest.raises(InputError, match="template's date was '2026-01-30', now '2026-02-01'"):
        generate.main(arguments(begun))
    assert not (begun / "started.json").exists()


def test_T12_answers_keep_the_day_they_were_begun(begun: Path, set_day: SetDay) -> None:
    """generate.py on a file of prompts, gone on with on another day.

    Expected: the same prompts, whether it was finished or cut short.
    """
    prompts, out = begun.with_name("prompts.jsonl"), begun.with_name("out")
    prompts.write_text('{"prompt": "Hello"}\n')
    options = arguments(begun, f"prompts={prompts}", f"output={out}")
    generate.main(options)
    before = state_of(out)
    set_day(2026, 2, 1)
    generate.main(options)
    assert state_of(out) == before and generate.began(out) == date(2026, 1, 30)
    parents = json.loads((out / "manifest.json").read_text())["parents"]
    partial = out.rename(out.with_name("out.partial"))
    (partial / "manifest.json").unlink()
    (partial / "parents.json").write_text(json.dumps(parents))
    assert generate.began(out) == date(2026, 1, 30)
    for wrong in (3, "then"):
        (partial / "parents.json").write_text(json.dumps({**parents, "template's date": wrong}))
        assert generate.began(out) is None


class FailingRun:
    """A run of a tracker's, which fails in one way at one place; elsewhere it counts records."""

    def __init__(self, at: str, way: Callable[[], None]) -> None:
        self.at, self.way, self.records = at, way, 0

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.records += 1
        self._fail("mid-run" if self.records == 2 else "")

    def finish(self) -> None:
        self._fail("end")

    def _fail(self, here: str) -> None:
        if here == self.at:
            self.way()


def refuse() -> None:
    raise ConnectionError("no route to host")


def hang() -> None:
    threading.Event().wait()


@pytest.mark.slow
def test_T12_a_sink_that_fails_or_hangs(
    tmp_path: Path,
    toy_cache: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A sink of the key `log` raises, or hangs, as it is opened, in a step, and as the run ends.

    Expected: one line says so; training goes on to the end, the command ends well, and the files
    are bit-identical.
    """
    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", module)

    def trained(name: str, at: str = "", way: Callable[[], None] = refuse) -> dict[str, Any]:
        def init(**_: object) -> FailingRun:
            if at == "init":
                way()
            return FailingRun(at, way)

        monkeypatch.setattr(module, "init", init, raising=False)
        more = ["sft.epochs=1", "sft.rows=16", "sft.global_batch=4", "policy=toy"]
        more += [f"cache={toy_cache}", "max_length=160", "log=[trackio]" if at else "log=[]"]
        sft.main(arguments(tmp_path / name, *more))
        return outcome(tmp_path / name)

    expected = trained("undisturbed")
    capfd.readouterr()
    for at in ("init", "mid-run", "end"):
        for way in (refuse, hang):
            monkeypatch.setattr(sinks, "FINISH_SECONDS", 0.1 if way is hang else 600.0)
            left = trained(f"{at}-{way.__name__}", at, way)
            assert differing(left, expected) == []
            said = capfd.readouterr().err
            (line,) = [s for s in said.splitlines() if s.startswith("WARNING: log=trackio: ")]
            assert ("no route to host" if way is refuse else "0.1 s") in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sampling.temperature=0.5", "sampling.temperature was 1.0, now 0.5"),
        ("seed=1", r"run/data: its rows were prepared otherwise, and used: seed was 0, now 1"),
        ("policy=nowhere", "nowhere': no such folder"),
        ("beta=0.2", "in use by"),
    ],
    ids=["settings", "data", "model", "lock"],
)
def test_C3_a_refused_command_changes_nothing(begun: Path, change: str, message: str) -> None:
    """A command with other settings, data or model than the run's, or while
    another process holds the lock.

    Expected: config.yaml and environment.json stay, like every other file.
    """
    before = state_of(begun)
    assert {"config.yaml", "environment.json"} <= before.keys()
    holder = lock(begun) if message == "in use by" else None
    with pytest.raises((InputError, EnvironmentProblem), match=message):
        generate.main(arguments(begun, change))
    assert state_of(begun) == before
    if holder:
        holder.close()
    generate.main(arguments(begun, "beta=0.2"))  # which no stage that is there depends on
    assert "beta: 0.2" in (begun / "config.yaml").read_text()


# --------------------------------------------------------------------------------------------- disk


def limit_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))


def test_T6_no_room_is_said_before_anything_is_made(
    tmp_path: Path, toy_cache: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has less room than the run needs.

    Expected: exit 3 before any weights are read: folder, bytes needed and free, what to lower. One
    byte more is enough.
    """

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "fill", no_weights)
    run = tmp_path / "run"
    argv = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={run}",
        f"cache={toy_cache}",
        "checkpoint.keep=4",
    ]
    limit_disk(monkeypatch, 1000)
    with pytest.raises(EnvironmentProblem) as caught:
        align.main(argv)
    assert caught.value.exit_code == 3
    lower = ("checkpoint.keep=4", "checkpoint.minutes=null", "policy_dtype=float32", "iterations=2")
    for part in (f"{run}: the run needs about ", " 1000 bytes are free", "run=NAME", *lower):
        assert part in str(caught.value)
    # The rows are prepared before: what they cost is known from them.
    assert [path.parent.name for path in run.rglob("manifest.json")] == ["data"]
    ctx = open_toy(toy_cache)
    names = align.planned(ctx.config)
    limit_disk(monkeypatch, 10**9)
    needed = disk.check_disk(ctx, names, run).needed
    limit_disk(monkeypatch, needed)
    assert disk.check_disk(ctx, names, run).needed == needed
    limit_disk(monkeypatch, needed - 1)
    with pytest.raises(
        EnvironmentProblem, match=f"about {needed} bytes of disk .*, {needed - 1} bytes are free"
    ):
        disk.check_disk(ctx, names, run)


def test_the_worst_moment_is_counted() -> None:
    assert disk.at_worst([]) == 0
    assert disk.at_worst([disk.Need(10, 10), disk.Need(5, 30), disk.Need(5, 20)]) == 40
    assert disk.at_worst([disk.Need(10, 10), disk.Need(5, 30), disk.Need(25, 26)]) == 41
    assert disk.at_worst([disk.Need(10, 40, there=30), disk.Need(25, 25)]) == 10
    assert disk.at_worst([disk.Need(1, 2, there=9)]) == 0


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ("checkpoint.minutes=null", 0),
        ("checkpoint.steps=3", 3),
        ("checkpoint.keep=9", 7),
        ("checkpoint.minutes=null checkpoint.steps=4", 1),
        ("checkpoint.minutes=null checkpoint.steps=8", 0),
    ],
)
def test_no_more_checkpoints_are_counted_than_can_be(keys: str, most: int, toy_cache: Path) -> None:
    """A stage of 8 steps counts the checkpoints kept and one more, none after the last step.

    By time, they may follow any step.
    """
    ctx = open_toy(toy_cache, *keys.split())
    assert disk._checkpoints(ctx, 8) == most and disk._checkpoints(ctx, 0) == 0


def test_what_is_there_is_not_needed(tmp_path: Path) -> None:
    ctx = open_toy(tmp_path, "checkpoint.minutes=null")
    names = ["sft/policy", "iteration_0/policy"]

    def needed() -> int:
        return disk.check_disk(ctx, names, tmp_path).needed

    whole = needed()
    partial = tmp_path / "run/sft/policy.partial"
    partial.mkdir(parents=True)
    (partial / "half.safetensors").write_bytes(bytes(5000))
    assert needed() == whole - 5000
    shutil.rmtree(partial)
    (tmp_path / "run/sft/policy").mkdir()
    (tmp_path / "run/sft/policy/manifest.json").touch()
    weights_of = weights.count_parameters(weights.check_model(ctx.start))
    # a policy in float32, with its tokenizer
    assert whole - needed() == pytest.approx(4 * weights_of, rel=0.1)


@pytest.fixture
def largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes in the run folder whenever a checkpoint or a stage is whole."""
    sizes = []

    def watch(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: object) -> object:
            sizes.append(
                sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
            )
            return function(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(checkpoint.Checkpoints, "_finish")
    watch(manifest, "_name")
    yield sizes


@pytest.mark.parametrize("options", ["checkpoint.steps=1", "checkpoint.minutes=null"])
def test_the_estimate_is_close(
    options: str, tmp_path: Path, toy_cache: Path, in_process: None, largest: list[int]
) -> None:
    """To what lies in the run folder at the worst moment of a small SFT: two checkpoints and a
    third, or none.
    """
    argv = [
        "sft.rows=16",
        "sft.global_batch=4",
        "sft.epochs=1",
        "evaluation.rows=0",
        "report=table",
        options,
    ]
    ctx = open_toy(toy_cache, *argv)
    estimated = disk.check_disk(ctx, ["sft/policy"], tmp_path).needed
    distributed.stop()
    sft.main(
        [
            "--config",
            str(ROOT / "configs/toy.yaml"),
            f"run={tmp_path / 'run'}",
            f"cache={toy_cache}",
            *argv,
        ]
    )
    assert estimated == pytest.approx(max(largest), rel=0.1)
