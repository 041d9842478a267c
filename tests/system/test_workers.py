"""Workers end with the process that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldalign.system.workers import available_cores, spread

ROOT = Path(__file__).parents[2]

# Two workers, each of which says who it is and then works for a minute.
PARENT = """
import sys
sys.path.insert(0, {tests!r})
from test_workers import long_task
from ldalign.system.workers import spread
list(spread(long_task, [{folder!r} + "/a", {folder!r} + "/b"], 2))
"""


def long_task(path: str) -> None:
    """Writes its process number, then goes on to write, as a worker does with a part."""
    Path(path).write_text(str(os.getpid()))
    for _ in range(600):
        time.sleep(0.1)
        Path(f"{path}.alive").touch()


def lives(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_for(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who lives")
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent_within_a_task(tmp_path, death):
    program = PARENT.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        files = [tmp_path / "a", tmp_path / "b"]
        assert wait_for(lambda: all(f.is_file() and f.read_text() for f in files))
        workers = [int(path.read_text()) for path in files]
        assert all(map(lives, workers))
        parent.send_signal(death)
        parent.wait()
        assert wait_for(lambda: not any(map(lives, workers)), 10)
        for path in files:
            Path(f"{path}.alive").unlink(missing_ok=True)
        time.sleep(0.3)
        assert not list(tmp_path.glob("*.alive"))
    finally:
        parent.kill()


def _slow(x: int) -> int:
    time.sleep(0.5)
    return x + 1


def test_workers_live_as_long_as_their_work():
    assert list(spread(_slow, range(4), 2)) == [1, 2, 3, 4] and available_cores() >= 1
