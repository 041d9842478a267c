"""Lengths that nobody gave: max_new_tokens=0 and max_length=0 become numbers that fit the data.

They are taken of the real responses and their prompts, in the policy's tokens, before the rows are
prepared, and kept in the stage data. So every stage, manifest and later start has the same numbers.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ldalign.data.encoding import FittedRow, Fitting, fit_rows
from ldalign.data.preparation import ROWS_AT_ONCE, Source
from ldalign.data.reading import Reading
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.models.weights import context_length
from ldalign.run.positions import reads
from ldalign.run.settings import RunConfig
from ldalign.run.stranger import MAX_BYTES
from ldalign.system.errors import InputError
from ldalign.system.files import read_json, write_json
from ldalign.system.metrics import Bar

C = TypeVar("C", bound=RunConfig)
Counts = npt.NDArray[np.int64]

FILE = "lengths.json"  # in the stage data
KEYS = ("max_new_tokens", "max_length")
MEASURED = 4096  # most rows that lengths are taken of, drawn from all
ANSWERS = 0.95  # share of the real responses that max_new_tokens is enough for
ROWS = 0.995  # share of the rows, sampled responses too, that max_length cuts nothing of
STEP = 32  # lengths are multiples of it
UNBOUNDED = 2**30  # tokens: no row has so many


@dataclass(frozen=True)
class Lengths:
    """The two lengths of a run, and what they were taken of."""

    max_new_tokens: int
    max_length: int
    asked: tuple[int, int]  # the same, as the settings have them: 0 is from the data
    rows: int  # that were measured
    prompts: tuple[int, int, int]  # median, 95 % and most of their tokens
    responses: tuple[int, int, int]

    def applied(self, config: C) -> C:
        """The settings with these lengths."""
        return replace(config, max_new_tokens=self.max_new_tokens, max_length=self.max_length)

    @property
    def text(self) -> str:
        """A line that says them."""
        asked = [f"{key}={getattr(self, key)}" for key in asked_of(self.asked)]
        spreads = spread("prompts", self.prompts), spread("responses", self.responses)
        return f"data: {' and '.join(asked)}, by {self.rows} rows: {'; '.join(spreads)}"


def asked_of(lengths: Sequence[int]) -> list[str]:
    """Which of the two are to be taken from the data, of their values in the settings."""
    return [key for key, value in zip(KEYS, lengths, strict=True) if value == 0]


def given(config: RunConfig) -> tuple[int, int]:
    """The two lengths as the settings have them."""
    return config.max_new_tokens, config.max_length


def quantiles(tokens: Counts) -> tuple[int, int, int]:
    """Median, 95 % and most of numbers of tokens (n,)."""
    found = np.percentile(tokens, (50, 95, 100), method="higher")
    return int(found[0]), int(found[1]), int(found[2])


def spread(what: str, found: tuple[int, int, int]) -> str:
    """A clause that says what `quantiles` found."""
    return f"{what} of {found[0]} tokens (median), 95 % up to {found[1]}, the longest {found[2]}"


def measure(config: RunConfig, data: Source, reading: Reading, tokenizer: Tokenizer) -> Lengths:
    """Takes the lengths that are 0 in the settings from the data's rows.

    At most MEASURED rows, drawn from all, are encoded; which ones depends on nothing but the data.
    Raises InputError for bad rows where reading.bad_rows says so, where no row is left, and for a
    given max_new_tokens that the policy cannot read.
    """
    rows = _drawn(data, reading)
    prompts, responses, longest = _counted(rows, reading, tokenizer)
    new, length = choose(
        given(config), prompts, responses, longest, context_length(tokenizer.folder)
    )
    if new >= length:
        bound = reads(tokenizer.folder, context_length(tokenizer.folder))
        raise InputError(
            f"max_new_tokens={new}: leaves no room for a prompt, as {bound}; give less, or 0"
        )
    own = quantiles(prompts), quantiles(responses)
    return Lengths(new, length, given(config), len(prompts), *own)


def choose(
    asked: tuple[int, int], prompts: Counts, responses: Counts, longest: Counts, context: int
) -> tuple[int, int]:
    """max_new_tokens and max_length; those of `asked` that are not 0 stay.

    prompts, responses, longest (n,): tokens of each row's prompt, of its real response, and of the
    longer of its responses. context: how many tokens the policy reads; max_length is at most that,
    and max_new_tokens leaves room for the prompts in it.
    """
    new, length = asked
    room = min(context, length or context)
    if not new:
        # Long prompts leave a quarter, as `Fitting.room` does.
        most = max(1, room // 4, room - int(np.quantile(prompts, ANSWERS, method="higher")))
        new = min(_rounded(responses, ANSWERS), most, room - 1)
    if not length:
        length = min(context, _rounded(prompts + np.maximum(longest, new), ROWS))
    return new, length


def _rounded(tokens: Counts, share: float) -> int:
    """The next multiple of STEP at or above a quantile."""
    return -(-int(np.quantile(tokens, share, method="higher")) // STEP) * STEP


def _drawn(data: Source, reading: Reading) -> list[Row]:
    """At most MEASURED rows, each as likely as the others, and the same every time."""
    chosen: list[Row] = []
    seen, draw = 0, random.Random(0)
    with Bar("data: rows read for lengths", None, "rows") as progress:
        for piece in data.pieces(reading):
            rows, tally = piece.read(reading)
            if tally.bad and reading.bad_rows == "error":
                raise InputError(tally.bad[0])
            for row in rows:
                seen += 1
                place = len(chosen) if len(chosen) < MEASURED else draw.randrange(seen)
                chosen[place : place + 1] = [row] if place < MEASURED else []
            progress(len(rows), 0)
    return chosen


def _counted(
    rows: Sequence[Row], reading: Reading, tokenizer: Tokenizer
) -> tuple[Counts, Counts, Counts]:
    """Tokens of each row's prompt, its response, and the longer of its responses: (n,) each."""
    found: list[tuple[int, int, int]] = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        for row in fit_rows(rows[first : first + ROWS_AT_ONCE], tokenizer, Fitting(UNBOUNDED)):
            if isinstance(row, FittedRow):
                real, rejected = len(row.response), len(row.rejected or ())
                found.append((len(row.prompt), real, max(real, rejected)))
            elif isinstance(row, BadRow) and reading.bad_rows == "error":
                raise InputError(str(row))
    if not found:
        raise InputError(
            "data: there is no row to take lengths from; give max_new_tokens and max_length"
        )
    prompts, responses, longest = np.array(found, dtype=np.int64).T
    return prompts, responses, longest


# ------------------------------------------------------------------------------------- in the stage


def write_lengths(folder: Path, lengths: Lengths) -> None:
    """Writes them into the folder of the stage data."""
    write_json(folder / FILE, asdict(lengths))


def read_lengths(folder: Path, config: RunConfig) -> Lengths | None:
    """Returns what lies in the folder of the stage data; None where nothing does, or where other
    lengths were to be taken from the data than now.
    """
    try:
        found = read_json(folder / FILE, MAX_BYTES)
        lengths = Lengths(**{key: _tuple(value) for key, value in found.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # damaged: the stage says so itself
    return lengths if lengths.asked == given(config) else None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
