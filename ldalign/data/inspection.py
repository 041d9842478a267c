"""What becomes of rows, for a person to look at: the tokens of one by part, the figures of a file.

A row is a prompt, which is read, and a response with its end token, which is trained on; what
max_length cuts off is neither. `train/inspect_data.py` prints it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ldalign.data.rows import Row
from ldalign.data.tokenizer import PairIds, Tokenizer
from ldalign.system.errors import InputError

Split = Literal["training", "held out", "validation"]
QUANTILES = {"least": 0, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "99 %": 99, "most": 100}

MOST_BYTES = 4  # of a character in UTF-8, and so the most tokens that it is spread over


@dataclass(frozen=True)
class Part:
    """Tokens of a row that are treated alike."""

    name: Literal["prompt", "response", "end", "rejected", "rejected end", "cut"]
    ids: list[int]
    trained: bool  # whether the loss is taken of them


def parts_of(
    row: Row, tokenizer: Tokenizer, max_length: int, trained: Collection[str] = ("response",)
) -> list[Part]:
    """The parts of a row, in the order in which a model reads them; no part is empty.

    trained: those of response and rejected that the loss is taken of. A rejected response has the
    same prompt. Where the prompt alone fills max_length there is no response: the row is dropped.
    Raises InputError for a row that cannot be encoded.
    """
    prompt, response = tokenizer.pair_ids(row)
    room = max(0, max_length - len(prompt))
    parts = [Part("prompt", prompt, False), *_response(response, room, trained, "response", "end")]
    if row.rejected is not None:
        other = tokenizer.pair_ids(replace(row, response=row.rejected, rejected=None)).response
        parts += _response(other, room, trained, "rejected", "rejected end")
    return [part for part in parts if part.ids]


def _response(
    ids: list[int],
    room: int,
    trained: Collection[str],
    name: Literal["response", "rejected"],
    end: Literal["end", "rejected end"],
) -> list[Part]:
    """The parts of a response, whose last token is its end token, in `room` tokens."""
    if len(ids) <= room:
        return [Part(name, ids[:-1], name in trained), Part(end, ids[-1:], name in trained)]
    return [Part(name, ids[:room], name in trained), Part("cut", ids[room:], False)]


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

    splits: Counter[Split] = field(default_factory=Counter)  # rows by split
    prompts: array[int] = field(default_factory=lambda: array("I"))  # tokens, a row each
    responses: array[int] = field(default_factory=lambda: array("I"))  # uncut, a row each
    cut: int = 0  # responses that lose their end to max_length
    dropped: dict[str, list[str]] = field(default_factory=dict)  # where rows stand, by reason

    def add(self, row: Row, split: Split, pair: PairIds | InputError, max_length: int) -> None:
        """Counts a row: its token ids, or why it has none."""
        self.splits[split] += 1
        if isinstance(pair, InputError):
            self.dropped.setdefault("cannot be encoded, which ends a run", []).append(str(pair))
            return
        self.prompts.append(len(pair.prompt))
        self.responses.append(len(pair.response))
        if len(pair.prompt) >= max_length:
            reason = f"the prompt alone fills max_length={max_length}"
            self.dropped.setdefault(reason, []).append(row.where or row.id)
        else:
            self.cut += len(pair.prompt) + len(pair.response) > max_length

    def longer_than(self, positions: int, max_length: int) -> int:
        """How many rows that are not dropped have more tokens than `positions`, once cut."""
        kept = (p + r for p, r in zip(self.prompts, self.responses, strict=True) if p < max_length)
        return sum(min(tokens, max_length) > positions for tokens in kept)

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
    rows: Iterable[tuple[Row, Split]], tokenizer: Tokenizer, max_length: int
) -> dict[str, FileFigures]:
    """The figures of every file that rows came from, by its name, in the order of the rows."""
    found: dict[str, FileFigures] = {}
    for row, split in rows:
        figures = found.setdefault(row.where.rpartition(":")[0], FileFigures())
        try:
            pair: PairIds | InputError = tokenizer.pair_ids(row)
        except InputError as error:
            pair = error
        figures.add(row, split, pair, max_length)
    return found


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
