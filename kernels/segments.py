"""Pair attention's work lists, made on the host from a packed batch's segments, for all layers.

`segments` is an (S, 4) int64 tensor on the CPU, rows (begin, end, prefix begin, prefix end): a run
of tokens and the run that goes before it, empty for a prompt or a plain sequence. Token i of a
segment has position (prefix end - prefix begin) + (i - begin); it sees its prefix and its segment
up to itself, and with a window W only keys less than W positions before it. All tokens belong to
exactly one segment, segments are in order.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ldalign.system.transfer import to_device

T = TypeVar("T")
_known = WeakTensorKeyDictionary()


class Segment(NamedTuple):
    """A run of tokens, and the run that goes before it."""

    begin: int
    end: int
    prefix_begin: int
    prefix_end: int

    @property
    def prefix(self) -> int:
        """The number of tokens of the prefix."""
        return self.prefix_end - self.prefix_begin

    @property
    def positions(self) -> int:
        """The number of tokens of prefix and segment.

        It is how many keys the last token sees without a window.
        """
        return self.prefix + self.end - self.begin


class QueryTile(NamedTuple):
    """Rows of one segment.

    They are (token, query head of the group) in this order; `row` is the tile's first.
    """

    row: int
    begin: int
    length: int
    prefix_begin: int
    prefix: int


class KeyTile(NamedTuple):
    """Keys first to end - 1, and which of the readers look at them."""

    first: int
    end: int
    reader: int
    readers_end: int


class Reader(NamedTuple):
    """Queries that see a tile of keys: query i is i - j + shift positions after key j."""

    begin: int
    end: int
    shift: int


def derived(segments: Tensor, what: Hashable, make: Callable[[list[Segment]], T]) -> T:
    """Returns make(segments as a list), made once for each tensor and `what`.

    The tensor is known by its identity, so it must not be written to.
    """
    known: dict[Hashable, Any] = _known.setdefault(segments, {})
    if what not in known:
        known[what] = make([Segment(*row) for row in segments.tolist()])
    result: T = known[what]
    return result


def on_device(device: torch.device, *lists: list[Any]) -> list[Tensor]:
    """Returns lists of tuples of numbers as int32 rows on the device; the host does not wait."""
    return to_device(device, *(torch.tensor(rows, dtype=torch.int32) for rows in lists))


def query_tiles(
    segments: list[Segment], group: int, rows: int, window: int | None
) -> list[QueryTile]:
    """Returns all tokens times the `group` query heads of a key head, `rows` at a time.

    Most keys first, so that the last programs to run are short ones.
    """
    tiles = [
        QueryTile(row, s.begin, s.end - s.begin, s.prefix_begin, s.prefix)
        for s in segments
        for row in range(0, (s.end - s.begin) * group, rows)
    ]
    within = window if window is not None else max((s.positions for s in segments), default=0)
    return sorted(tiles, key=lambda tile: -min(tile.prefix + tile.row // group, within))


def key_tiles(
    segments: list[Segment], keys: int, window: int | None
) -> tuple[list[KeyTile], list[Reader]]:
    """Returns all tokens, at most `keys` at a time.

    None crosses an edge of a segment or prefix; those with most readers come first.
    """
    cuts = sorted({edge for s in segments for edge in s})
    responses: dict[int, list[Segment]] = defaultdict(list)  # of the run that begins at a cut
    for s in segments:
        for cut in _cuts(cuts, s.prefix_begin, s.prefix_end):
            responses[cut].append(s)
    tiles: list[KeyTile] = []
    readers: list[Reader] = []
    for s in segments:
        for cut in _cuts(cuts, s.begin, s.end):
            stop = cuts[bisect_left(cuts, cut) + 1]
            for first in range(cut, stop, keys):
                end = min(first + keys, stop)
                seen_by = [Reader(first, s.end, 0)]
                seen_by += [Reader(r.begin, r.end, r.prefix_end - r.begin) for r in responses[cut]]
                if window is not None:
                    seen_by = [
                        r._replace(end=min(r.end, end - 1 - r.shift + window)) for r in seen_by
                    ]
                seen_by = [r for r in seen_by if r.begin < r.end]
                tiles.append(KeyTile(first, end, len(readers), len(readers) + len(seen_by)))
                readers += seen_by
    work = [sum(r.end - r.begin for r in readers[tile.reader : tile.readers_end]) for tile in tiles]
    return [tiles[i] for i in sorted(range(len(tiles)), key=lambda i: -work[i])], readers


def _cuts(cuts: list[int], begin: int, end: int) -> list[int]:
    return cuts[bisect_left(cuts, begin) : bisect_left(cuts, end)]
