"""Rows from data files, one after the other.

`iter_rows` is the whole way from `data=` to rows; its pieces are for whoever reads in several
processes: `iter_chunks` cuts the files into pieces that are cheap to make, `read_chunk` makes the
rows of one, and a `Tally` adds up what was found, in the order of the files. Every error names the
file and the physical line (in parquet, Arrow and JSON arrays, the row).
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldalign.data.columns import CONVERSATION_IDS, Columns, KeyCounts, says_something, shown
from ldalign.data.embedded import KINDS
from ldalign.data.records import BadRow, Chunk, chunks, json_clean
from ldalign.data.rows import Message, Row, RowNames, beginning, content_hash
from ldalign.data.shapes import Talk, given_id, read_record
from ldalign.data.sources import files_of
from ldalign.data.turns import read_name, type_name
from ldalign.data.written_out import checked_text
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)

MAX_SKIPPED = 0.01  # the share of rows that bad_rows="skip" may leave out
SHOWN_KEYS = 30  # names of keys in one line
_NAMES = frozenset(CONVERSATION_IDS)
SHARD = re.compile(r"-\d+-of-\d+(?=[^/]*\Z)")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    turns: which assistant turn of a conversation is the response: first, last, or all (one row for
        each). Preference rows have one response, their last turn.
    bad_rows: "error" stops at the first bad row; "skip" leaves bad rows out, up to 1 % of all.
    columns: the keys that the user renames and leaves out.
    seen: those of them that stood in a file read with this, so far: files of one run may differ.

    Raises InputError for other values, and for columns that contradict themselves.
    """

    turns: Literal["first", "last", "all"] = "last"
    bad_rows: Literal["error", "skip"] = "error"
    columns: Columns = field(default_factory=Columns)
    seen: set[str] = field(default_factory=set, compare=False, repr=False)

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
    keys: the keys that were left out. sources: the renamed keys that some row had. own: keys that
    some row had under their own names in place of the user's.
    """

    good: int = 0
    bad: list[str] = field(default_factory=list)
    rows: int = 0
    keys: KeyCounts = field(default_factory=KeyCounts)
    sources: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
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
        self.own |= other.own
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

        Raises InputError where more rows are bad than may be skipped, and for a renamed `system` or
        `id` that no row had: rows without them look whole.
        """
        from ldalign.system.metrics import say

        reading.seen.update(self.sources, self.keys.ignored)
        for target, source in reading.columns.named.items():
            if source in reading.seen or not self.good:
                continue
            missing = f"columns.{target}={shown(source)}: no row has such a key"
            if target in ("system", "id") and target not in self.own:
                raise InputError(missing)
            own = f"; {target} is read under its own name" if target in self.own else ""
            say(f"data: WARNING: {missing}{own}")
        if unused := reading.columns.ignored - reading.seen:
            say(f"data: WARNING: ignore_columns: no row has {_named(sorted(unused))}")
        counted = [f"{key} ({count} rows)" for key, count in self.keys.metadata.most_common()]
        counted += [f"{key} ({n} turns)" for key, n in self.keys.turns.most_common() if n]
        if counted:
            say(f"data: keys that say nothing to train on: {_named(counted)}")
        for note, count in self.keys.notes.items():
            say(f"data: {count} {note}")
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
    return ", ".join(map(shown, keys[:SHOWN_KEYS])) + more


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
    named = reading.columns.named
    for number, record in chunk.records():
        where = f"{chunk.path}:{number}"
        try:
            if isinstance(record, BadRow):
                raise record
            talk = read_record(record, reading.columns, tally.keys, chunk.unread)
            rows += _rows(record, talk, reading, where, tally.keys)
            tally.good += 1
        except BadRow as error:
            tally.bad.append(f"{where}{error.place}: {error}")
            if reading.bad_rows == "error":
                break
            continue
        for target, source in named.items():
            if source in record:
                tally.sources.add(source)
            elif says_something(record.get(target)):
                tally.own.add(target)
    tally.rows = len(rows)
    return rows, tally


def _rows(
    record: dict[str, Any], talk: Talk, reading: Reading, where: str, counts: KeyCounts
) -> list[Row]:
    """The rows of one record: one for each of its answers that is asked for."""
    given = given_id(record, reading.columns)
    keep = {"where": where, "conversation": _conversation(record, talk, reading.columns, where)}
    keep |= _checked_by(record, reading.columns, counts)
    chosen = {"first": talk.ends[:1], "last": talk.ends[-1:], "all": talk.ends}[reading.turns]
    rows = []
    for turn, end in enumerate(chosen):
        history: list[Message] = talk.messages[:end]
        response = talk.messages[end]["content"]
        if given is not None:
            name = f"{given}/{turn}" if reading.turns == "all" and talk.is_conversation else given
        else:
            name = content_hash([history, response, talk.rejected])
        rows.append(Row(name, tuple(history), response, talk.rejected, **keep))
    return rows


def _checked_by(record: dict[str, Any], columns: Columns, counts: KeyCounts) -> dict[str, Any]:
    """What a program checks answers by; counted among the metadata where none knows the kind."""
    if "kind" not in record and "answer" not in record:
        return {}
    kind, answer = columns.value(record, "kind"), columns.value(record, "answer")
    if says_something(kind) and not isinstance(kind, str):
        raise BadRow(f"kind: is {type_name(kind)}; expected text")
    found: dict[str, Any] = {}
    if says_something(kind):
        found["kind"] = checked_text(kind, "kind")
    if says_something(answer):
        found["answer"] = json_clean(answer)
    if kind not in KINDS:
        counts.metadata.update(found.keys())
    return found


def _conversation(record: dict[str, Any], talk: Talk, columns: Columns, where: str) -> str:
    """What the rows of one conversation share: its name, else how it begins.

    A name counts too where the user reads it as the row's id.
    """
    name = None
    if not _NAMES.isdisjoint(record):
        names = (read_name(columns.unless_ignored(record, key), key) for key in CONVERSATION_IDS)
        name = next((name for name in names if name is not None), None)
    if name is None:
        return beginning(talk.messages)
    # Files number from 0 what is not the same: a number is a name in its own file alone, the
    # pieces of which (-00000-of-00003) are one.
    return f"{SHARD.sub('', where.rpartition(':')[0])}:{name}" if name.isdecimal() else name
