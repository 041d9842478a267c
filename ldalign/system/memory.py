"""Memory: keeping what was freed on a CPU, what is still free, failures that name their place.

glibc returns every large block to the system and gets it back page by page; in a training step that
is a large share of the time. `keep_freed_memory` turns that off by mallopt(3); other C libraries
are left as they are. A heap that is kept so grows holes between blocks of many sizes, and with them
the process: `Heap` gives them back, between steps.
"""

import contextlib
import ctypes
import logging
import math
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldalign.system.errors import EnvironmentProblem

log = logging.getLogger(__name__)
CONTROL_GROUP = Path("/sys/fs/cgroup")  # this process's own, as a container sees it
# What torch's CPU allocator, CUDA itself, its libraries and Triton say.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL
)
LEAST_HOLES = 2**29  # bytes: less is not worth getting the pages anew
_reached: dict[torch.device, int] | None = None  # within `asking_once`, what was answered
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


class OutOfMemory(EnvironmentProblem):
    """Memory did not suffice: `naming` says for what, and what to lower."""


def keep_freed_memory() -> bool:
    """Tells glibc to serve large blocks from one heap and keep it; returns whether it did."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        log.info("memory: no glibc mallopt here; large blocks go back to the system when freed")
        return False
    # One arena: autograd's backward runs in a thread of its own, which would get a heap of its own.
    options = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    worked = [mallopt(option, value) == 1 for option, value in options.items()]
    return all(worked)  # after all of them were tried


class Heap:
    """The heap of a training loop on a CPU: what it grows in holes is given back, not too often.

    A micro-batch's activations are freed by its end and taken again by the next one, which is
    slower where their pages went back to the system meanwhile. So what a micro-batch takes that
    begins without holes counts as needed, and only what lies above it as holes: they are what the
    others' activations, of other sizes, could not be put into.
    """

    def __init__(self, device: torch.device) -> None:
        self.kept = device.type == "cpu"
        self.needed = 0  # bytes: the most that such a micro-batch has left resident
        self.packed = True  # this micro-batch began without holes

    def after_micro(self) -> bool:
        """Returns freed memory to the system where holes take LEAST_HOLES, and either an eighth of
        what is needed or more than the machine has left; says whether it did.
        """
        if not self.kept:
            return False
        held = resident("RssAnon") or 0
        if self.packed:
            self.needed = max(self.needed, held)
        holes = held - self.needed
        self.packed = holes >= LEAST_HOLES and (
            holes >= self.needed / 8 or holes > available_bytes(torch.device("cpu"))
        )
        if self.packed:
            try:
                ctypes.CDLL(None).malloc_trim(0)
            except (AttributeError, OSError):  # not glibc
                self.packed = self.kept = False
        return self.packed


class LargePages:
    """Memory for tensors that are kept and read often: in pages of 2 MiB where Linux has them.

    Of weights that are read once a token from end to end, looking up pages of 4 KiB takes time that
    can be seen. It is given back when the last tensor in a block of it is gone.
    """

    block_bytes = 2**26

    def __init__(self) -> None:
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns a new tensor of any values, at a multiple of 64 bytes. Raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._block):
            self._block, self._used = self._map(max(size, self.block_bytes)), 0
        found = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // 64) * 64
        return found

    @staticmethod
    def _map(size: int) -> Tensor:
        if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
            return torch.empty(size, dtype=torch.uint8)
        # A mapping of its own: nothing has had its pages before, small ones. What is never written
        # to takes no memory.
        try:
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size} bytes: {error}") from error
        with contextlib.suppress(OSError):  # a kernel without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(block, dtype=torch.uint8)


def resident(name: str) -> int | None:
    """Returns a line of Linux's /proc/self/status in bytes: RssAnon, VmRSS, VmHWM (the peak), ...

    None where there is no such line.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Says whether an allocation failed: on a GPU, in torch's CPU allocator, or in Python.

    Some errors have no class of their own, and are known by their text. One inside the capture of a
    CUDA graph is hidden by the capture's own, which it has broken.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, OutOfMemory):
        return False
    if any(text in str(error) for text in OUT_OF_MEMORY):
        return True
    inner = error.__context__
    return "captur" in str(error) and isinstance(inner, Exception) and is_out_of_memory(inner)


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be used of a GPU, or of this machine's memory.

    On a CPU the control group that limits the process (cgroup v2) counts, where there is one.
    """
    if device.type == "cuda":
        return _reach(device) - torch.cuda.memory_allocated(device)
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text("ascii"))
    free = int(found[1]) * 1024 if found else 0
    try:
        most = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # given up when it is needed
        free = min(free, most - used + cached)
    except (OSError, ValueError, KeyError):  # no such group, or "max": no limit
        pass
    return free


def _reach(device: torch.device) -> int:
    """The bytes of a GPU that torch's allocator has, or can get of the driver."""
    if _reached is not None and device in _reached:
        return _reached[device]
    reach = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if _reached is not None:
        _reached[device] = reach
    return reach


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Within it `available_bytes` asks a GPU's driver once.

    What the driver gives to torch's allocator meanwhile does not change the sum of both, and what
    that has in use is asked each time: it grows within a step, by gradients.
    """
    global _reached
    _reached = {}
    try:
        yield
    finally:
        _reached = None


@contextlib.contextmanager
def naming(what: Callable[[], str], lower: str) -> Iterator[None]:
    """Turns a failed allocation within it into OutOfMemory: `what()` for what, `lower` what to do.

    Where one was named further in, `what()` goes in front: "STAGE: STEP: out of memory; lower ...".
    """
    try:
        yield
    except OutOfMemory as error:
        raise OutOfMemory(f"{what()}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what()}: out of memory; {lower}") from error
