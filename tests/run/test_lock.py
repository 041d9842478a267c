"""Who has a run folder, where the file system has no locks: the claim file."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from ldalign.run import folder
from ldalign.run import lock as module
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import hold
from ldalign.run.folder import RunFolder
from ldalign.run.lock import lock
from ldalign.system import distributed
from ldalign.system.errors import EnvironmentProblem


@pytest.fixture(autouse=True)
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)


def left_over(folder: Path, process: int, start: str) -> None:
    (folder / "claim").write_text(
        f"{module._name()} start {start}\n0\n".replace(f"pid {os.getpid()}", f"pid {process}")
    )


def test_a_number_that_another_process_has_now(tmp_path: Path) -> None:
    """The number of a dead process is this one's now: its claim is left over all the same."""
    left_over(tmp_path, os.getpid(), "1")
    with lock(tmp_path) as held, pytest.raises(EnvironmentProblem, match="in use by host"):
        assert held.sign() == (tmp_path / "lock").read_text()
        lock(tmp_path)
    assert not (tmp_path / "claim").exists()


def test_of_many_that_take_over_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have seen that the claim is left over before the first takes it."""
    left_over(tmp_path, os.getpid(), "1")
    count = 8
    together, seen = threading.Barrier(count), threading.local()
    plain = module._Claim._take_over

    def take_over(claim: module._Claim) -> None:
        together.wait()
        plain(claim)

    monkeypatch.setattr(module._Claim, "_take_over", take_over)
    held: list[module.Lock] = []

    def enter() -> None:
        try:
            held.append(lock(tmp_path))
        except EnvironmentProblem:
            seen.refused = True

    threads = [threading.Thread(target=enter) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].close()


@pytest.mark.parametrize("text", ["", "host", "\xff", "host a b pid 1 start 1\n"])
def test_a_claim_that_says_nothing_is_anothers(text: str, tmp_path: Path) -> None:
    (tmp_path / "claim").write_text(text, encoding="latin-1")
    with pytest.raises(EnvironmentProblem, match=r"claim: .* delete this file"):
        lock(tmp_path)
    assert (tmp_path / "claim").read_text(encoding="latin-1") == text


def test_a_claim_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with lock(tmp_path):
        os.utime(tmp_path / "claim", (1, 1))
        while (tmp_path / "claim").stat().st_mtime < 2:
            time.sleep(0.01)


@pytest.mark.parametrize("what", ["folder", "seeds"])
def test_who_is_refused_lets_go(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that other hosts do not see; two seeds, of which another has the second."""
    if what == "folder":
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "on_all", lambda work: pytest.fail("not shared"))
        monkeypatch.setattr(folder, "on_rank0", lambda work: work())
        with pytest.raises(pytest.fail.Exception), RunFolder(tmp_path / "run", ""):
            pass
    else:
        config = CompareConfig(run=str(tmp_path / "run"))
        with hold(config, [1]), pytest.raises(EnvironmentProblem, match="seed_1/claim"):
            hold(config, [0, 1])
    assert not list(tmp_path.rglob("claim"))


def test_somebody_elses_claim_is_not_deleted(tmp_path: Path) -> None:
    """A person deleted ours, and another host has claimed the folder since."""
    with lock(tmp_path):
        (tmp_path / "claim").write_text("host elsewhere pid 1 start 1\n")
    assert (tmp_path / "claim").exists()
