"""What the benchmark modules share: the job comes in on stdin, the timings go out as one line of JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]
Timings = tuple[list[float], list[float]]  # seconds, and work done, of each measured repetition


def main(peers: dict[str, Callable[[Job, torch.dtype, torch.device], Timings]]) -> None:
    """Runs the peer that the job names and prints its result."""
    job: Job = json.load(sys.stdin)
    device = torch.device(job["device"])
    seconds, work = peers[job["peer"]](job, getattr(torch, job["dtype"]), device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = peak_resident_gib()
    print(json.dumps({"seconds": seconds, "work": work, "peak_gib": peak}))


def peak_resident_gib() -> float:
    """Of this process: Linux's VmHWM. getrusage would count the parent's memory too, which it shared for a moment."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 2**20


def settle(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
