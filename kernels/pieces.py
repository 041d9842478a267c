"""How the head's rows are cut into pieces whose logits fit a workspace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORKSPACE_BYTES = 2_500_000_000  # a GPU's, for one piece's logits
FEWEST_ROWS = 4096  # of a GPU's piece, where they fit: the products' speed falls with fewer
LEAST_ROWS = 256  # where they do not: with fewer it were better to be told that memory is short


@dataclass(frozen=True)
class Piece:
    """A run of whole pairs: rows start to stop, and which pairs and responses they are."""

    start: int
    stop: int
    pairs: slice

    @property
    def responses(self) -> slice:
        """The responses of its pairs: 2p and 2p + 1 of pair p."""
        return slice(2 * self.pairs.start, 2 * self.pairs.stop)

    def rows(self, most: int) -> Iterator[slice]:
        """Yields the piece's rows, at most `most` at a time.

        That is one visit, unless a single pair is longer than the workspace.
        """
        return (slice(i, min(i + most, self.stop)) for i in range(self.start, self.stop, most))


def piece_rows(row_bytes: int, free: int | None) -> int:
    """Returns the most rows of a piece on a GPU whose logits take `row_bytes` each.

    They fill WORKSPACE_BYTES, or more where FEWEST_ROWS need more, but not over half of the `free`
    bytes (None: as many as are wanted), of which activations, gradients and fragments have a share,
    unless that were less than LEAST_ROWS. A power of two, so that a little more or less free memory
    cuts the same pieces.
    """
    budget = max(WORKSPACE_BYTES, FEWEST_ROWS * row_bytes)
    if free is not None:
        budget = min(budget, free // 2)
    return 1 << (max(LEAST_ROWS, budget // row_bytes).bit_length() - 1)


def row_pieces(rows: int, most: int) -> Iterator[slice]:
    """Yields rows 0 to `rows` in steps of `most`."""
    return (slice(i, min(i + most, rows)) for i in range(0, rows, most))


def whole_pairs(lengths: Sequence[int], most: int) -> Iterator[Piece]:
    """Yields consecutive pairs (two lengths each) in pieces of at most `most` rows.

    A longer pair is a piece of its own.
    """
    first = start = stop = 0
    for pair, size in enumerate(map(sum, zip(lengths[0::2], lengths[1::2], strict=True))):
        if stop > start and stop + size - start > most:
            yield Piece(start, stop, slice(first, pair))
            first, start = pair, stop
        stop += size
    if stop > start:
        yield Piece(start, stop, slice(first, len(lengths) // 2))
