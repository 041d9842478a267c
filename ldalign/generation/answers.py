"""Answers to many prompts: dealt among the ranks, kept as they come, gone on with after a stop.

The prompts are cut into chunks, longest prompts first, the same whatever the ranks. A rank takes
the next chunk when it has room, so one that is slow takes fewer; nobody waits for anybody before
the end. Every rank appends to a file of its own (`ldalign.system.partial_rows`); at the end rank 0
merges them by row. A run that was killed leaves those files, and the next one makes what is
missing: single rows where a row's bits do not depend on its company, else whole chunks, so that the
answers are those of a run that was not killed.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldalign.generation.decoders import Decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.files import read_jsonl, write_text
from ldalign.system.partial_rows import Parts, append

log = logging.getLogger(__name__)

CHUNK = 256  # rows that a rank takes at a time
CLAIM = ".claim"  # an empty file, PATH.claimN: chunk N has its rank


def make_answers(
    path: Path,
    requests: Sequence[Request],
    decoder: Decoder,
    new_engine: Callable[[Decoder], Engine],
    record: Callable[[Request, Response], dict[str, Any]],
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
    chunk_rows: int | None = None,
) -> list[dict[str, Any]]:
    """Writes `path`, JSON Lines, one record a request in the order of their indices.

    Returns the records on rank 0, an empty list on the others. All ranks call it with the same
    requests, whose indices are 0, 1, ... Files of an earlier call that was cut short, beside
    `path`, are gone on from: the caller makes sure that they belong to the same requests.

    record: what is kept of a request and its response.
    progress: gets the rows and new tokens finished since it was last called.
    chunk_rows: a chunk's rows; None: CHUNK.
    """
    size = chunk_rows or CHUNK
    done = set(on_rank0(lambda: _resume(path, requests, decoder.row_exact, size)))
    missing = [[r for r in chunk if r.index not in done] for chunk in chunks(requests, size)]
    if done:
        log.info("%s: goes on: %d of %d answers are there", path, len(done), len(requests))
    progress(len(done) // distributed.world_size(), 0)
    engine = new_engine(decoder)
    with Parts(path).open() as file:
        mine = _claimed(path, missing)
        if decoder.row_exact:
            for request, response in engine.run(request for chunk in mine for request in chunk):
                append(file, [(request.index, record(request, response))])
                progress(1, len(response.ids))
        else:
            # A row's last bits depend on its company: a chunk is kept whole, or made again whole.
            for chunk in mine:
                finished = []
                for request, response in engine.run(chunk):
                    finished.append((request.index, record(request, response)))
                    progress(1, len(response.ids))
                append(file, finished)
    distributed.barrier()
    merged: list[dict[str, Any]] = []
    on_rank0(lambda: merged.extend(_merge(path, len(requests))))
    return merged


def chunks(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Returns all requests, `size` at a time, longest prompts first.

    Equal prompts stay together, for they share pages.
    """
    ordered = sorted(requests, key=lambda r: (-len(r.prompt), r.index))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _claimed(path: Path, chunks: Sequence[Sequence[Request]]) -> Iterator[Sequence[Request]]:
    """Yields the chunks that this rank gets: it claims one when it is done with the last."""
    for number, chunk in enumerate(chunks):
        if not chunk:
            continue
        claim = path.with_name(f"{path.name}{CLAIM}{number}")
        try:
            # Made by one rank alone: the file system decides, and no rank asks another.
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield chunk


def _drop_claims(path: Path) -> None:
    for claim in path.parent.glob(f"{path.name}{CLAIM}*"):
        claim.unlink()


def _resume(path: Path, requests: Sequence[Request], row_exact: bool, size: int) -> list[int]:
    """Returns the indices that need not be made again; no claims are left."""
    _drop_claims(path)
    if path.is_file():  # merged before: the run was stopped before the stage had its name
        return [r.index for r in requests]
    alone = None if row_exact else [[r.index for r in chunk] for chunk in chunks(requests, size)]
    return sorted(Parts(path).gather(alone))


def _merge(path: Path, count: int) -> list[dict[str, Any]]:
    """Writes `path` out of the ranks' parts, unless it is there, and removes them."""
    parts = Parts(path)
    if path.is_file():
        records: list[dict[str, Any]] = read_jsonl(path)
    else:
        rows = parts.read()
        assert sorted(rows) == list(range(count)), f"{path}: {len(rows)} of {count} rows were made"
        records = [rows[i] for i in range(count)]
        # The file gets its name when it is whole.
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    _drop_claims(path)
    parts.remove()
    return records
