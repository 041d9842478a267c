"""Metrics and what a person watches: means over ranks, a JSON line a step, how far work is.

Names are TRL's (`rewards/chosen`, `logps/rejected`, ...); ours in addition are `weight/*`, `len/*`,
`time/*` and `tokens_per_second`.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldalign.system import distributed, logs
from ldalign.system.listeners import tell
from ldalign.system.memory import resident
from ldalign.system.transfer import to_device

Metrics = dict[str, float]  # a stage's numbers, by name


class Mean:
    """Means by example: sums on the device, added over ranks, divided at the end.

    While `muted`, what is added is named but counts for nothing: a rank without rows must still
    know the names.
    """

    def __init__(self) -> None:
        self.muted = False
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: Tensor, count: float | None = None) -> None:
        """Adds values (n,) of n examples, or their sum () over `count` examples."""
        if self.muted:
            values, count = values.new_zeros(()), 0.0  # not a factor of 0, which would keep a NaN
        total = values.detach().double().sum()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0.0) + (
            values.numel() if count is None else count
        )

    def totals(self, device: torch.device) -> Tensor:
        """Returns this rank's sums, then its counts, by the order of the names: (2 names,) float64
        on the device. The host does not wait.
        """
        names = sorted(self.sums)
        counts = torch.tensor([self.counts[n] for n in names], dtype=torch.float64)
        return torch.cat([*(self.sums[n][None] for n in names), *to_device(device, counts)])

    def means(self, totals: Sequence[float]) -> dict[str, float]:
        """Returns the means, by `totals` summed over all ranks, which have the same names."""
        names = sorted(self.sums)
        sums, counts = totals[: len(names)], totals[len(names) :]
        return {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c}


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
    # Not getrusage, which would count the parent's memory too, shared for a moment.
    peak = resident("VmHWM")
    return math.nan if peak is None else peak / 2**30


class Bar:
    """How far a piece of work is, on rank 0: `with Bar(...) as progress`.

    In a terminal it is a bar, drawn when the work takes longer than a second. Where stderr is a
    file, a line every `PLAIN_SECONDS` says what is done and about how long the rest takes.

    name: what is done. total: how many units there are; None where that is not known. unit: in the
    plural. clock: seconds, from anywhere. most: tokens that a unit can have, where they are told as
    they are made and not as their unit ends; None: units alone say how long the rest takes.
    """

    PLAIN_SECONDS = 30.0

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float] = time.perf_counter,
        most: int | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.clock, self.most = name, total, unit, clock, most
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
                miniters=0,  # many calls may bring tokens and no unit
                # Its own estimate knows units alone.
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
                if self.most
                else None,
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
                self.tqdm.set_postfix_str(", ".join(self._pace(now)), refresh=False)
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
        return ", ".join([*parts, *self._pace(now)])

    def _pace(self, now: float) -> list[str]:
        """In words: tokens a second, and about how long the rest takes, where they are known."""
        parts = []
        if self.tokens:
            parts.append(f"{self.tokens / max(now - self.began, 1e-9):.0f} tokens/s")
        if self.total and self.done < self.total:
            parts.append(f"about {in_words(self._left(now))} left")
        return parts

    def _left(self, now: float) -> float:
        """Seconds that the rest takes at the speed since the first `add`; inf: not known."""
        then, before = self.first or (self.began, 0)
        if self.done == before and not self.most:  # there was but one so far
            then, before = self.began, 0
        done, left = self.done - before, max(0, (self.total or 0) - self.done)
        if self.most and self.tokens:
            # Of many units under way few have ended at first, and these are short: a unit's tokens
            # are thought to be all that were made, by unit that has ended, and at most `most`.
            each = min(self.most, self.tokens / done) if done else self.most
            return max(0.0, (done + left) * each / self.tokens - 1) * (now - then)
        return left * (now - then) / done if done > 0 else math.inf

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.tqdm.close()
        if self.tokens:
            seconds = self.clock() - self.began
            say(
                f"{self.name}: {self.tokens} tokens in {seconds:.0f} s, "
                f"{self.tokens / max(seconds, 1e-9):.0f} tokens/s"
            )
