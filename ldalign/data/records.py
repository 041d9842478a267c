"""JSON values out of JSON Lines and parquet files, each with the place it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ldalign.system.errors import EnvironmentProblem, InputError

MAX_ROW_BYTES = 8 * 1024 * 1024  # a longer line is a broken file, not a conversation
PAIR_KEYS = (("real", "generated"), ("chosen", "rejected"))  # (winner, loser)


class BadRow(ValueError):
    """What is wrong with one record of a data file.

    Whoever reads the file adds its name and the line, and decides whether the row is an error or is
    skipped. place: ":column" of a broken JSON line, from 1; "" where no column is known.
    """

    def __init__(self, message: str, column: int | None = None) -> None:
        super().__init__(message)
        self.place = "" if column is None else f":{column}"


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", value) of a JSON Lines file, one pair a line that is not blank.

    It is for the small files beside the data (prompts, responses made elsewhere), whose readers
    check the values. Raises InputError naming file, line and column of what is broken.
    """
    try:
        for number, value in json_records(path):
            if isinstance(value, BadRow):
                raise InputError(f"{path}:{number}{value.place}: {value}")
            try:
                json_clean(value)
            except BadRow as error:
                # json_clean speaks of the key that training rows may have; here it is any value.
                what = str(error).removeprefix("answer: ")
                raise InputError(f"{path}:{number}: {what}") from None
            yield f"{path}:{number}", value
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); give a JSON Lines file"
        ) from None


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) for every line of a file that is not blank.

    The value of a broken line is the BadRow that says why. A line is read up to MAX_ROW_BYTES.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):  # the rest of it, in bounded pieces
                    line = file.readline(MAX_ROW_BYTES)
                yield number, BadRow(f"the line is longer than {MAX_ROW_BYTES} bytes")
                continue
            if number == 1:  # a byte order mark
                line = line.removeprefix(b"\xef\xbb\xbf")
            line = line.rstrip()
            if line:
                yield number, _json_value(line)


def _json_value(line: bytes) -> Any:
    """The JSON value of `line`, or the BadRow that says why there is none."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return BadRow(
            "not UTF-8 text, nor a parquet file; expected one JSON object a line", error.start + 1
        )
    except json.JSONDecodeError as error:
        array = line.lstrip()[:1] == b"["
        hint = "; expected one JSON object a line, not a JSON array" if array else ""
        return BadRow(f"broken JSON: {error.msg}{hint}", error.pos + 1)
    except RecursionError:
        return BadRow("broken JSON: nested too deeply")
    except ValueError as error:  # NaN, or an integer of thousands of digits
        return BadRow(f"broken JSON: {error}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (row number from 1, record) of a parquet file, batch by batch.

    Only known columns are read; null fields are left out. Raises InputError for a broken file,
    EnvironmentProblem without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path}: reading parquet needs pyarrow; pip install ldalign[parquet]"
        ) from error
    used = {"id", "messages", "prompt", "response", "completion", "kind", "answer"}
    used.update(key for keys in PAIR_KEYS for key in keys)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in used]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {key: value for key, value in record.items() if value is not None}
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: broken parquet file after row {number}: {reason}") from error


def json_clean(value: Any) -> Any:
    """Returns `value` if a UTF-8 JSON file can hold it, else raises BadRow.

    Parquet may hold dates, bytes and the like, which JSON does not know.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"answer: cannot be kept as JSON: {error}") from error
    return value
