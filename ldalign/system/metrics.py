"""Metrics and what a person watches: means over ranks, a JSON line a step, terminal lines, a bar.

Names are TRL's (`rewards/chosen`, `logps/rejected`, ...); ours in addition are `weight/*`, `len/*`,
`time/*` and `tokens_per_second`.
"""

import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldalign.system import distributed

Metrics = dict[str, float]  # a stage's numbers, by name


class Mean:
    """Means by example: sums and counts on the device, added over ranks, divided at the end.

    While `muted`, what is added is named but counts for nothing: a rank without rows must still
    know the names.
    """

    def __init__(self) -> None:
        self.muted = False
        self.sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self.counts: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, values: Tensor, count: float | None = None) -> None:
        """Adds values (n,) of n examples, or their sum () over `count` examples."""
        if self.muted:
            values, count = values.new_zeros(()), 0.0  # not a factor of 0, which would keep a NaN
        self.sums[name] = self.sums[name] + values.detach().double().sum()
        self.counts[name] += values.numel() if count is None else count

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Returns the means over all ranks. Every rank must call it with the same names."""
        names = sorted(self.sums)
        mine = [[float(self.sums[n]), self.counts[n]] for n in names]
        table = torch.tensor(mine, dtype=torch.float64, device=device)  # (names, 2)
        table = distributed.total(table).cpu().reshape(-1, 2)
        return {n: float(s / c) for n, (s, c) in zip(names, table, strict=True) if c}


class MetricsLog:
    """Appends to a JSON Lines file and prints a short line; silent but on rank 0."""

    def __init__(self, path: Path | None, stage: str) -> None:
        self.path, self.stage = path if distributed.rank() == 0 else None, stage

    def write(self, record: Mapping[str, Any], text: str) -> None:
        """Writes one record, with the stage's name, and says the line that a person reads."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, **record}) + "\n")
        say(f"{self.stage}: {text}")


def say(text: str) -> None:
    """Prints a line for the person at the terminal, on stderr, from rank 0 only.

    A run outlives who reads it, a terminal or a pipe: a line that cannot be printed is lost.
    """
    if distributed.rank() == 0:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this process, in GiB: the GPU's if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux's VmHWM, in KiB: getrusage would count the parent's memory too, shared for a moment.
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    peaks = (int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:"))
    return next(peaks, math.nan)


class Bar:
    """A progress bar on rank 0, also of tokens a second: `with Bar(...) as progress`.

    total: None where it is not known.
    """

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit

    def __enter__(self) -> Callable[[int, int], None]:
        self.tokens, self.began = 0, time.perf_counter()
        # disable=None: no bar where the output is a file
        self.tqdm = tqdm(
            total=self.total,
            desc=self.name,
            unit=self.unit,
            disable=None if distributed.rank() == 0 else True,
        )
        return self.add

    def add(self, rows: int, tokens: int) -> None:
        """Moves the bar on by `rows`, in which `tokens` new tokens were made."""
        self.tokens += tokens
        if self.tokens:
            self.tqdm.set_postfix_str(
                f"{self.tokens / (time.perf_counter() - self.began):.0f} tokens/s", refresh=False
            )
        with contextlib.suppress(OSError):
            self.tqdm.update(rows)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.tqdm.close()
        if self.tokens:
            seconds = time.perf_counter() - self.began
            say(
                f"{self.name}: {self.tokens} tokens in {seconds:.0f} s, "
                f"{self.tokens / seconds:.0f} tokens/s"
            )
