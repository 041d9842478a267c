"""Metrics and what a person watches: means over ranks, a JSON line a step, how far work is.

Names are TRL's (`rewards/chosen`, `logps/rejected`, ...); ours in addition are `weight/*`, `len/*`,
`time/*` and `tokens_per_second`.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldalign.system import distributed, logs
from ldalign.system.listeners import tell

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
        line = f"{self.stage}: {text}"
        say(line)
        tell(lambda listener: listener.record(self.stage, record, line))


def say(text: str) -> None:
    """Prints a line for the person at the terminal, by `logs.line`, from rank 0 only."""
    if distributed.rank() == 0:
        logs.line(text)


def in_words(seconds: float) -> str:
    """A time as a person says it: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "unknown"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


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
    """How far a piece of work is, on rank 0: `with Bar(...) as progress`.

    In a terminal it is a bar, drawn when the work takes longer than a second. Where stderr is a
    file, a line every `PLAIN_SECONDS` says what is done and about how long the rest takes.

    name: what is done. total: how many units there are; None where that is not known. unit: in the
    plural. clock: seconds, from anywhere.
    """

    PLAIN_SECONDS = 30.0

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name, self.total, self.unit, self.clock = name, total, unit, clock
        self.done = self.tokens = 0
        self.first: tuple[float, int] | None = None  # when `add` was first called, and done then

    def __enter__(self) -> Callable[[int, int], None]:
        self.done = self.tokens = 0
        self.first = None
        self.began = self.said = self.clock()
        # A line a unit of time where a bar would be a line a moment.
        self.plain = distributed.rank() == 0 and not logs.shows_bars()
        with contextlib.suppress(OSError):
            self.tqdm = tqdm(
                total=self.total,
                desc=self.name,
                unit=self.unit,
                disable=self.plain or distributed.rank() > 0,
                delay=1,
            )
        return self.add

    def add(self, rows: int, tokens: int) -> None:
        """Moves on by `rows` units, in which `tokens` new tokens were made."""
        now = self.clock()
        self.done += rows
        self.tokens += tokens
        if self.first is None:  # at once it has what an earlier start did, which took no time
            self.first = now, self.done
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: it could not be drawn
            if self.tokens:
                speed = self.tokens / max(now - self.began, 1e-9)
                self.tqdm.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            self.tqdm.update(rows)
        if self.plain and now - self.said >= self.PLAIN_SECONDS:
            self.said = now
            say(f"{self.name}: {self._state(now)}")

    def _state(self, now: float) -> str:
        """In words: what is done, how fast, and about how long the rest takes."""
        parts = [f"{self.done} {self.unit}"]
        if self.total:
            share = f"{self.done / self.total:.0%}"
            parts = [f"{self.done} of {self.total} {self.unit} ({share})"]
        if self.tokens:
            parts.append(f"{self.tokens / max(now - self.began, 1e-9):.0f} tokens/s")
        if self.total and self.done < self.total:
            parts.append(f"about {in_words(self._left(now))} left")
        return ", ".join(parts)

    def _left(self, now: float) -> float:
        """Seconds that the rest takes at the speed since the first `add`; inf: not known."""
        then, before = self.first or (self.began, 0)
        if self.done == before:  # there was but one so far
            then, before = self.began, 0
        left = max(0, (self.total or 0) - self.done)
        return left * (now - then) / (self.done - before) if self.done > before else math.inf

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.tqdm.close()
        if self.tokens:
            seconds = self.clock() - self.began
            say(
                f"{self.name}: {self.tokens} tokens in {seconds:.0f} s, "
                f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"
            )
