"""JSON values out of data files, each with the place it came from.

What a file holds is told by its content: JSON Lines or one JSON array, plain or compressed (gzip,
zstd), parquet, or Arrow. It is read in chunks, which are cheap to make and can be parsed by
whichever process takes them: lines that are still bytes, batches of columns that are no Python
objects yet. Nothing is inferred from the first rows, and one bad line costs no more memory than its
limit.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from ldalign.data.columns import MEANING, PAIR_KEYS, READ, Columns, shown, use_of
from ldalign.system.errors import FILE_SYSTEM, InputError, cannot_be_read

MAX_ROW_BYTES = 8 * 1024 * 1024  # a longer line is a broken file, not a conversation
CHUNK_BYTES = 2**20  # of lines that make a chunk
CHUNK_ROWS = 256  # of a JSON array or columns

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# A frame of zstd that is to be skipped: pzstd and others write one first.
ZSTD_SKIPPED = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
PARQUET = b"PAR1"
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream
BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
TEXT_TYPES = ("string", "large_string", "dictionary")  # of columns, by the names of their types
CSV_NAME = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?\Z", re.IGNORECASE)


class BadRow(ValueError):
    """What is wrong with one record of a data file.

    Whoever reads the file adds its name and the line, and decides whether the row is an error or is
    skipped. place: ":column" of a broken JSON line, from 1; "" where no column is known.
    """

    def __init__(self, message: str, column: int | None = None) -> None:
        super().__init__(message)
        self.place = "" if column is None else f":{column}"


@dataclass(frozen=True)
class Chunk:
    """Some records of a file in order, not parsed yet. It can be sent to another process.

    path: the file. lines: (line number from 1, its bytes, or why it cannot be read). values: (row
    number from 1, value) of a JSON array. batch: a pyarrow.RecordBatch, the first row of which is
    number `first`. unread: columns of the file that are not in the batch.
    """

    path: Path
    lines: list[tuple[int, bytes | BadRow]] = field(default_factory=list)
    values: list[tuple[int, Any]] = field(default_factory=list)
    batch: Any = None
    first: int = 1
    unread: tuple[str, ...] = ()

    def records(self) -> Iterator[tuple[int, Any]]:
        """Yields (number, record); a line that cannot be read is the BadRow that says why.

        Raises InputError for columns that Python cannot hold.
        """
        for number, line in self.lines:
            yield number, line if isinstance(line, BadRow) else _json_value(line)
        yield from self.values
        if self.batch is not None:
            with _columns_of(self.path, self.first):
                records = self.batch.to_pylist()
            yield from enumerate(records, start=self.first)


def chunks(path: Path, columns: Columns | None = None) -> Iterator[Chunk]:
    """Yields the chunks of a data file; none where it holds no rows.

    columns: decides which columns of parquet and Arrow are read; None: by the table alone.
    Raises InputError for a file that is broken as a whole, or none of the known kinds.
    """
    columns = columns or Columns()
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if head.startswith(LFS_POINTER):
            raise InputError(
                f"{path}: is a Git LFS pointer, not the data; run git lfs pull in its folder"
            )
        if head.startswith(PARQUET):
            yield from _parquet_chunks(path, columns)
        elif head.startswith((ARROW_FILE, ARROW_STREAM)):
            yield from _arrow_chunks(path, columns, head.startswith(ARROW_FILE))
        else:
            with _open_text(path, head) as text:
                start = text.peek(1).removeprefix(BOM).lstrip(BLANK)  # type: ignore[attr-defined]
                _refuse_csv(path, start)
                is_array = start[:1] == b"["
                yield from _array_chunks(path, text) if is_array else _line_chunks(path, text)
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: broken gzip file: {error}") from error
    except OSError as error:
        raise cannot_be_read(path, error) from error


def json_lines(path: Path, columns: Columns | None = None) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", value) of a data file, one pair a line that is not blank.

    It is for the small files beside the data (prompts, responses made elsewhere), whose readers
    check the values. columns: as in `chunks`. Raises InputError naming file, line and column of
    what is broken, and for what JSON cannot hold.
    """
    for chunk in chunks(path, columns):
        for number, value in chunk.records():
            if isinstance(value, BadRow):
                raise InputError(f"{path}:{number}{value.place}: {value}")
            try:
                json_clean(value)
            except BadRow as error:
                # json_clean speaks of the key that training rows may have; here it is any value.
                what = str(error).removeprefix("answer: ")
                raise InputError(f"{path}:{number}: {what}") from None
            yield f"{path}:{number}", value


def json_clean(value: Any) -> Any:
    """Returns `value` if a UTF-8 JSON file can hold it, else raises BadRow.

    Parquet may hold dates, bytes and the like, which JSON does not know.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"answer: cannot be kept as JSON: {error}") from error
    return value


# ----------------------------------------------------------------------------------- lines of text


@contextmanager
def _open_text(path: Path, head: bytes) -> Iterator[BinaryIO]:
    """The bytes of a text file, decompressed where its first bytes say so."""
    if head.startswith(GZIP):
        with gzip.open(path) as file:
            yield cast(BinaryIO, file)
    elif head.startswith(ZSTD) or ZSTD_SKIPPED.match(head):
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream, 2**17))
    else:
        with path.open("rb") as plain:
            yield cast(BinaryIO, plain)


def _line_chunks(path: Path, file: BinaryIO) -> Iterator[Chunk]:
    lines: list[tuple[int, bytes | BadRow]] = []
    size = 0
    for number, line in _lines(file):
        lines.append((number, line))
        size += 0 if isinstance(line, BadRow) else len(line)
        if size >= CHUNK_BYTES:
            yield Chunk(path, lines=lines)
            lines, size = [], 0
    if lines:
        yield Chunk(path, lines=lines)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | BadRow]]:
    """(line number from 1, the line) for every line that is not blank, up to MAX_ROW_BYTES."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):  # the rest of it, in bounded pieces
                line = file.readline(MAX_ROW_BYTES)
            yield number, BadRow(f"the line is longer than {MAX_ROW_BYTES} bytes")
            continue
        if number == 1:  # a byte order mark
            line = line.removeprefix(BOM)
        line = line.rstrip()
        if line:
            yield number, line


def _json_value(line: bytes) -> Any:
    """The JSON value of `line`, or the BadRow that says why there is none."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            "not UTF-8 text, nor parquet, Arrow, gzip or zstd; expected one JSON object a line"
            + (", saved as UTF-8" if b"{" in line else ""),
            error.start + 1,
        )
    except json.JSONDecodeError as error:
        start = line.lstrip()[:2]
        hint = "; expected one JSON object a line"
        if start in (b"{", b"["):
            hint = "; expected one JSON object a line, or one list of objects as the whole file"
        elif b"\0" in start:
            hint = "; it is not UTF-8 text: save it as UTF-8"
        if start[:1] == b"[":
            hint = "; expected one JSON object a line, not a JSON array"
        return BadRow(f"broken JSON: {error.msg}{hint}", error.pos + 1)
    except RecursionError:
        return BadRow("broken JSON: nested too deeply")
    except ValueError as error:  # a key given twice, an integer of thousands of digits
        return BadRow(f"broken JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each key of which is given once: of two answers neither is taken."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return value


# NaN and Infinity, which Python and pandas write, are read as numbers: no text and no id is one.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _refuse_csv(path: Path, start: bytes) -> None:
    """Raises InputError for a table of text: by its name, or by a first line that names columns.

    start: how the file begins, behind blanks.
    """
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    if start[:1] in (b"", b"{", b"["):
        return
    mark = "\t" if line.count("\t") > line.count(",") else ","
    names = [name.strip().strip('"').lower() for name in line.split(mark)]
    if CSV_NAME.search(path.name) or (
        len(names) > 1
        and all(re.fullmatch(r"[\w .-]+", name) for name in names)
        and not {*READ, *MEANING}.isdisjoint(names)
    ):
        plain = re.fullmatch(r"[\w./ -]+", str(path))  # in a shell, between quotes
        new = f"{CSV_NAME.sub('', str(path))}.parquet"
        tabs = ', delimiter="\\t"' if mark == "\t" else ""
        raise InputError(
            f"{path}: CSV is not read; convert it, and give the new file: python -c 'import "
            "pyarrow.csv as c, pyarrow.parquet as p; p.write_table(c.read_csv("
            f'"{path if plain else "IN"}", parse_options=c.ParseOptions('
            f"newlines_in_values=True{tabs})), "
            f'"{new if plain else "OUT.parquet"}")\''
        )


# ------------------------------------------------------------------------------------- a JSON array


def _array_chunks(path: Path, file: BinaryIO) -> Iterator[Chunk]:
    values: list[tuple[int, Any]] = []
    for number, value in enumerate(_Array(path, file).values(), start=1):
        values.append((number, value))
        if len(values) == CHUNK_ROWS:
            yield Chunk(path, values=values)
            values = []
    if values:
        yield Chunk(path, values=values)


class _Array:
    """A file that is one JSON array, read value by value: in memory are a value and a piece more.

    A broken value ends the file, as where the next one begins cannot be told: it is an InputError.
    """

    BLANKS = re.compile(r"[ \t\r\n]*")
    PIECE = 2**16  # characters read at a time, and more while a value is longer

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.text = ""  # what was read and is not used up
        self.at = 0  # the next character in it
        self.number = 0  # of the value, from 1

    def values(self) -> Iterator[Any]:
        self._mark("[")
        if self._next() == "]":
            self._mark("]")
        else:
            while True:
                self.number += 1
                yield self._value()
                if self._mark(",", "]") == "]":
                    break
        if self._next():
            raise self._broken("something stands behind the array")

    def _more(self) -> bool:
        """Reads on, the more the longer the value is; says whether there was something."""
        left = self.text[self.at :]
        try:
            piece = self.file.read(max(self.PIECE, len(left)))
        except UnicodeDecodeError:
            raise self._broken("not UTF-8 text") from None
        if piece:  # else positions stay what they are
            self.text, self.at = left + piece, 0
        return bool(piece)

    def _next(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blanks = self.BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _mark(self, *expected: str) -> str:
        found = self._next()
        if found not in expected:
            what = f"{found!r} stands" if found else "the file ends"
            raise self._broken(f"{what} where {' or '.join(expected)} was expected")
        self.at += 1
        return found

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                # At the end of what was read a number may go on: "1" was "1e+9".
                is_cut = isinstance(value, int | float) and end > len(self.text) - 4
                if not is_cut or not self._more():
                    self._check_size(end)
                    self.at = end
                    return value
                continue
            except RecursionError:
                raise self._broken("nested too deeply") from None
            except json.JSONDecodeError as error:
                reason = error.msg
            except ValueError as error:  # a key given twice, an integer of thousands of digits
                raise self._broken(str(error)) from None
            if len(self.text) - self.at > MAX_ROW_BYTES:
                raise self._broken(f"{reason}, within {MAX_ROW_BYTES} bytes")
            if not self._more():
                raise self._broken(reason)

    def _check_size(self, end: int) -> None:
        """Raises InputError where the value that ends there is longer than a row may be."""
        if (end - self.at) * 4 > MAX_ROW_BYTES:  # of a character in UTF-8, at most 4 bytes
            if len(self.text[self.at : end].encode("utf-8", "replace")) > MAX_ROW_BYTES:
                raise self._broken(f"the value is longer than {MAX_ROW_BYTES} bytes")

    def _broken(self, reason: str) -> InputError:
        return InputError(
            f"{self.path}:{max(1, self.number)}: broken JSON array: {reason}; mend the row, or "
            "write one JSON object a line"
        )


# ----------------------------------------------------------------------------------------- columns


@contextmanager
def _columns_of(path: Path, row: int, kind: str = "parquet or Arrow") -> Iterator[None]:
    """Turns what pyarrow raises on a broken file into an InputError that names the last good
    row.
    """
    import pyarrow

    try:
        yield
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in FILE_SYSTEM:
            raise cannot_be_read(path, error) from error
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: broken {kind} file after row {row - 1}: {reason}") from error


def _parquet_chunks(path: Path, columns: Columns) -> Iterator[Chunk]:
    """The chunks of a parquet file; columns that say nothing for training are not read."""
    import pyarrow.parquet

    first = 1
    with _columns_of(path, first, "parquet"):
        file = pyarrow.parquet.ParquetFile(path)
    with file:
        with _columns_of(path, first, "parquet"):
            names, unread = _wanted(path, file.schema_arrow, columns)
            batches = file.iter_batches(batch_size=CHUNK_ROWS, columns=names)
        while True:
            with _columns_of(path, first, "parquet"):
                batch = next(batches, None)
            if batch is None:
                return
            yield Chunk(path, batch=batch, first=first, unread=unread)
            first += batch.num_rows


def _arrow_chunks(path: Path, columns: Columns, is_file: bool) -> Iterator[Chunk]:
    """The chunks of an Arrow file or stream, as `datasets.save_to_disk` leaves them."""
    import pyarrow

    first = 1
    with _columns_of(path, first, "Arrow"):
        source = pyarrow.memory_map(str(path))
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
        names, unread = _wanted(path, reader.schema, columns)
        count = reader.num_record_batches if is_file else None
    with source:
        index = 0
        while count is None or index < count:
            with _columns_of(path, first, "Arrow"):
                try:
                    batch = reader.get_batch(index) if is_file else reader.read_next_batch()
                except StopIteration:
                    _check_end(path, source, first)
                    return
                batch = batch.select(names)
                batch.validate(full=True)  # a stranger's offsets may lead out of the file
            index += 1
            for start in range(0, batch.num_rows, CHUNK_ROWS):
                part = batch.slice(start, CHUNK_ROWS)
                yield Chunk(path, batch=part, first=first, unread=unread)
                first += part.num_rows


def _check_end(path: Path, source: Any, row: int) -> None:
    """Raises InputError unless a stream that was read, up to before this row, has its end mark, and
    nothing behind it.

    A stream that is cut between two of its batches looks whole but for that.
    """
    end = source.tell()
    source.seek(max(0, end - len(ARROW_END)))
    if source.read(len(ARROW_END)) != ARROW_END:
        raise InputError(
            f"{path}: broken Arrow file after row {row - 1}: it has no end mark, so it was cut, or "
            "its writer not closed; copy it or write it again"
        )
    if end < source.size():
        raise InputError(
            f"{path}: broken Arrow file after row {row - 1}: something stands behind its end mark; "
            "write it as one stream"
        )


def _wanted(path: Path, schema: Any, columns: Columns) -> tuple[list[str], tuple[str, ...]]:
    """(columns that are read, columns that are not) of a table.

    An unknown one is read where it may hold text: it matters then whether it says something. All
    are, whatever they hold, beside two texts that may be a pair without a prompt. Raises InputError
    for a name that two columns have.
    """
    import pyarrow.types as kinds

    names: list[str] = []
    unread: list[str] = []
    texts = {one.name for one in schema if str(one.type).startswith(TEXT_TYPES)}
    every = any(
        all(not texts.isdisjoint((key, columns.named.get(key, key))) for key in keys)
        for keys in PAIR_KEYS
    )
    for one in schema:
        may_hold_text = kinds.is_nested(one.type) or one.name in texts
        known = use_of(one.name) != "unknown" or one.name in columns.named.values()
        wanted = columns.is_needed(one.name) and (known or may_hold_text)
        wanted = wanted or (every and one.name not in columns.ignored)
        (names if wanted else unread).append(one.name)
        if wanted and names.count(one.name) > 1:
            raise InputError(
                f"{path}: has two columns of the name {one.name!r}; rename one, or leave both out "
                f"with ignore_columns: [{shown(one.name)}]"
            )
    return names, tuple(unread)
