"""Answers to many prompts: dealt among the ranks, kept as they come, and gone on with after a stop.

The prompts are cut into chunks, longest prompts first, the same whatever the ranks. A rank takes the next chunk when it
has room, so one that is slow takes fewer; nobody waits for anybody before the end. Every rank appends to a file of its
own; at the end rank 0 merges them by row. A run that was killed leaves those files, and the next one makes what is
missing: single rows where a row's bits do not depend on its company, else whole chunks, so that the answers are those
of a run that was not killed.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ldalign import distributed
from ldalign.decoders import Decoder
from ldalign.engine import Engine, Request
from ldalign.pipeline import on_rank0, read_jsonl, write_text
from ldalign.sampling import Response

CHUNK = 256  # rows
CLAIM = ".claim"


def make_answers(
    path: Path,
    requests: Sequence[Request],
    decoder: Decoder,
    new_engine: Callable[[Decoder], Engine],
    record: Callable[[Request, Response], dict[str, Any]],
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
) -> list[dict[str, Any]]:
    """Writes `path`, a JSON Lines file of one record a request, in the order of their indices; returns them on rank 0.

    All ranks call it with the same requests, whose indices are 0, 1, ... Files of an earlier call that was cut short,
    beside `path`, are gone on from: the caller makes sure that they belong to the same requests.
    """
    done = set(on_rank0(lambda: _resume(path, requests, decoder.row_exact)))
    missing = [[r for r in chunk if r.index not in done] for chunk in chunks(requests)]
    progress(len(done), 0)
    engine = new_engine(decoder)
    with _own_file(path).open("a", encoding="utf-8") as file:
        mine = _claimed(path, missing)
        if decoder.row_exact:
            for request, response in engine.run(request for chunk in mine for request in chunk):
                _write(file, [(request, response)], record)
                progress(1, len(response.ids))
        else:
            for chunk in mine:
                finished = []
                for request, response in engine.run(chunk):
                    finished.append((request, response))
                    progress(1, len(response.ids))
                _write(file, finished, record)
    distributed.barrier()
    merged: list[dict[str, Any]] = []
    on_rank0(lambda: merged.extend(_merge(path, len(requests))))
    return merged


def chunks(requests: Sequence[Request]) -> list[list[Request]]:
    """All requests, longest prompts first; equal prompts stay together, for they share pages."""
    ordered = sorted(requests, key=lambda r: (-len(r.prompt), r.index))
    return [ordered[i : i + CHUNK] for i in range(0, len(ordered), CHUNK)]


def _claimed(path: Path, chunks: Sequence[Sequence[Request]]) -> Iterator[Sequence[Request]]:
    """The chunks this rank gets: it asks for the next one when it is done with the last. A file is a claim."""
    for number, chunk in enumerate(chunks):
        if not chunk:
            continue
        try:
            os.close(os.open(path.with_name(f"{path.name}{CLAIM}{number}"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield chunk


def _own_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.rank{distributed.rank()}")


def _write(file: IO[str], finished: Iterable[tuple[Request, Response]], record: Callable[..., dict[str, Any]]) -> None:
    # One write, then flushed: a killed process leaves whole lines, but maybe for the last.
    lines = (
        json.dumps([request.index, record(request, response)], ensure_ascii=False) for request, response in finished
    )
    file.write("".join(f"{line}\n" for line in lines))
    file.flush()


def _resume(path: Path, requests: Sequence[Request], row_exact: bool) -> list[int]:
    """The indices that need not be made again; they are in one file afterwards, and no claims are left."""
    rows = _read(path)
    if not row_exact:
        whole = [chunk for chunk in chunks(requests) if all(r.index in rows for r in chunk)]
        rows = {r.index: rows[r.index] for chunk in whole for r in chunk}
    kept = path.with_name(f"{path.name}.kept")
    # At once or not at all: the file may hold the rows of an earlier start already.
    write_text(kept, "".join(json.dumps([i, rows[i]], ensure_ascii=False) + "\n" for i in sorted(rows)))
    for part in path.parent.glob(f"{path.name}.rank*"):
        part.unlink()
    for claim in path.parent.glob(f"{path.name}{CLAIM}*"):
        claim.unlink()
    return sorted(rows)


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """The records in all parts, by index; a torn last line does not count. Where they were merged before: of that."""
    if path.is_file():  # the run was stopped before the stage had its name
        return dict(enumerate(read_jsonl(path)))
    rows: dict[int, dict[str, Any]] = {}
    for part in sorted([*path.parent.glob(f"{path.name}.rank*"), *path.parent.glob(f"{path.name}.kept")]):
        for line in part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                index, record = json.loads(line)
            except ValueError:
                continue
            rows[index] = record
    return rows


def _merge(path: Path, count: int) -> list[dict[str, Any]]:
    rows = _read(path)
    assert sorted(rows) == list(range(count)), f"{path}: {len(rows)} of {count} rows were made"
    records = [rows[i] for i in range(count)]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))  # at once or not at all
    parts = [*path.parent.glob(f"{path.name}.rank*"), *path.parent.glob(f"{path.name}{CLAIM}*")]
    for part in [*parts, path.with_name(f"{path.name}.kept")]:
        part.unlink()
    return records
