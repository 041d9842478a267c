"""What the machine can do: the rate of bare matrix products of a model, a copy's bandwidth.

A measured process like the peers: `rates` is what their shares are shares of. Run by the
benchmarks, not by hand.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from worker import Job, Result, main, settle


def rates(job: Job) -> Result:
    """Measures {"flops": a second, "bytes": read and written a second} of this machine.

    The products are (tokens, i) x (i, o) into standing outputs. The fastest of the job's libraries
    counts, each named by the float32 precision that torch takes it for.
    """
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    found = []
    for library in job["libraries"]:
        torch.set_float32_matmul_precision(library)
        found.append(product_rate(job["tokens"], job["products"], dtype, device, job["seconds"]))
    return {"flops": max(found), "bytes": copy_rate(job["copy_bytes"], device, job["seconds"])}


def product_rate(
    tokens: int,
    products: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> float:
    """Floating-point operations a second, median over runs of all products."""
    cases = [
        (
            torch.randn(tokens, i, device=device).to(dtype),
            torch.randn(i, o, device=device).to(dtype),
            torch.empty(tokens, o, dtype=dtype, device=device),
        )
        for i, o in products
    ]

    def run() -> None:
        for a, b, out in cases:
            torch.mm(a, b, out=out)

    return sum(2 * tokens * i * o for i, o in products) / _median_seconds(run, device, seconds)


def copy_rate(size: int, device: torch.device, seconds: float) -> float:
    """Bytes a second, read and written, of copying `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device, seconds)


def _median_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    run()
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        settle(device)
        began = time.perf_counter()
        run()
        settle(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main({"rates": rates})
