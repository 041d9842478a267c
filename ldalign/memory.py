"""Memory of a CPU process: keep what was freed, so that the next step does not fault it in again.

glibc returns every large block to the system and gets it back page by page; in a training step that is a large share
of the time. Settings of mallopt(3); other C libraries are left as they are.
"""

import ctypes
import logging

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tells glibc to serve large blocks from one heap and never to shrink it; whether that worked."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        log.info("memory: no glibc mallopt here; large blocks go back to the system when freed")
        return False
    # One arena: autograd's backward runs in a thread of its own, which would get a heap that shares nothing.
    options = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    worked = [mallopt(option, value) == 1 for option, value in options.items()]  # all of them, whatever fails
    return all(worked)
