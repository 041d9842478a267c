"""Numbers between the host and a GPU, without the one waiting for the other.

A plain copy makes the host wait until the device has done all that it was given before. Here a copy
takes its place in the device's queue and the host goes on: its side is page-locked memory, which
the device reads by itself, and which torch keeps until it has been read.
"""

import torch
from torch import Tensor

ALIGNED = 16  # bytes: what a kernel's widest load wants


def to_device(device: torch.device, *values: Tensor) -> list[Tensor]:
    """Returns tensors of the CPU on the device, in one copy; the host does not wait.

    On a GPU they are parts of one buffer; on the CPU they are the tensors given.
    """
    if device.type != "cuda" or not values:
        return [x.to(device) for x in values]
    ends, size = [], 0
    for x in values:
        ends.append(size + x.nbytes)
        size = -(-ends[-1] // ALIGNED) * ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for x, end in zip(values, ends, strict=True):
        buffer[end - x.nbytes : end].copy_(x.contiguous().view(-1).view(torch.uint8))
    there = buffer.to(device, non_blocking=True)
    return [
        there[end - x.nbytes : end].view(x.dtype).view(x.shape)
        for x, end in zip(values, ends, strict=True)
    ]


class Arriving:
    """A tensor on its way to the host, from where the device's queue now ends."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.to("cpu", non_blocking=True)  # page-locked too
        self.event = torch.cuda.Event() if x.is_cuda else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(x.device))

    def arrived(self) -> Tensor:
        """Returns it on the CPU; waits for what the device was given before it, and no more."""
        if self.event is not None:
            self.event.synchronize()
        return self.x
