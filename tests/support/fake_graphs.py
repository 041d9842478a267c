"""CUDA graphs without CUDA: what is captured runs on the CPU, under a watch for host reads.

It takes every tensor for one on the GPU, and fails at once where `fake_gpu.FakeGPU` knows which are
and notes a wait; what makes the host wait is the same in both (`fake_gpu.waits_for`).
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from fake_gpu import waits_for
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldalign import ops

# What gives the host a value of a tensor, or one of the host's to the device.
METHODS = "item tolist cpu numpy cuda __bool__ __int__ __float__ __index__".split()


class HostRead(AssertionError):
    """A captured step read a tensor on the host, or made one from the host's values."""


class _Methods(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in METHODS or function in (torch.tensor, torch.from_numpy, torch.as_tensor):
            raise HostRead(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if waits_for(name, args, kwargs or {}) is not None:
            raise HostRead(name)
        if function.namespace == "ldalign":  # what the backend does inside is watched as well
            with _Methods(), self:
                return ops._raw(name, args[0])(*args)
        return function(*args, **(kwargs or {}))


class FakeGraphs:
    """`ldalign.generation.graphs.Graphs` on the CPU: a replay is the work again.

    Counts what is captured, replayed and copied. The captures whose numbers `fail` names fail as a
    GPU without memory does: the allocation, and then the end of the capture. watch: False where
    what stands for the model is computed on the host.
    """

    def __init__(
        self, fail: Callable[[int], bool] = lambda captures: False, watch: bool = True
    ) -> None:
        self.fail, self.watch = fail, watch
        self.captures = self.replays = self.uploads = self.downloads = 0
        self.capturing = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        if self.fail(self.captures):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            finally:
                raise RuntimeError("CUDA error: operation failed due to an error during capture")
        self.capturing = True
        with contextlib.ExitStack() as modes:
            for mode in (_Methods(), _Operators()) if self.watch else ():
                modes.enter_context(mode)
            work()
        self.capturing = False

        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def upload(self, x: np.ndarray) -> Tensor:
        self.uploads += 1
        return torch.from_numpy(x.copy())

    def download(self, x: Tensor) -> Callable[[], np.ndarray]:
        self.downloads += 1
        copy = x.clone()
        return lambda: copy.numpy()
