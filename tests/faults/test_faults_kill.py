"""Whole runs, killed, stopped and denied writes: the same command leaves the same in the end.

Named by the rows of the fault matrix (docs/reliability.md). All on the small run of faults.py:
every stage, two iterations, a checkpoint after every step. "The same" is every file of the run
folder to the bit, but for times.
"""

import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import durable
import pytest
from faults import Driver, Trial, differing, outcome

Undisturbed = Callable[[int], tuple[dict[str, Any], int]]
POLICY = "iteration_1/policy"
# of the tests at every write point, so that several processes share them, and a part can be had
# alone
PARTS = 16


@pytest.fixture
def run(driver: Driver, toy_cache: Path, tmp_path: Path) -> Callable[..., Trial]:
    """One trial on `tmp_path / "run"`, or on another folder."""

    def trial(*arguments: str, folder: Path = tmp_path / "run", **fault: Any) -> Trial:
        return driver.run(folder, f"cache={toy_cache}", *arguments, **fault)

    return trial


def finish(
    run: Callable[..., Trial], folder: Path, expected: dict[str, Any], ranks: int = 1
) -> str:
    """Runs the same command again, to its end, and compares; returns what it said.

    The result must be the undisturbed one.
    """
    trial = run(folder=folder, ranks=ranks)
    assert trial.codes == [0] * ranks, trial.said
    assert differing(outcome(folder), expected) == []
    return trial.said


def spread(count: int, points: int) -> list[int]:
    """`count` of the write points, evenly."""
    return sorted({round((i + 0.5) * points / count) for i in range(count)})


# ----------------------------------------------------------------------------------------------- T1


def kill_until_done(
    run: Callable[..., Trial], folder: Path, kills: int, seed: int, ranks: int = 1
) -> int:
    """Starts the run, kills it after a random time, starts it again, ...; at most `kills` times."""
    draw, killed = random.Random(seed), 0
    while killed < kills:
        seconds = draw.uniform(0.3, 2.5)
        trial = run(
            folder=folder,
            ranks=ranks,
            signal=signal.SIGKILL,
            after=seconds,
            on_line="training rows",
        )
        if trial.codes == [0] * ranks:
            break
        assert -signal.SIGKILL in trial.codes, trial.said
        killed += 1
    return killed


def test_T1_sigkill_at_random_moments(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGKILL at 3 random moments of a whole run, which is started again after each.

    Expected: files bit-identical to an undisturbed run's.
    """
    assert kill_until_done(run, tmp_path / "run", 3, seed=1)
    finish(run, tmp_path / "run", undisturbed(1)[0])


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_T1_sigkill_at_random_moments_long(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, ranks: int
) -> None:
    """SIGKILL at 100 (1 rank), 20 (2 and 4 ranks) random moments of whole runs.

    Expected: files bit-identical to an undisturbed run's of as many ranks.
    """
    left, number = 100 if ranks == 1 else 20, 0
    while left > 0:
        folder = tmp_path / f"run_{number}"
        left -= kill_until_done(run, folder, min(left, 10), seed=number, ranks=ranks)
        finish(run, folder, undisturbed(ranks)[0], ranks)
        number += 1


# ----------------------------------------------------------------------------------------------- T2


def killed_at(
    run: Callable[..., Trial],
    folder: Path,
    point: int,
    mode: str,
    expected: dict[str, Any],
    ranks: int = 1,
) -> None:
    trial = run(folder=folder, ranks=ranks, at=point, mode=mode)
    assert trial.codes[0] == -signal.SIGKILL, trial.said
    named = [
        p.parent
        for p in folder.rglob("summary.json")
        if ".partial" not in str(p.relative_to(folder))
    ]
    assert all((stage / "manifest.json").is_file() for stage in named)
    finish(run, folder, expected, ranks)
    shutil.rmtree(folder)


def test_T2_sigkill_at_write_points(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGKILL right before one write, sync or rename, and in the middle of
    another, far apart in the run.

    Expected: no half folder is used; files bit-identical after the same command.
    """
    expected, points = undisturbed(1)
    assert points > 300
    for number, point in enumerate(spread(2, points)):
        killed_at(run, tmp_path / "run", point, ("kill", "torn")[number % 2], expected)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("mode", ["kill", "torn"])
def test_T2_sigkill_at_every_write_point(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, mode: str, part: int
) -> None:
    """SIGKILL right before, or in the middle of, every write, sync, rename and deletion of the run.

    Expected: no half folder is used; files bit-identical after the same command.
    """
    expected, points = undisturbed(1)
    for point in range(part, points, PARTS):
        killed_at(run, tmp_path / "run", point, mode, expected)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["kill", "torn", "full", "broken"])
def test_T2_writes_of_another_rank(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, mode: str
) -> None:
    """2 ranks; rank 1 is killed right before, or in the middle of, each of its
    writes, or is denied it.

    Expected: both end within 60 s (denied: exit 3, path named); files
    bit-identical after the same command.
    """
    expected = undisturbed(2)[0]
    points = run(ranks=2, rank=1).points[1]
    shutil.rmtree(tmp_path / "run")
    assert points > 20
    for point in range(points):
        trial = run(ranks=2, rank=1, at=point, mode=mode)
        if mode in ("kill", "torn"):
            assert trial.codes == [3, -signal.SIGKILL], trial.said
        elif trial.codes != [0, 0]:  # deleting need not succeed
            assert trial.codes == [3, 3] and "cannot be written" in trial.said, trial.said
        finish(run, tmp_path / "run", expected, ranks=2)
        shutil.rmtree(tmp_path / "run")


# ----------------------------------------------------------------------------------------------- T3


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_T3_stopped_in_training(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, number: int, code: int
) -> None:
    """SIGTERM, SIGHUP, and Ctrl-C, in the alignment stage, with no checkpoint due.

    Expected: the step is finished, a checkpoint written, exit 143, 129 and 130; files bit-identical
    after the same command.
    """
    trial = run("checkpoint.steps=null", signal=number, on_line=f"{POLICY}: step 1/")
    assert trial.codes == [code], trial.said
    assert re.search(
        r"ldalign: error: stopped by SIG\w+; step 1 is kept in .*/checkpoint; run "
        r"the same",
        trial.said,
    )
    kept = tmp_path / f"run/{POLICY}.partial/checkpoint"
    assert [path.name for path in kept.glob("step_*")] == ["step_00000001"]
    said = finish(run, tmp_path / "run", undisturbed(1)[0])
    assert f"{POLICY}: step 1/" not in said and f"{POLICY}: step 2/" in said


def test_T3_stopped_elsewhere(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGTERM between two stages that train, on both of two ranks.

    Expected: exit 143 at once, files bit-identical after the same command.
    """
    trial = run(signal=signal.SIGTERM, on_line="sft/policy: done", ranks=2)
    assert trial.codes == [143, 143], trial.said
    finish(run, tmp_path / "run", undisturbed(2)[0], ranks=2)


def stopped_at(
    run: Callable[..., Trial], folder: Path, point: int, expected: dict[str, Any]
) -> None:
    trial = run("checkpoint.steps=null", folder=folder, at=point, mode="stop")
    assert trial.codes == [143], trial.said
    finish(run, folder, expected)
    shutil.rmtree(folder)


def test_T3_stopped_at_write_points(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGTERM at 2 writes of the run's first half.

    Expected: exit 143, files bit-identical after the same command.
    """
    expected, points = undisturbed(1)
    for point in spread(2, points // 3):  # fewer writes: no checkpoint is due
        stopped_at(run, tmp_path / "run", point, expected)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_T3_stopped_at_every_write_point(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, part: int
) -> None:
    """SIGTERM at every write of a run in which no checkpoint is due.

    Expected: exit 143, files bit-identical after the same command.
    """
    expected = undisturbed(1)[0]
    trial = run("checkpoint.steps=null")
    shutil.rmtree(tmp_path / "run")
    for point in range(part, trial.points[0], PARTS):
        stopped_at(run, tmp_path / "run", point, expected)


# ----------------------------------------------------------------------------------------------- T4


def test_T4_one_rank_killed(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGKILL of rank 1 of 2 in the alignment stage.

    Expected: rank 0 ends by itself within 60 s, with a line that names rank 1; files bit-identical
    after the same command.
    """
    trial = run(ranks=2, signal=signal.SIGKILL, rank=1, on_line=f"{POLICY}: step 1/")
    assert trial.codes == [3, -signal.SIGKILL], trial.said
    assert "ldalign: error: rank 0: rank 1 ended" in trial.said
    finish(run, tmp_path / "run", undisturbed(2)[0], ranks=2)


# ----------------------------------------------------------------------------------------------- T6


def denied_at(
    run: Callable[..., Trial], folder: Path, point: int, mode: str, expected: dict[str, Any]
) -> None:
    trial = run(folder=folder, at=point, mode=mode)
    if trial.codes != [0]:  # deleting an old checkpoint, say, need not succeed
        assert trial.codes == [3], trial.said
        (line,) = re.findall("^ldalign: error: .*", trial.said, flags=re.MULTILINE)
        assert "cannot be written" in line and str(folder) in line, line
        assert mode == "broken" or "bytes free" in line, line
    finish(run, folder, expected)
    shutil.rmtree(folder)


def test_T6_no_write_possible(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """ENOSPC from one write on, and EIO at one write, at one place of the run each.

    Expected: exit 3, path and bytes named; the last good state kept: files
    bit-identical after the same command.
    """
    expected, points = undisturbed(1)
    for number, point in enumerate(spread(2, points)):
        denied_at(run, tmp_path / "run", point, ("full", "broken")[number % 2], expected)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("mode", ["full", "broken"])
def test_T6_no_write_possible_anywhere(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path, mode: str, part: int
) -> None:
    """ENOSPC from every write on, and EIO at every write.

    Expected: exit 3, path and bytes named; the last good state kept: files
    bit-identical after the same command.
    """
    expected, points = undisturbed(1)
    for point in range(part, points, PARTS):
        denied_at(run, tmp_path / "run", point, mode, expected)


# ----------------------------------------------------------------------------------------- T11, T12


def stopped_after(
    run: Callable[..., Trial], folder: Path, stage: str, expected: dict[str, Any]
) -> None:
    trial = run(folder=folder, signal=signal.SIGKILL, on_line=f"{stage}: done")
    assert trial.codes == [-signal.SIGKILL], trial.said
    assert f"{stage}: already done" in finish(run, folder, expected)
    shutil.rmtree(folder)


def test_T11_stopped_at_a_stage_border(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGKILL right after a stage of iteration 1 was done.

    Expected: finished stages are not redone; files bit-identical after the same command.
    """
    stopped_after(run, tmp_path / "run", "iteration_1/reference", undisturbed(1)[0])


@pytest.mark.long
def test_T11_stopped_at_every_stage_border(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """SIGKILL right after every stage.

    Expected: finished stages are not redone; files bit-identical after the same command.
    """
    expected = undisturbed(1)[0]
    for stage in sorted(
        name.removesuffix("/manifest.json") for name in expected if name.endswith("/manifest.json")
    ):
        stopped_after(run, tmp_path / "run", stage, expected)


def test_T12_moved_and_the_clock_set_back(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """A run killed in training is moved to another folder, its files dated 2033, the lock by
    another host. Then the clock is set back by ten years.

    Expected: it is gone on with; files bit-identical.
    """
    trial = run(signal=signal.SIGKILL, on_line=f"{POLICY}: step 2/")
    assert trial.codes == [-signal.SIGKILL], trial.said
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "moved"))
    (moved / "lock").write_text("host elsewhere pid 1\n")
    for path in moved.rglob("*"):
        os.utime(path, (2_000_000_000, 2_000_000_000))
    trial = run(folder=moved, clock=-315_000_000)
    assert trial.codes == [0], trial.said
    assert f"{POLICY}: step 1/" not in trial.said
    assert differing(outcome(moved), undisturbed(1)[0]) == []


def test_T12_nobody_reads_what_is_said(
    run: Callable[..., Trial], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Metrics go to a file and to the terminal: the latter, a pipe here, has
    gone before the run begins.

    Expected: training goes on to the end, exit 0; files bit-identical.
    """
    assert run(unread=True).codes == [0]
    assert differing(outcome(tmp_path / "run"), undisturbed(1)[0]) == []


# ---------------------------------------------------------------------------------------------- T22


def test_T22_synced_before_it_is_named(run: Callable[..., Trial], tmp_path: Path) -> None:
    """Every write, sync and rename of a whole run is written down, in order.

    Expected: what a rename gives its name was synced before, files, then folders, and the name is
    after; nothing is written in place but the lock, and figures, which each start makes anew.
    """
    trial = run(list=str(tmp_path / "list"))
    assert trial.codes == [0], trial.said
    seen = durable.events(tmp_path / "list")
    assert sum(what == "sync" for what, _, _ in seen) > 100 < len(seen)
    assert durable.faults(seen) == []
    written = {str(Path(path).relative_to(tmp_path / "run")) for path in durable.in_place(seen)}
    assert {name for name in written if not name.startswith("report/figures/")} == {"lock"}
