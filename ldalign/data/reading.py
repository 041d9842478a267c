"""Rows from data files, one after the other.

`iter_rows` is the whole way from `data=` to rows; its pieces are for whoever reads in several
processes: `iter_chunks` cuts the files into pieces that are cheap to make, `read_chunk` makes the
rows of one, and a `Tally` adds up what was found, in the order of the files. Every error names the
file and the physical line (in parquet, Arrow and JSON arrays, the row).
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldalign.data.columns import Columns, KeyCounts
from ldalign.data.records import BadRow, Chunk, chunks, json_clean
from ldalign.data.rows import Message, Row, RowNames, content_hash
from ldalign.data.shapes import Talk, given_id, read_record
from ldalign.data.sources import files_of
from ldalign.data.turns import checked_text, type_name
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)

MAX_SKIPPED = 0.01  # the share of rows that bad_rows="skip" may leave out
SHOWN_KEYS = 30  # names of keys in one line


@dataclass(frozen=True)
class Reading:
    """How files are read.

    turns: which assistant turn of a conversation is the response: first, last, or all (one row for
        each). Preference rows have one response, their last turn.
    bad_rows: "error" stops at the first bad row; "skip" leaves bad rows out, up to 1 % of all.
    columns: the keys that the user renames and leaves out.

    Raises InputError for other values, and for columns that contradict themselves.
    """

    turns: Literal["first", "last", "all"] = "last"
    bad_rows: Literal["error", "skip"] = "error"
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("turns", self.turns, ("first", "last", "all")),
            ("bad_rows", self.bad_rows, ("error", "skip")),
        ):
            if value not in allowed:
                raise InputError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        for problem in self.columns.problems():
            raise InputError(problem)


@dataclass
class Tally:
    """What was found in the files that were read.

    good, bad: records that became rows, and what is wrong with the others. rows: rows made.
    keys: the keys that were left out. sources: the renamed keys that some row had.
    """

    good: int = 0
    bad: list[str] = field(default_factory=list)
    rows: int = 0
    keys: KeyCounts = field(default_factory=KeyCounts)
    sources: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)  # unknown keys that were named already

    def add(self, other: "Tally", reading: Reading) -> None:
        """Adds what a chunk brought; the chunks come in the order of the files.

        Raises InputError for its first bad row, unless bad rows are skipped.
        """
        if other.bad and reading.bad_rows == "error":
            raise InputError(other.bad[0])
        self.good += other.good
        self.bad += other.bad
        self.rows += other.rows
        self.keys.add(other.keys)
        self.sources |= other.sources
        self.say_unknown()

    def say_unknown(self) -> None:
        """Names the unknown keys that were not named yet, in one line, where they first stand."""
        new = [key for key, count in self.keys.unknown.items() if count and key not in self.said]
        if new and len(self.said) < SHOWN_KEYS:
            from ldalign.system.metrics import say  # with torch, which a reading process needs not

            self.said.update(new)
            say(
                f"data: WARNING: keys that are not known, and not read: {_named(new)}; columns "
                "reads one as another, ignore_columns leaves one out"
            )

    def finish(self, reading: Reading) -> None:
        """Says what was left out.

        Raises InputError where more rows are bad than may be skipped, and for a renamed key that
        no row had.
        """
        for target, source in reading.columns.named.items():
            if source not in self.sources and self.good:
                raise InputError(f"columns.{target}={source}: no row has such a key")
        from ldalign.system.metrics import say

        if unused := reading.columns.ignored - self.keys.ignored.keys():
            say(f"data: WARNING: ignore_columns: no row has {', '.join(sorted(unused))}")
        if self.keys.metadata:
            counted = [f"{key} ({count} rows)" for key, count in self.keys.metadata.most_common()]
            say(f"data: keys that say nothing to train on: {_named(counted)}")
        if not self.bad:
            return
        total = self.good + len(self.bad)
        if len(self.bad) > MAX_SKIPPED * total:
            raise InputError(
                f"{self.bad[0]}; {len(self.bad)} of {total} rows are bad, more than the "
                f"{MAX_SKIPPED:.0%} that bad_rows=skip may leave out"
            )
        log.warning("skipped %d of %d rows; the first: %s", len(self.bad), total, self.bad[0])


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


def iter_rows(
    spec: Any,
    reading: Reading | None = None,
    *,
    cache: Path | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[Row]:
    """Yields the rows of `spec`: a file, folder, glob or hub name, or a list of these.

    cache: where data of the hub are kept; None: there are none. counts: gets what was done, when
    all is read: skipped (bad rows), repeated (rows with an id, or a whole content, that came
    before).

    Raises InputError, as `file:line: what is wrong`; that too many rows were bad is known, and
    raised, behind the last row.
    """
    reading = reading or Reading()
    tally, names = Tally(), RowNames()
    for chunk in iter_chunks(files_of(spec, cache), reading.columns):
        rows, found = read_chunk(chunk, reading)
        tally.add(found, reading)
        for row in rows:
            yield names.named(row)
    tally.finish(reading)
    if names.repeated:
        log.info("%d of %d rows repeat an id or a whole row", names.repeated, tally.rows)
    if counts is not None:
        counts.update(skipped=len(tally.bad), repeated=names.repeated)


def read_rows(
    spec: Any,
    *,
    turns: Any = "last",
    bad_rows: Any = "error",
    columns: Columns | None = None,
    cache: Path | None = None,
    counts: Counter[str] | None = None,
) -> list[Row]:
    """Reads all rows of `spec`, as `iter_rows` gives them.

    turns, bad_rows, columns: as in `Reading`. Raises InputError as `iter_rows` does.
    """
    reading = Reading(turns, bad_rows, columns or Columns())
    return list(iter_rows(spec, reading, cache=cache, counts=counts))


def iter_chunks(files: Iterable[Path], columns: Columns) -> Iterator[Chunk]:
    """Yields the chunks of the files, in their order.

    Raises InputError for a broken file, and for one that holds no rows.
    """
    for path in files:
        empty = True
        for chunk in chunks(path, columns):
            empty = False
            yield chunk
        if empty:
            raise InputError(f"{path}: holds no rows")


def read_chunk(chunk: Chunk, reading: Reading) -> tuple[list[Row], Tally]:
    """Returns the rows of a chunk, and what was found beside them.

    The ids are those of the records, so that two rows may have the same: `RowNames` comes after.
    Where bad rows are errors, it ends with the first.
    """
    rows: list[Row] = []
    tally = Tally()
    sources = reading.columns.named.values()
    for number, record in chunk.records():
        where = f"{chunk.path}:{number}"
        try:
            if isinstance(record, BadRow):
                raise record
            talk = read_record(record, reading.columns, tally.keys, chunk.unread)
            rows += _rows(record, talk, reading, where)
            tally.good += 1
        except BadRow as error:
            tally.bad.append(f"{where}{error.place}: {error}")
            if reading.bad_rows == "error":
                break
            continue
        tally.sources.update(source for source in sources if source in record)
    tally.rows = len(rows)
    return rows, tally


def _rows(record: dict[str, Any], talk: Talk, reading: Reading, where: str) -> list[Row]:
    """The rows of one record: one for each of its answers that is asked for."""
    given = given_id(record, reading.columns)
    kind, answer = (reading.columns.value(record, key) for key in ("kind", "answer"))
    if kind is not None and not isinstance(kind, str):
        raise BadRow(f"kind: is {type_name(kind)}; expected text")
    keep: dict[str, Any] = {"kind": kind and checked_text(kind, "kind"), "where": where}
    if answer is not None:
        keep["answer"] = json_clean(answer)
    chosen = {"first": talk.ends[:1], "last": talk.ends[-1:], "all": talk.ends}[reading.turns]
    # What the record says, and the row too, where it is the row.
    whole = given or content_hash([talk.messages[:-1], talk.messages[-1]["content"], talk.rejected])
    rows = []
    for turn, end in enumerate(chosen):
        history: list[Message] = talk.messages[:end]
        response = talk.messages[end]["content"]
        if given is not None:
            name = f"{given}/{turn}" if reading.turns == "all" and talk.is_conversation else given
        elif end == len(talk.messages) - 1:
            name = whole
        else:
            name = content_hash([history, response, talk.rejected])
        rows.append(Row(name, tuple(history), response, talk.rejected, conversation=whole, **keep))
    return rows
