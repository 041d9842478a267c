"""Rows from JSON Lines and parquet files, in every shape people have them.

A row becomes a `Row`: the conversation up to a user turn, the response, and for preference data the
rejected response. Every error names the file and the physical line (in parquet, the row). JSON
Lines are read line by line (`ldalign.data.records`), so that nothing is inferred from the first
rows and one bad line costs no more memory than its limit.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldalign.data.records import PAIR_KEYS, BadRow, json_clean, json_records, parquet_records
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

MAX_SKIPPED = 0.01  # the share of rows that bad_rows="skip" may leave out
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")  # what is read from a folder
SHAPES = (
    "messages | prompt + response | prompt + completion | real + generated | chosen + rejected (+ "
    "prompt)"
)


@dataclass(frozen=True)
class Row:
    """One training row.

    id: unique in its list.
    history: the turns before the response, ending with a user turn.
    response: the real (chosen) one.
    rejected: the generated (rejected) one of preference rows.
    kind, answer: what a checker needs, kept from the file.
    where: "file:line" it came from.
    """

    id: str
    history: tuple[Message, ...]
    response: str
    rejected: str | None = None
    kind: str | None = None
    answer: Any = None
    where: str = ""


def read_rows(
    spec: Any, *, turns: str = "last", bad_rows: str = "error", counts: Counter[str] | None = None
) -> list[Row]:
    """Reads all rows of `spec`: a file, folder or glob, or a list of these.

    turns: which assistant turn of `messages` is the response: first, last, or all (one row for
        each). Preference rows have one response, their last turn.
    bad_rows: "error" stops at the first bad row; "skip" leaves bad rows out, up to 1 % of all.
    counts: gets what was done: skipped (bad rows), repeated (rows with an id, or a whole content,
        that came before).

    Raises InputError, as `file:line: what is wrong`, and EnvironmentProblem if pyarrow
    is needed and missing.
    """
    for name, value, allowed in (
        ("turns", turns, ("first", "last", "all")),
        ("bad_rows", bad_rows, ("error", "skip")),
    ):
        if value not in allowed:
            raise InputError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    tally = _Tally(skip=bad_rows == "skip")
    rows: list[Row] = []
    for path in files_of(spec):
        rows += _read_file(path, turns, tally)
    tally.finish()
    if counts is not None:
        counts.update(skipped=len(tally.bad), repeated=len(rows) - len({row.id for row in rows}))
    return _distinct(rows)


def files_of(spec: Any) -> list[Path]:
    """Returns the files that `read_rows` reads for `spec`, in its order."""
    return [path for source in _sources(spec) for path in _files(source)]


def data_hash(rows: Iterable[Row]) -> str:
    """Returns the sha256 (hex) of the content of `rows`, in their order.

    Where they were read from does not count.
    """
    digest = hashlib.sha256()
    for row in rows:
        content = [row.id, row.history, row.response, row.rejected, row.kind, row.answer]
        digest.update(_canonical(content) + b"\n")
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- which files


def _sources(spec: Any) -> list[str]:
    """`spec` as a list of paths, folders and globs."""
    entries = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not entries:
        raise InputError("data: the list of files is empty")
    for path in entries:
        if not isinstance(path, str | Path) or not str(path):
            raise InputError(
                f"data: {path!r} is not a path; expected a file, a folder, a glob or a list of "
                "these"
            )
    return list(map(str, entries))


def _files(source: str) -> list[Path]:
    """The files that a path, folder or glob stands for, sorted by name."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
        return files
    if glob.has_magic(source):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise InputError(f"{source}: no file matches")
        return files
    raise InputError(f"{path}: no such file or folder")


# -------------------------------------------------------------------------------- records of a file


@dataclass
class _Tally:
    """Counts rows: a bad one is an error at once, or is skipped until there are too many."""

    skip: bool
    good: int = 0
    bad: list[str] = field(default_factory=list)

    def add_bad(self, message: str) -> None:
        if not self.skip:
            raise InputError(message)
        self.bad.append(message)

    def finish(self) -> None:
        if not self.bad:
            return
        total = self.good + len(self.bad)
        if len(self.bad) > MAX_SKIPPED * total:
            raise InputError(
                f"{self.bad[0]}; {len(self.bad)} of {total} rows are bad, more than the "
                f"{MAX_SKIPPED:.0%} that bad_rows=skip may leave out"
            )
        log.warning("skipped %d of %d rows; the first: %s", len(self.bad), total, self.bad[0])


def _read_file(path: Path, turns: str, tally: _Tally) -> list[Row]:
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        records = parquet_records(path) if is_parquet else json_records(path)
        rows: list[Row] = []
        empty = True
        for number, record in records:
            empty = False
            where = f"{path}:{number}"
            try:
                if isinstance(record, BadRow):
                    raise record
                rows += _rows_of(record, turns, where)
                tally.good += 1
            except BadRow as error:
                tally.add_bad(f"{where}{error.place}: {error}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if empty:
        raise InputError(f"{path}: holds no rows")
    log.info("%s: %d rows (%s)", path, len(rows), "parquet" if is_parquet else "JSON Lines")
    return rows


# ------------------------------------------------------------------------------------------- shapes


def _rows_of(record: Any, turns: str, where: str) -> list[Row]:
    """The rows of one record; BadRow if it has none of the known shapes."""
    if not isinstance(record, dict):
        raise BadRow(f"the row is {_type(record)}; expected an object with {SHAPES}")
    keep = {
        "kind": _optional_text(record, "kind"),
        "answer": json_clean(record.get("answer")),
        "where": where,
    }
    given = _given_id(record)
    for winner, loser in PAIR_KEYS:
        if record.get(winner) is not None and record.get(loser) is not None:
            history, response, rejected = _pair(record, winner, loser)
            return [_row(given, history, response, rejected, keep)]
    if record.get("messages") is not None:
        messages = _messages(record["messages"], "messages")
        _check_turns(messages, "messages")
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not ends:
            raise BadRow("messages: no assistant turn")
        if turns == "all":
            named = [(given and f"{given}/{turn}", end) for turn, end in enumerate(ends)]
            return [
                _row(name, messages[:end], messages[end]["content"], None, keep)
                for name, end in named
            ]
        end = ends[0] if turns == "first" else ends[-1]
        return [_row(given, messages[:end], messages[end]["content"], None, keep)]
    for key in ("response", "completion"):
        if record.get("prompt") is not None and record.get(key) is not None:
            history, response = _side(record[key], key, _prompt(record["prompt"]))
            return [_row(given, history, response, None, keep)]
    raise BadRow(
        f"no known shape: expected {SHAPES}; found {', '.join(map(repr, record)) or 'no keys'}"
    )


def _pair(record: dict[str, Any], winner: str, loser: str) -> tuple[list[Message], str, str]:
    """History, winner and loser of a preference record.

    The prompt is given, or is what both conversations (or both texts) begin with.
    """
    prompt = _prompt(record["prompt"]) if record.get("prompt") is not None else None
    if prompt is None and isinstance(record[winner], str) and isinstance(record[loser], str):
        return _shared_text(record[winner], record[loser], winner, loser)
    history, response = _side(record[winner], winner, prompt)
    other_history, rejected = _side(record[loser], loser, prompt)
    if history != other_history:
        raise BadRow(
            f"{winner} and {loser} differ before their last turn; expected one prompt and two "
            "answers"
        )
    return history, response, rejected


def _side(value: Any, key: str, prompt: list[Message] | None) -> tuple[list[Message], str]:
    """(history, answer) of a response: a text, an assistant turn alone, or a whole conversation."""
    if isinstance(value, str):
        answer: list[Message] = [{"role": "assistant", "content": _text(value, key)}]
    else:
        answer = _messages(value, key)
    alone = answer[0]["role"] == "assistant"
    if alone and prompt is None:
        raise BadRow(
            f"{key}: an answer without a prompt; expected the key prompt or a whole conversation"
        )
    messages = [*(prompt or []), *answer] if alone else answer
    _check_turns(messages, key)
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"{key}: ends with a turn of the {messages[-1]['role']}; expected the assistant"
        )
    return messages[:-1], messages[-1]["content"]


def _shared_text(
    winner: str, loser: str, winner_key: str, loser_key: str
) -> tuple[list[Message], str, str]:
    """History, winner and loser of two texts without a prompt (TRL's implicit prompt).

    The prompt is what both texts begin with, up to the last white space.
    """
    shared = 0
    while shared < min(len(winner), len(loser)) and winner[shared] == loser[shared]:
        shared += 1
    while shared > 0 and not winner[shared - 1].isspace():
        shared -= 1
    prompt = winner[:shared].rstrip()
    if not prompt:
        raise BadRow(f"{winner_key} and {loser_key} share no prompt; expected the key prompt")
    history = [{"role": "user", "content": _text(prompt, winner_key)}]
    for text, key in ((winner, winner_key), (loser, loser_key)):
        answer = {"role": "assistant", "content": _text(text[shared:], key)}
        _check_turns([*history, answer], key)
    return history, winner[shared:], loser[shared:]


def _prompt(value: Any) -> list[Message]:
    """The key `prompt`: a text (one user turn) or a conversation that ends with a user turn."""
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, "prompt")}]
    messages = _messages(value, "prompt")
    if messages[-1]["role"] != "user":
        raise BadRow(f"prompt: ends with a turn of the {messages[-1]['role']}; expected the user")
    return messages


def _messages(value: Any, key: str) -> list[Message]:
    """`value` as a list of {"role", "content"}; other keys of a message are dropped."""
    if not isinstance(value, list):
        raise BadRow(f"{key}: is {_type(value)}; expected a list of {{role, content}}")
    if not value:
        raise BadRow(f"{key}: is empty")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadRow(f"{key}: turn {number} is {_type(message)}; expected {{role, content}}")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRow(
                f"{key}: turn {number} has role {role!r}; expected system, user or assistant"
            )
        content = message.get("content")
        if not isinstance(content, str):
            raise BadRow(
                f"{key}: turn {number} has content of type {_type(content)}; expected text"
            )
        messages.append({"role": role, "content": _text(content, f"{key}: turn {number}")})
    return messages


def _check_turns(messages: Sequence[Message], key: str) -> None:
    """Raises BadRow unless an optional system turn, then user and assistant take turns.

    Every turn of user and assistant must say something.
    """
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if number == 1 and role == "system":
            continue
        if role != expected:
            raise BadRow(
                f"{key}: turn {number} is {role}; expected {expected} (user and assistant "
                "alternate)"
            )
        if not message["content"].strip():
            raise BadRow(f"{key}: turn {number} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"


# ----------------------------------------------------------------------------------- values and ids


def _row(
    given: str | None,
    history: list[Message],
    response: str,
    rejected: str | None,
    keep: dict[str, Any],
) -> Row:
    name = given or hashlib.sha256(_canonical([history, response, rejected])).hexdigest()[:16]
    return Row(name, tuple(history), response, rejected, **keep)


def _given_id(record: dict[str, Any]) -> str | None:
    value = record.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise BadRow(f"id: is {value!r}; expected a text or an integer")
    return _text(str(value), "id")


def _optional_text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{key}: is {_type(value)}; expected text")
    return None if value is None else _text(value, key)


def _text(value: str, key: str) -> str:
    """`value`, unless it holds what no UTF-8 file can or no tokenizer should see."""
    if "\0" in value:
        raise BadRow(f"{key}: holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{key}: holds half of a surrogate pair at character {error.start + 1}"
        ) from error
    return value


def _type(value: Any) -> str:
    """A value's type as JSON calls it, for messages."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text"}
    names |= {bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _distinct(rows: list[Row]) -> list[Row]:
    """The same rows, the second one of an id renamed to `id#2`, the third to `id#3`, ..."""
    given = {row.id for row in rows}
    used: set[str] = set()
    next_number: dict[str, int] = {}
    result = []
    for row in rows:
        name = row.id
        if name in used:
            number = next_number.get(row.id, 2)
            while (name := f"{row.id}#{number}") in used or name in given:
                number += 1
            next_number[row.id] = number + 1
        used.add(name)
        result.append(row if name == row.id else replace(row, id=name))
    repeats = len(rows) - len(given)
    if repeats:
        log.info(
            "%d of %d rows repeat an id or a whole row; each got an id of its own",
            repeats,
            len(rows),
        )
    return result


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
