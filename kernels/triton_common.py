# mypy: disable-error-code="no-untyped-def"
"""What all Triton kernels share: rounding, launching, and knowing which machine the launch is for.

A kernel runs in one of three ways. On a CUDA device it is compiled at its first launch. In Triton's
interpreter (TRITON_INTERPRET=1 when these modules are imported) numpy plays the kernel on CPU
tensors: slow, but every line counts. And `recording` runs the launch functions on tensors of device
"meta", where nothing is computed and each launch is handed to a recorder: so `compile_check`
compiles exactly what production would run, with no GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Called with the kernel, its arguments, and constants and options.
Recorder = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_recording: tuple[tuple[int, int], Recorder] | None = None


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x rounded to nearest even in dtype: the one rounding at the store."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts the low bits off, where a GPU rounds. Rounded first, none are cut.
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        # A NaN's bits must not carry over.
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Runs the kernel on like's device. An empty grid is no launch: CUDA would refuse it."""
    if 0 in grid:
        return
    # a * b + c rounded once; Triton's own default differs between versions.
    options["enable_fp_fusion"] = True
    if _recording is not None:
        _recording[1](kernel, args, options)
    elif like.is_cuda:
        # Triton launches on the current device, not on the tensors' own.
        with torch.cuda.device(like.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def recording(capability: tuple[int, int], record: Recorder) -> Iterator[None]:
    """Launches inside are recorded instead of run.

    Tile sizes are those of a GPU of this compute capability.
    """
    global _recording
    _recording = (capability, record)
    try:
        yield
    finally:
        _recording = None


def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability to choose tile sizes for; None in the interpreter."""
    if _recording is not None:
        return _recording[0]
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def unit_stride(x: Tensor) -> Tensor:
    """Returns x itself where its last axis is dense, else a contiguous copy.

    The kernels take any stride but the last axis's.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
