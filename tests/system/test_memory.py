"""What is kept of freed memory, and what is given back."""

import subprocess
import sys

import pytest
import torch

from ldalign.system.memory import asking_once, available_bytes

SCRIPT = """
import torch
from ldalign.system import memory

assert memory.keep_freed_memory()
memory.LEAST_HOLES = 64 * 2**20
large, small = [], []
for _ in range(40):  # a small block behind each large one keeps the heap as long as it is
    large.append(torch.ones(8 * 2**20, dtype=torch.uint8))
    small.append(torch.ones(2**16, dtype=torch.uint8))
held = memory.resident("RssAnon")
assert not memory.give_back_holes()  # all is in use
del large
kept = memory.resident("RssAnon")
assert kept > held - 16 * 2**20, (kept, held)
assert memory.give_back_holes()
left = memory.resident("RssAnon")
assert left < held - 250 * 2**20, (left, held)
assert not memory.give_back_holes()
assert all(bool(block.all()) for block in small)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_holes_are_given_back_once_they_are_most_of_the_heap() -> None:
    """320 MiB in blocks of 8 MiB are freed, and stay, until they are asked for."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_a_gpus_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's allocator takes of the driver changes nothing, what it has in use does; a step
    later all is asked again.
    """
    gpu, have = torch.device("cuda", 0), {"free": 70, "reserved": 10, "allocated": 4}
    asked = []

    def driver(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return have["free"], 80

    monkeypatch.setattr(torch.cuda, "mem_get_info", driver)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: have["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: have["allocated"])
    assert available_bytes(gpu) == available_bytes(gpu) == 76 and len(asked) == 2
    with asking_once():
        assert available_bytes(gpu) == 76
        have |= {"free": 50, "reserved": 30, "allocated": 29}
        assert available_bytes(gpu) == 51 and len(asked) == 3
    have["free"] = 20  # another process has come
    with asking_once():
        assert available_bytes(gpu) == 21 and len(asked) == 4
