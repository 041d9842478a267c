"""Pages of the key/value cache: which row has which. The memory itself is the decoders' (`ldalign.decoders`).

The scheme is PagedAttention's (Kwon et al., arXiv 2309.06180): the cache is cut into pages of 16 tokens, a row's pages
lie anywhere, and rows with the same prompt share the pages that hold nothing else.
"""

import numpy as np

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """The numbers of free pages, and how many rows have each of the others."""

    def __init__(self, pages: int) -> None:
        self._free = np.arange(pages, dtype=np.int32)[::-1].copy()  # a stack: the last is taken first
        self._count = pages
        self._users = np.zeros(pages, dtype=np.int32)

    @property
    def free(self) -> int:
        """Pages nobody has."""
        return self._count

    def take(self, count: int) -> np.ndarray:
        """`count` free pages, now with one user each: (count,) int32. The caller has looked at `free`."""
        assert count <= self._count, f"{count} pages wanted, {self._count} free"
        self._count -= count
        taken = self._free[self._count : self._count + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def share(self, pages: np.ndarray) -> None:
        """One user more for each of these pages."""
        self._users[pages] += 1

    def give_back(self, pages: np.ndarray) -> None:
        """One user less; pages without users are free."""
        self._users[pages] -= 1
        freed = pages[self._users[pages] == 0]
        self._free[self._count : self._count + len(freed)] = freed
        self._count += len(freed)
