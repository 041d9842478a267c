"""The rows of a split as files: their texts, a line each, and their tokens, mapped into memory.

NAME.jsonl holds a JSON object a row, in the order in which rows are used. NAME.tokens.npy (int32)
holds each row's prompt, response and, of preference rows, rejected response, end to end.
NAME.index.npy (int64) has a line of `COLUMNS` a row. Whoever opens them holds no row: all processes
of a machine share the pages of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, overload

import numpy as np
import numpy.typing as npt

from ldalign.data.pairs import Pairs
from ldalign.data.ragged import Texts, TokenLists, ends
from ldalign.data.rows import Row
from ldalign.system.files import again, open_to_write, reading, save_array, sync, writing

if TYPE_CHECKING:
    from ldalign.data.encoding import FittedRow

# What a line of the index says: the length of the row's text in bytes, of the id in it as it is
# written there, and of each list of tokens; -1 rejected tokens: there is no rejected response.
COLUMNS = ("text", "id", "prompt", "response", "rejected")
_BEGIN = b'{"id": '
PART_FILES = (".lines", ".tokens", ".index.npy")
MOST_OPEN = 256  # files at a time
_AT_ONCE = 2**22  # tokens that are looked at


@dataclass(frozen=True)
class Split:
    """The rows of one split."""

    rows: Sequence[Row]
    pairs: Pairs  # one a row, without a loser: an SFT row as it stands
    rejected: TokenLists | None = None  # of preference rows


NO_ROWS = Split([], Pairs.of([]))


class StoredRows(Sequence[Row]):
    """Rows in a file: each is read when it is asked for."""

    def __init__(self, texts: Texts, path: Path) -> None:
        self.texts, self.path = texts, path

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Row | Self:
        if isinstance(index, slice):
            return type(self)(self.texts.take(index), self.path)
        text = self.texts.array(index)  # here: an IndexError ends who goes through a sequence
        with reading(f"{self.path}: row {index + 1}", again(self.path.parent)):
            return read_line(self.texts.item(text))

    def lines(self) -> Iterator[bytes]:
        """Yields the rows' lines, read from the file: pages of a map would stay in memory."""
        with self.path.open("rb") as file:
            for start, length in zip(self.texts.starts, self.texts.lengths, strict=True):
                file.seek(int(start))
                yield file.read(int(length))


class StoredIds(Sequence[str]):
    """The ids of rows in a file."""

    def __init__(self, texts: Texts, path: Path) -> None:
        self.texts, self.path = texts, path

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> str | Self:
        if isinstance(index, slice):
            return type(self)(self.texts.take(index), self.path)
        text = self.texts.array(index)
        with reading(f"{self.path}: row {index + 1}", again(self.path.parent)):
            name = json.loads(self.texts.item(text))
            if not isinstance(name, str):
                raise TypeError(f"an id that is {name!r:.80}")
            return name


# --------------------------------------------------------------------------------- a row and a line


def write_line(row: Row) -> tuple[bytes, int]:
    """Returns a row as a line of a file, and the length of the id in it."""
    messages = [*row.history, {"role": "assistant", "content": row.response}]
    record: dict[str, Any] = {"messages": messages}
    if row.rejected is not None:
        loser = [*row.history, {"role": "assistant", "content": row.rejected}]
        record = {"chosen": messages, "rejected": loser}
    if row.kind is not None:
        record |= {"kind": row.kind, "answer": row.answer}
    name = json.dumps(row.id, ensure_ascii=False).encode()
    rest = json.dumps(record, ensure_ascii=False).encode()
    return _BEGIN + name + b", " + rest.removeprefix(b"{") + b"\n", len(name)


def read_line(line: str) -> Row:
    """Returns the row that a line of `write_line` holds."""
    record = json.loads(line)
    messages = record.get("messages") or record["chosen"]
    rejected = record["rejected"][-1]["content"] if "rejected" in record else None
    texts = [message["content"] for message in messages]
    if not all(isinstance(text, str) for text in (record["id"], *texts[-1:], rejected or "")):
        raise TypeError("an id or a response that is no text")
    return Row(
        record["id"],
        tuple(messages[:-1]),
        messages[-1]["content"],
        rejected,
        record.get("kind"),
        record.get("answer"),
    )


def data_hash(rows: Iterable[Row]) -> str:
    """Returns the sha256 (hex) of the content of `rows`, in their order: of their lines.

    Where they were read from does not count.
    """
    digest = hashlib.sha256()
    stored = rows.lines() if isinstance(rows, StoredRows) else (write_line(row)[0] for row in rows)
    for line in stored:
        digest.update(line)
    return digest.hexdigest()


def tokens_hash(split: Split) -> str:
    """Returns the sha256 (hex) of the token ids of a split's rows, in their order."""
    digest = hashlib.sha256()
    for lists in (split.pairs.prompts, split.pairs.real, split.rejected):
        if lists is not None:
            digest.update(lists.lengths.tobytes())
            for i in range(len(lists)):
                digest.update(lists.array(i).tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------- files


class PartWriter:
    """Writes rows in the order in which they come: PATH.lines, PATH.tokens, PATH.index.npy.

    Raises EnvironmentProblem where one cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: list[list[int]] = []

    def __enter__(self) -> Self:
        self.files = contextlib.ExitStack()
        opened = (open_to_write(Path(f"{self.path}.{kind}")) for kind in ("lines", "tokens"))
        self.lines, self.tokens = map(self.files.enter_context, opened)
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()
        index = np.array(self.index, dtype=np.int64).reshape(-1, len(COLUMNS))
        save_array(Path(f"{self.path}.index.npy"), index)
        for ending in PART_FILES:  # before it is said anywhere that they are there
            sync(Path(f"{self.path}{ending}"))

    def add(self, fitted: FittedRow) -> int:
        """Writes a row; returns its number in the part."""
        line, name = write_line(fitted.row)
        lists = [fitted.prompt, fitted.response, fitted.rejected or []]
        tokens = np.array(
            [*fitted.prompt, *fitted.response, *(fitted.rejected or [])], dtype=np.int32
        )
        with writing(self.path):
            self.lines.write(line)
            self.tokens.write(tokens.tobytes())
        lengths = [len(tokens) for tokens in lists]
        if fitted.rejected is None:
            lengths[-1] = -1
        self.index.append([len(line), name, *lengths])
        return len(self.index) - 1


class Part:
    """What a `PartWriter` wrote: its index in memory, the rest in its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = np.load(f"{path}.index.npy")
        lines, tokens = self.index[:, 0], np.maximum(self.index[:, 2:], 0).sum(axis=1)
        self.begins = np.stack([ends(lines) - lines, ends(tokens) - tokens], axis=1)
        self.sizes = np.stack([lines, tokens], axis=1)


def write_split(folder: Path, name: str, chosen: Sequence[tuple[Part, int]]) -> None:
    """Writes the files of a split: chosen rows of parts, as they come.

    Raises EnvironmentProblem where one cannot be written.
    """
    index = np.array([part.index[i] for part, i in chosen], dtype=np.int64)
    index = index.reshape(-1, len(COLUMNS))
    save_array(folder / f"{name}.index.npy", index)
    total = int(np.maximum(index[:, 2:], 0).sum())
    with open_to_write(folder / f"{name}.tokens.npy") as tokens:
        np.lib.format.write_array_header_1_0(
            tokens, {"descr": "<i4", "fortran_order": False, "shape": (total,)}
        )
        _copy(tokens, chosen, "tokens", 1, 4)
    with open_to_write(folder / f"{name}.jsonl") as lines:
        _copy(lines, chosen, "lines", 0, 1)


def _copy(
    out: IO[bytes], chosen: Sequence[tuple[Part, int]], suffix: str, column: int, width: int
) -> None:
    """Copies the chosen rows' bytes from the parts' files, entries of `width` bytes, without
    holding more than one row.
    """
    with contextlib.ExitStack() as stack:
        files: dict[Path, IO[bytes]] = {}
        for part, i in chosen:
            if part.path not in files:
                if len(files) == MOST_OPEN:
                    stack.close()
                    files = {}
                file = Path(f"{part.path}.{suffix}").open("rb")
                files[part.path] = stack.enter_context(file)
            begin, size = part.begins[i, column], part.sizes[i, column]
            data = os.pread(files[part.path].fileno(), int(size) * width, int(begin) * width)
            out.write(data)


def open_split(folder: Path, name: str, vocabulary: int) -> Split:
    """Opens the files of a split in place.

    vocabulary: token ids are below it. Raises InputError where the files, which may be a
    stranger's, do not fit each other.
    """
    with reading(folder / f"{name}.index.npy", again(folder)):
        # Mapped: its header may promise more than the file has, or than there is memory.
        index = np.load(folder / f"{name}.index.npy", mmap_mode="r", allow_pickle=False)
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != len(COLUMNS):
            raise ValueError(f"{index.dtype} of shape {index.shape}, in place of an index")
        if not len(index):
            return NO_ROWS
        lines = np.memmap(folder / f"{name}.jsonl", dtype=np.uint8, mode="r")
        flat = np.load(folder / f"{name}.tokens.npy", mmap_mode="r", allow_pickle=False)
        index = _checked_index(index, len(lines), flat)
    with reading(folder / f"{name}.tokens.npy", again(folder)):
        _check_tokens(flat, vocabulary)
    text, ids, *tokens = index.T
    texts = Texts(lines, ends(text) - text, text)
    prompt, response, rejected = (np.maximum(n, 0) for n in tokens)
    begin = ends(prompt + response + rejected) - prompt - response - rejected
    prompts, real, losers = (
        TokenLists(flat, start, lengths)
        for start, lengths in (
            (begin, prompt),
            (begin + prompt, response),
            (begin + prompt + response, rejected),
        )
    )
    path = folder / f"{name}.jsonl"
    names = StoredIds(Texts(lines, texts.starts + len(_BEGIN), ids), path)
    preference = bool((index[:, -1] >= 0).all())
    rows = StoredRows(texts, path)
    return Split(rows, Pairs(names, prompts, real), losers if preference else None)


def _checked_index(index: npt.NDArray[Any], size: int, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns an index (N, 5) in memory, whose rows lie end to end in a text of `size` bytes and in
    the tokens `flat`. Raises ValueError for any other.
    """
    if len(index) > size:
        raise ValueError(f"{len(index)} rows in {size} bytes of text")
    if flat.dtype != np.int32 or flat.ndim != 1:
        raise ValueError(f"tokens that are {flat.dtype} of shape {flat.shape}")
    index = np.array(index)
    text, ids, prompt, response, rejected = index.T
    ends_within = len(_BEGIN) + ids <= text  # the id
    if (index[:, :4] < 0).any() or (rejected < -1).any() or not ends_within.all():
        raise ValueError("a length that none can be")
    for what, lengths, whole in (
        ("bytes of text", (text,), size),
        ("tokens", (prompt, response, np.maximum(rejected, 0)), len(flat)),
    ):
        # In float64, which has whole numbers as large as any file, and does not wrap around.
        total = sum(float(part.sum(dtype=np.float64)) for part in lengths)
        if total != whole:
            raise ValueError(f"{total:.0f} {what}, of which there are {whole}")
    return index


def _check_tokens(flat: npt.NDArray[Any], vocabulary: int) -> None:
    """Raises ValueError for a token id that is not in the vocabulary."""
    for first in range(0, len(flat), _AT_ONCE):
        piece = flat[first : first + _AT_ONCE]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocabulary:
            odd = low if low < 0 else high
            raise ValueError(f"token id {odd}, but the vocabulary has {vocabulary} entries")
