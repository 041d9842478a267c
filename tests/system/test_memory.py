"""What is kept of freed memory, and what is given back."""

import mmap
import subprocess
import sys

import pytest
import torch

from ldalign.system import memory
from ldalign.system.memory import asking_once, available_bytes

SCRIPT = """
import torch
from ldalign.system import memory

assert memory.keep_freed_memory()
memory.LEAST_HOLES = 64 * 2**20
heap, MiB = memory.Heap(torch.device("cpu")), 2**20
small = []


def micro(blocks):  # a small block behind each large one keeps the heap as long as it is
    large = []
    for _ in range(blocks):
        large.append(torch.ones(8 * MiB, dtype=torch.uint8))
        small.append(torch.ones(2**16, dtype=torch.uint8))


micro(10)
assert not heap.after_micro()  # what the first one takes is needed
needed = heap.needed
micro(60)
held = memory.resident("RssAnon")
assert held > needed + 350 * MiB, (held, needed)
assert heap.after_micro()
left = memory.resident("RssAnon")
assert left < held - 400 * MiB, (left, held)
assert heap.needed == needed
micro(60)
assert not heap.after_micro()  # it began without holes: so much is needed
assert heap.needed > needed + 350 * MiB
assert all(bool(block.all()) for block in small)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_holes_are_given_back() -> None:
    """480 MiB in blocks of 8 MiB are freed, and stay, until the micro-batch is over."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


def test_when_a_heap_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """GiB that are resident after a micro-batch, and that the machine has left."""
    gib, now = 2**30, {"held": 0.0, "free": 100.0}
    monkeypatch.setattr(memory, "resident", lambda name: int(now["held"] * gib))
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(now["free"] * gib))
    heap = memory.Heap(torch.device("cpu"))

    def after(held: float, free: float = 100) -> bool:
        now.update(held=held, free=free)
        return heap.after_micro()

    assert [after(held) for held in (8.0, 8.8, 8.9, 9.0)] == [False, False, False, True]
    assert [after(held) for held in (8.8, 9.6, 9.8, 9.95)] == [False, False, False, True]
    # Where the machine has less left than the holes take, earlier; but never for less than 1/2 GiB.
    assert [after(8.8, 0.1), after(9.2, 0.1), after(9.4, 0.7), after(9.4, 0.5)] == [
        *(False, False, False, True)
    ]
    assert heap.needed == int(8.8 * gib)
    # A micro-batch that needs little does not make those after it look large.
    assert [after(held) for held in (1.0, 8.8, 9.8)] == [False, False, False]
    heap = memory.Heap(torch.device("cpu"))
    assert [after(held) for held in (0.5, 0.9, 1.0)] == [False, False, True]
    assert not any(memory.Heap(torch.device("cuda")).after_micro() for _ in range(3))


def test_tensors_in_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not overlap, whatever their sizes, and outlive what made them."""
    monkeypatch.setattr(memory.LargePages, "block_bytes", 2**21)
    pages = memory.LargePages()
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        *(((3, 5), torch.bfloat16), ((7,), torch.float32), ((2**20,), torch.bfloat16)),
        *(((0, 4), torch.int8), ((1000, 1000, 3), torch.int8), ((64,), torch.int8)),
    ]
    made = [pages.empty(*shape, dtype=dtype) for shape, dtype in shapes]
    del pages
    for number, tensor in enumerate(made):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(made, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert bool((tensor == number).all()) and tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("kernel", ["not Linux", "no large pages"])
def test_without_large_pages_they_are_tensors_all_the_same(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "mmap", Other(kernel))
    made = memory.LargePages().empty(3, 4, dtype=torch.float32)
    assert made.shape == (3, 4) and bool((made.fill_(2) == 2).all())


def test_more_than_there_can_be_is_memory_that_does_not_suffice() -> None:
    with pytest.raises(MemoryError, match="^[0-9]+ bytes: "):
        memory.LargePages().empty(2**60, dtype=torch.uint8)


class Other:
    """The module `mmap` of another system."""

    MAP_PRIVATE, MAP_ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS

    def __init__(self, kernel: str) -> None:
        if kernel == "no large pages":
            self.MADV_HUGEPAGE = -1  # which every kernel refuses

    def mmap(self, *args: int, **options: int) -> mmap.mmap:
        assert hasattr(self, "MADV_HUGEPAGE")
        return mmap.mmap(*args, **options)


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
