"""What becomes of rows, for a person to look at: the tokens of one by part, the figures of a file.

A row is a prompt, which is read, and a response with its end token, which is trained on; what
max_length cuts off is neither. All of it comes from `ldalign.data.encoding`, as in a run.
`train/inspect_data.py` prints it.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ldalign.data.encoding import FittedRow, Fitting, TooLong, fit_rows
from ldalign.data.records import BadRow
from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.system.errors import InputError

Split = Literal["training", "held out", "validation"]
QUANTILES = {"least": 0, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "99 %": 99, "most": 100}

ROWS_AT_ONCE = 256  # that are encoded together, by the tokenizers library's threads
MOST_BYTES = 4  # of a character in UTF-8, and so the most tokens that it is spread over


@dataclass(frozen=True)
class Part:
    """Tokens of a row that are treated alike."""

    name: Literal["prompt", "response", "end", "rejected", "rejected end", "cut"]
    ids: list[int]
    trained: bool  # whether the loss is taken of them


def parts_of(fitted: FittedRow | TooLong, trained: Collection[str] = ("response",)) -> list[Part]:
    """The parts of a row, in the order in which a model reads them; no part is empty.

    trained: those of response and rejected that the loss is taken of. A rejected response has the
    same prompt. A row that is left out has a prompt, and a response that is cut off whole.
    """
    if isinstance(fitted, TooLong):
        parts = [Part("prompt", fitted.ids.prompt, False), Part("cut", fitted.ids.response, False)]
    else:
        parts = [Part("prompt", fitted.prompt, False)]
        parts += _response(fitted.response, fitted.lost, "response", "end", trained)
        if fitted.rejected is not None:
            rejected, lost = fitted.rejected, fitted.rejected_lost
            parts += _response(rejected, lost, "rejected", "rejected end", trained)
    return [part for part in parts if part.ids]


def _response(
    kept: list[int],
    lost: list[int],
    name: Literal["response", "rejected"],
    end: Literal["end", "rejected end"],
    trained: Collection[str],
) -> list[Part]:
    """The parts of a response, whose last token is its end token."""
    if not lost:
        return [Part(name, kept[:-1], name in trained), Part(end, kept[-1:], name in trained)]
    return [Part(name, kept, name in trained), Part("cut", lost, False)]


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """The tokens with what each stands for; those that a character is spread over come together."""
    found: list[tuple[str, list[int]]] = []
    group: list[int] = []
    for token in ids:
        group.append(token)
        text = tokenizer.piece(group)
        if "\N{REPLACEMENT CHARACTER}" not in text or len(group) == MOST_BYTES:
            found.append((text, group))
            group = []
    return found + [(tokenizer.piece([token]), [token]) for token in group]


@dataclass
class FileFigures:
    """What a file's rows are, once they are token ids."""

    splits: Counter[Split] = field(default_factory=Counter)  # rows that are used, by split
    prompts: array[int] = field(default_factory=lambda: array("I"))  # tokens, a row each; whole
    responses: array[int] = field(default_factory=lambda: array("I"))  # uncut, a row each
    read: array[int] = field(default_factory=lambda: array("I"))  # once it fits; a used row each
    cut: int = 0  # rows of which a response loses its end to max_length
    truncated: int = 0  # rows whose history loses its beginning
    dropped: dict[str, list[str]] = field(default_factory=dict)  # where rows stand, by reason
    bad: list[str] = field(default_factory=list)  # what is wrong with rows, and where they stand

    def add(self, row: Row, split: Split, found: FittedRow | TooLong | BadRow) -> None:
        """Counts a row: its token ids, or why it has none."""
        if isinstance(found, BadRow):
            self.bad.append(str(found))
            return
        if isinstance(found, TooLong):
            self.dropped.setdefault(found.reason, []).append(row.where or row.id)
            self.prompts.append(len(found.ids.prompt))
            self.responses.append(len(found.ids.response))
            return
        self.splits[split] += 1
        self.prompts.append(found.whole_prompt)
        self.responses.append(len(found.response) + len(found.lost))
        self.read.append(len(found.prompt) + len(found.response))
        self.cut += found.cut
        self.truncated += found.truncated

    def longer_than(self, positions: int) -> int:
        """How many rows that are used have more tokens than `positions`, once they fit."""
        return sum(tokens > positions for tokens in self.read)

    def quantiles(self) -> dict[str, list[int]]:
        """{prompt, response, together: a number of tokens for each of QUANTILES}; {} without rows.

        Each is the length of a row that there is.
        """
        if not self.prompts:
            return {}
        prompt, response = (np.asarray(a, dtype=np.int64) for a in (self.prompts, self.responses))
        lengths = {"prompt": prompt, "response": response, "together": prompt + response}
        wanted = list(QUANTILES.values())
        return {
            name: np.percentile(values, wanted, method="lower").tolist()
            for name, values in lengths.items()
        }


def file_figures(
    rows: Iterable[tuple[Row, Split]],
    tokenizer: Tokenizer,
    fitting: Fitting,
    preference: bool = False,
) -> dict[str, FileFigures]:
    """The figures of every file that rows came from, by its name, in the order of the rows.

    preference: training rows need a rejected response. Raises InputError for what is wrong with
    every row (`Tokenizer.pairs_ids`).
    """
    found: dict[str, FileFigures] = {}
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, ROWS_AT_ONCE)):
        fitted = fit_split(batch, tokenizer, fitting, preference)
        for (row, split), one in zip(batch, fitted, strict=True):
            figures = found.setdefault(row.where.rpartition(":")[0], FileFigures())
            figures.add(row, split, one)
    return found


def fit_split(
    rows: Sequence[tuple[Row, Split]], tokenizer: Tokenizer, fitting: Fitting, preference: bool
) -> list[FittedRow | TooLong | BadRow]:
    """`fit_rows`, with the training rows as those that need a rejected response."""
    needing = [n for n, (_, split) in enumerate(rows) if preference and split == "training"]
    return fit_rows([row for row, _ in rows], tokenizer, fitting, needing)


def choose_rows(rows: Sequence[Row], wanted: int | str | Sequence[str]) -> list[int]:
    """Returns the numbers (from 0) of the rows asked for.

    wanted: how many of the first rows; or one, or a list, of ids, places FILE:LINE (a file's last
    names are enough) and numbers from 1, as text. An id goes before a place, a place before a
    number. Raises InputError for a row that is not there.
    """
    if isinstance(wanted, int):
        return list(range(min(wanted, len(rows))))
    by_id = {row.id: i for i, row in enumerate(rows)}
    chosen: list[int] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        placed = [i for i, row in enumerate(rows) if _stands_at(row, name)]
        if name in by_id:
            chosen.append(by_id[name])
        elif placed:  # several with turns=all
            chosen += placed
        elif name.isdecimal() and 1 <= int(name) <= len(rows):
            chosen.append(int(name) - 1)
        else:
            raise InputError(
                f"rows: {name!r}: no such row; give an id, FILE:LINE, or a number from 1 to "
                f"{len(rows)}"
            )
    return chosen


def _stands_at(row: Row, place: str) -> bool:
    return ":" in place and (row.where == place or row.where.endswith(f"/{place}"))
