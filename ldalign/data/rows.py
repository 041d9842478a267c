"""What a row of the data is, with its id, its hash, and its text as others read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class Row:
    """One training row.

    id: unique in its list.
    history: the turns before the response, ending with a user turn.
    response: the real (chosen) one.
    rejected: the generated (rejected) one of preference rows.
    kind, answer: what a checker needs, kept from the file.
    where: "file:line" it came from.
    conversation: what it shares with the other rows of its conversation, and with no others: the
        name that its record gives the conversation, else a hash of how it begins (`beginning`).
    """

    id: str
    history: tuple[Message, ...]
    response: str
    rejected: str | None = None
    kind: str | None = None
    answer: Any = None
    where: str = ""
    conversation: str = ""


def content_hash(content: Any) -> str:
    """Returns the name of what has none: 16 hex digits of the sha256 of its JSON."""
    return hashlib.sha256(_canonical(content)).hexdigest()[:16]


def beginning(messages: Sequence[Message]) -> str:
    """Returns a hash of a conversation's first question and its answer: 32 hex digits.

    Rows that hold one conversation up to different turns begin alike. The system turn and white
    space around a text are left out, as they may differ between such rows.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    question, answer = (m["content"].strip() for m in messages[first : first + 2])
    both = f"{question}\0{answer}"  # no text holds a NUL
    return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()


class RowNames:
    """Gives every row of a list an id of its own, one row after the other.

    The second row of an id is called `id#2`, the third `id#3`, unless a row before has that name.
    repeated: how many rows came with an id that one before them had.
    """

    def __init__(self) -> None:
        self.repeated = 0
        self._used: set[str] = set()
        self._next: dict[str, int] = {}

    def named(self, row: Row) -> Row:
        """Returns the row, under another id where a row before it has its own."""
        name = self.name(row.id)
        return row if name == row.id else replace(row, id=name)

    def name(self, given: str) -> str:
        """Returns the id of a row that came with the id `given`."""
        name = given
        if name in self._used:
            self.repeated += 1
            number = self._next.get(given, 2)
            while (name := f"{given}#{number}") in self._used:
                number += 1
            self._next[given] = number + 1
        self._used.add(name)
        return name


def _canonical(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("ascii")


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def prompt_text(row: Row) -> str:
    """Returns what judges and reward models read as the question.

    It is the user's text, or for a longer history every turn with its role. The system turn is left
    out: it is no part of what the user asks.
    """
    return _turns([m for m in row.history if m["role"] != "system"])


def history_text(history: Sequence[Message]) -> str:
    """Returns what a guide that knows no chat template reads as the prompt: the user's text where
    it stands alone, else every turn with its role, the system turn among them.
    """
    return _turns(history)


def _turns(turns: Sequence[Message]) -> str:
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
