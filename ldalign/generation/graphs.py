"""What a step of decoding needs of CUDA: work captured as a graph, copies nobody waits for."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldalign.system.transfer import Arriving, to_device


class Graphs(Protocol):
    """Captures work on a device, and copies to it and from it."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Does the work, and returns what does it again on the same tensors.

        Raises what `ldalign.system.memory.is_out_of_memory` knows where memory does not suffice.
        """
        ...

    def upload(self, x: np.ndarray) -> Tensor:
        """Returns x on the device; the host does not wait for the copy."""
        ...

    def download(self, x: Tensor) -> Callable[[], np.ndarray]:
        """Begins to copy x, which later work may overwrite; returns what waits for the copy."""
        ...


class CudaGraphs:
    """`Graphs` of one GPU: all that is captured shares one memory pool and one stream.

    It may, as no two graphs run at a time and none leaves anything in the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            try:
                with torch.cuda.stream(self.stream):
                    work()  # kernels are compiled and chosen before anything is captured
                graph = torch.cuda.CUDAGraph()
                # What other threads ask of the device meanwhile does not count.
                mode = "thread_local"
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
                    work()
            finally:  # also where the end of a capture fails, which leaves its stream behind
                torch.cuda.set_stream(before)
                before.wait_stream(self.stream)

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay

    def upload(self, x: np.ndarray) -> Tensor:
        return to_device(self.device, torch.from_numpy(x))[0]

    def download(self, x: Tensor) -> Callable[[], np.ndarray]:
        arriving = Arriving(x)
        return lambda: arriving.arrived().numpy()
