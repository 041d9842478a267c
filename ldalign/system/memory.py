"""Memory: keeping what was freed on a CPU, what is still free, failures that name their place.

glibc returns every large block to the system and gets it back page by page; in a training step that
is a large share of the time. `keep_freed_memory` turns that off by mallopt(3); other C libraries
are left as they are.
"""

import contextlib
import ctypes
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ldalign.system.errors import EnvironmentProblem

log = logging.getLogger(__name__)
CONTROL_GROUP = Path("/sys/fs/cgroup")  # this process's own, as a container sees it
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


def is_out_of_memory(error: Exception) -> bool:
    """Says whether an allocation failed: on a GPU, in torch's CPU allocator, or in Python.

    The CPU allocator's error has no class of its own, and is known by its text.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be used of a GPU, or of this machine's memory.

    On a CPU the control group that limits the process (cgroup v2) counts, where there is one.
    """
    if device.type == "cuda":
        # what torch's allocator holds and nobody uses is free as well
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
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
