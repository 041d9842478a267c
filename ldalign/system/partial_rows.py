"""Rows that are done, kept on disk while their stage is under way: a killed run goes on from them.

Every rank appends to a file of its own, a line `CHECKSUM [index, record]` a row, in any order; the
next start gathers these files, however many ranks wrote them or come after. In a `table`, where a
row's last bits depend on the rows it is computed with, rows are computed in chunks that are the
same whatever the ranks, and a chunk counts whole or not at all: so what a killed run ends with is
to the bit what an undisturbed one ends with. A float comes back from its JSON text as it was.

A killed process loses nothing that was appended: at most its last line is torn, and does not count.
Nor does a line whose checksum (crc32, of all behind it) is another's: its row is made again.
A machine that stops loses, beside that, what was appended in SYNC_SECONDS after the last sync.

The caller makes sure that the files belong to the same rows: a stage that can be gone on with is
refused where it was begun from anything else (`manifest.run_stage`).
"""

import contextlib
import json
import logging
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldalign.system import distributed
from ldalign.system.errors import NumericsError
from ldalign.system.files import write_text
from ldalign.system.transfer import Arriving

log = logging.getLogger(__name__)

FOLDER = "parts"  # in the temporary folder of a stage; goes when the stage is finished
SYNC_SECONDS = 10.0  # between two syncs of a rank's file: a sync a row would slow the work


# -------------------------------------------------------------------------------------------- files


class Parts:
    """The files of one piece of work: `path` with a suffix each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def gather(self, chunks: Sequence[Sequence[int]] | None = None) -> dict[int, Any]:
        """Returns the records that are done, by index, and leaves them in one file.

        Called on rank 0 alone, before any `open`. chunks: those of which only the whole ones count;
        None: rows count one by one.
        """
        rows = self.read()
        if chunks is not None:
            rows = {i: rows[i] for chunk in chunks if rows.keys() >= set(chunk) for i in chunk}
        self.path.parent.mkdir(exist_ok=True)
        # At once or not at all: the file may hold the rows of an earlier start already.
        write_text(self._kept, "".join(_line(i, rows[i]) for i in sorted(rows)))
        for part in self._of_ranks():
            part.unlink()
        return rows

    def read(self) -> dict[int, Any]:
        """Returns the records in all files, by index; a torn last line does not count, nor does
        a damaged one, which is said.
        """
        rows: dict[int, Any] = {}
        for part in sorted([*self._of_ranks(), *([self._kept] if self._kept.is_file() else [])]):
            lines = part.read_bytes().split(b"\n")[:-1]
            found = [record for line in lines if (record := _record(line)) is not None]
            rows.update(found)
            if damaged := len(lines) - len(found):
                log.warning("%s: %d of %d rows are damaged, not used", part, damaged, len(lines))
        return rows

    @contextlib.contextmanager
    def open(self) -> Iterator["Part"]:
        """Opens this rank's own file, to append to."""
        own = self.path.with_name(f"{self.path.name}.rank{distributed.rank()}")
        with own.open("a", encoding="utf-8") as file:
            yield Part(file)

    def remove(self) -> None:
        """Removes the files: called on rank 0 alone, when the records are elsewhere."""
        for part in self._of_ranks():
            part.unlink()
        self._kept.unlink(missing_ok=True)

    @property
    def _kept(self) -> Path:
        return self.path.with_name(f"{self.path.name}.kept")

    def _of_ranks(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}.rank*"))


class Part:
    """A rank's own file. clock: seconds, from anywhere."""

    def __init__(self, file: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.synced = clock()

    def append(self, rows: Iterable[tuple[int, Any]]) -> None:
        """Adds (index, record) of rows, and syncs the file if the last time is SYNC_SECONDS ago."""
        # One write, then flushed: a killed process leaves whole lines, but maybe for the last.
        self.file.write("".join(_line(index, record) for index, record in rows))
        self.file.flush()
        now = self.clock()
        if now - self.synced >= SYNC_SECONDS:
            os.fsync(self.file.fileno())
            self.synced = now


def _line(index: int, record: Any) -> str:
    text = json.dumps([index, record], ensure_ascii=False)
    return f"{zlib.crc32(text.encode('utf-8')):08x} {text}\n"


def _record(line: bytes) -> tuple[int, Any] | None:
    """The row that a line holds; None where it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        index, record = json.loads(text)
    except ValueError:  # an empty line has a checksum too
        return None
    return index, record


# -------------------------------------------------------------------------------------------- table


def table(
    chunks: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Tensor],
    width: int,
    refusal: Callable[[int, float], str],
    path: Path | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """Computes a table in chunks of rows: (N, width) float64 on the CPU, the same on all ranks.

    work: makes (n, width) of the n row indices of a chunk. All ranks call this with the same
    chunks, which hold each of 0 to N - 1 once and do not depend on the ranks, and share them.
    path: where chunks that are done are kept, and gone on from; None: nowhere. Raises
    NumericsError on all ranks alike, with refusal(index, value), where a value is not finite;
    the other chunks are kept.
    """
    parts = None if path is None else Parts(path)
    values: dict[int, list[float]] = {}  # this rank's; rank 0 has those of earlier starts too

    def resume() -> list[int]:
        values.update(parts.gather(chunks) if parts else {})
        return list(values)

    done = set(distributed.on_rank0(resume))
    progress(len(done))
    total = sum(map(len, chunks))
    if done:
        log.info("%s: goes on: %d of %d rows are there", path, len(done), total)
    left = total - len(done)
    missing = [chunk for chunk in chunks if not done.issuperset(chunk)]
    odd: list[tuple[int, float]] = []
    with parts.open() if parts else contextlib.nullcontext() as part:
        mine = missing[distributed.rank() :: distributed.world_size()]
        for chunk, rows in _one_behind(mine, work):
            numbers = [(i, x) for i, row in zip(chunk, rows, strict=True) for x in row]
            odd = [(i, x) for i, x in numbers if not math.isfinite(x)]
            if odd:
                break
            values.update(zip(chunk, rows, strict=True))
            if part is not None:
                part.append(zip(chunk, rows, strict=True))
            # The other ranks are about as far.
            moved = min(left, len(chunk) * distributed.world_size())
            left -= moved
            progress(moved)
    refused = [row for rows in distributed.on_all(lambda: odd) for row in rows]
    if refused:
        raise NumericsError(refusal(*min(refused)))
    own = torch.tensor(list(values.values()), dtype=torch.float64).reshape(-1, width)
    return distributed.merge_rows(total, list(values), own)


def _one_behind(
    chunks: Iterable[Sequence[int]], work: Callable[[Sequence[int]], Tensor]
) -> Iterator[tuple[Sequence[int], list[list[float]]]]:
    """Yields each chunk with its rows. A GPU's are read when it has got the chunk after them, so
    that it is not without work in between.
    """
    started: deque[tuple[Sequence[int], Arriving]] = deque()

    def read() -> tuple[Sequence[int], list[list[float]]]:
        chunk, values = started.popleft()
        return chunk, values.arrived().tolist()

    for chunk in chunks:
        try:
            started.append((chunk, Arriving(work(chunk).double())))
        except Exception:
            if started:  # the chunk before it counts
                yield read()
            raise
        if len(started) > 1 or started[0][1].event is None:
            yield read()
    if started:
        yield read()
