"""What every measured process shares: a job in as JSON, its result out as stdout's last line.

Imports nothing of ours, as the peers run in environments of their own, where ldalign is not
installed; and torch only where it is used: an engine without it is not to hold its memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Job = dict[str, Any]
Result = dict[str, Any]


def main(tasks: dict[str, Callable[[Job], Result]]) -> None:
    """Does the job's task and prints its result, with the peak memory of this process."""
    job: Job = json.load(sys.stdin)
    if job.get("float32_products"):
        import torch

        torch.set_float32_matmul_precision(job["float32_products"])
    result = tasks[job["task"]](job)
    print(json.dumps({"peak_gib": peak_gib(job["device"])} | result))


def peak_gib(device: str) -> float:
    """Returns the peak memory in GiB: the GPU's, or this process's resident memory (VmHWM).

    getrusage would count the parent's memory too, which was shared for a moment.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 2**20


def settle(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


@contextmanager
def timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    """Adds the time of what is done inside, in seconds."""
    settle(device)
    began = time.perf_counter()
    yield
    settle(device)
    seconds.append(time.perf_counter() - began)


def optimizer_of(model: torch.nn.Module, name: str, learning_rate: float) -> torch.optim.Optimizer:
    """Makes the peers' optimizer, its states in the weights' dtype: torch's fastest form of it."""
    import torch

    if name == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=learning_rate, foreach=True)
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)


def padded(
    sequences: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[prompt; response] of R sequences, right-padded: ids, what is no padding, and what is
    response (bool), each (R, longest).
    """
    import torch

    longest = max(len(x) + len(y) for x, y in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    seen, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (x, y) in enumerate(sequences):
        ids[i, : len(x) + len(y)] = torch.tensor([*x, *y])
        seen[i, : len(x) + len(y)] = 1
        response[i, len(x) : len(x) + len(y)] = True
    return ids.to(device), seen.to(device), response.to(device)
