"""Answers to many prompts: dealt among the ranks, kept as they come, gone on with after a stop.

The rows are dealt out before anything is made, by rows and ranks alone. A rank makes all of its own
in one run of the engine: a row enters whenever another leaves, and nobody waits for anybody before
the end. A row that is finished is appended to a file of its rank (`ldalign.system.partial_rows`);
at the end rank 0 merges the files by row. A run that was killed leaves them, and the next one deals
out the rows that are not there, among any number of ranks.

Which rows share a step depends on the deal, and so on ranks and restarts. A row's tokens depend on
it as far as its logits do: with the C++ decoder not at all, with the modules in their last bits
(`ldalign.generation.engine`).
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ldalign.generation.decoders import Decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import read_jsonl, write_text
from ldalign.system.partial_rows import Parts

log = logging.getLogger(__name__)

TOGETHER = 8  # rows of one prompt that a rank gets at a time


def make_answers(
    path: Path,
    requests: Sequence[Request],
    decoder: Decoder,
    new_engine: Callable[[Decoder], Engine],
    record: Callable[[Request, Response], dict[str, Any]],
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
) -> list[dict[str, Any]]:
    """Writes `path`, JSON Lines, one record a request in the order of their indices.

    Returns the records on rank 0, an empty list on the others. All ranks call it with the same
    requests, whose indices are 0, 1, ... Files of an earlier call that was cut short, beside
    `path`, are gone on from: the caller makes sure that they belong to the same requests.

    record: what is kept of a request and its response.
    progress: gets the rows finished, and the tokens made, since it was last called.
    """
    done = set(on_rank0(lambda: _resume(path, requests)))
    if done:
        log.info("%s: goes on: %d of %d answers are there", path, len(done), len(requests))
    progress(len(done) // distributed.world_size(), 0)
    missing = [request for request in requests if request.index not in done]
    mine = deal(missing, distributed.world_size())[distributed.rank()]
    engine = new_engine(decoder)
    with Parts(path).open() as part:
        for request, response in engine.run(mine, lambda _, ids: progress(0, len(ids))):
            part.append([(request.index, record(request, response))])
            progress(1, 0)
    distributed.barrier()
    merged: list[dict[str, Any]] = []
    on_rank0(lambda: merged.extend(_merge(path, len(requests))))
    return merged


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """Returns the requests by the length of their prompts: memory peaks at once, and the last rows
    to enter are short. Equal prompts stay together, for they share pages.
    """
    return sorted(requests, key=lambda request: (-len(request.prompt), request.index))


def deal(requests: Sequence[Request], ranks: int) -> list[list[Request]]:
    """Returns what each of `ranks` makes, longest prompts first; the same on every rank.

    A row goes to the rank with the fewest so far, up to TOGETHER of them at a time where their
    prompts are equal: all ranks get as many rows, to within TOGETHER, and prompts as long.
    """
    hands: list[list[Request]] = [[] for _ in range(ranks)]
    for _, equal in itertools.groupby(longest_first(requests), key=lambda r: tuple(r.prompt)):
        rows = list(equal)
        for i in range(0, len(rows), TOGETHER):
            min(hands, key=len).extend(rows[i : i + TOGETHER])
    return hands


def _resume(path: Path, requests: Sequence[Request]) -> list[int]:
    """Returns the indices that need not be made again."""
    if path.is_file():  # merged before: the run was stopped before the stage had its name
        return [r.index for r in requests]
    return sorted(Parts(path).gather())


def _merge(path: Path, count: int) -> list[dict[str, Any]]:
    """Writes `path` out of the ranks' parts, unless it is there, and removes them."""
    parts = Parts(path)
    if path.is_file():
        records: list[dict[str, Any]] = read_jsonl(path)
    else:
        rows = parts.read()
        if sorted(rows) != list(range(count)):
            raise EnvironmentProblem(
                f"{path}: {len(rows)} of {count} rows can be read back; the disk has lost what was "
                "written: run the same command again, which makes them"
            )
        records = [rows[i] for i in range(count)]
        # The file gets its name when it is whole.
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    parts.remove()
    return records
