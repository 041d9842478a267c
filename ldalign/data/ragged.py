"""Many lists in one array: token ids, and texts, of rows that are too many to hold one by one.

A list is where it starts in the array and how long it is, so that choosing, reordering and cutting
rows copies none of them. The array may be a file that is mapped into memory: every process that
opens it shares one copy.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

Indices = slice | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | Sequence[int]
Item = TypeVar("Item")


class Ragged(Sequence[Item], Generic[Item]):
    """N lists in one array.

    flat (M,): where all of them lie. starts (N,): the place of each one's first entry. lengths
    (N,): how many entries each has.
    """

    dtype: type[np.generic]

    def __init__(
        self,
        flat: npt.NDArray[Any],
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> None:
        self.flat, self.starts, self.lengths = flat, starts, lengths

    def item(self, values: npt.NDArray[Any]) -> Item:
        """Makes a list's entries what a reader of it expects."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item | Self:
        return self.take(index) if isinstance(index, slice) else self.item(self.array(index))

    def array(self, index: int) -> npt.NDArray[Any]:
        """Returns the entries of one list, not copied."""
        start = self.starts[index]
        return self.flat[start : start + self.lengths[index]]

    def take(self, indices: Indices) -> Self:
        """Returns the chosen lists, in the order in which they were chosen."""
        if not isinstance(indices, slice | np.ndarray):
            indices = np.asarray(indices, dtype=np.int64)
        return type(self)(self.flat, self.starts[indices], self.lengths[indices])

    def cut(self, most: npt.NDArray[np.int64] | int) -> Self:
        """Returns the lists without what each has beyond its first `most` entries."""
        return type(self)(self.flat, self.starts, np.clip(most, 0, self.lengths))

    def equals(self, other: "Ragged[Item]") -> npt.NDArray[np.bool_]:
        """Says of each list whether it is the other's: (N,)."""
        same = self.lengths == other.lengths
        for i in np.flatnonzero(same):
            same[i] = np.array_equal(self.array(int(i)), other.array(int(i)))
        return same


class TokenLists(Ragged[list[int]]):
    """N lists of token ids, int32. One is handed out as a list of Python integers, for as long as
    it is needed.
    """

    def item(self, values: npt.NDArray[Any]) -> list[int]:
        out: list[int] = values.tolist()
        return out

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "TokenLists":
        """Copies lists into one array; what is one already is returned as it is."""
        if isinstance(lists, TokenLists):
            return lists
        return cls._packed([np.asarray(x, dtype=np.int32) for x in lists])

    @classmethod
    def _packed(cls, arrays: Sequence[npt.NDArray[Any]]) -> "TokenLists":
        lengths = np.array([len(x) for x in arrays], dtype=np.int64)
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(flat, ends(lengths) - lengths, lengths)

    @classmethod
    def joined(cls, parts: "Sequence[TokenLists]") -> "TokenLists":
        """Returns the lists of several, one after the other, copied into one array."""
        return cls._packed([part.array(i) for part in parts for i in range(len(part))])


class Texts(Ragged[str]):
    """N texts, UTF-8."""

    def item(self, values: npt.NDArray[Any]) -> str:
        return values.tobytes().decode("utf-8")


def ends(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns where each of lists that lie end to end ends."""
    return np.cumsum(lengths, dtype=np.int64)
