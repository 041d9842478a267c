"""Pages of the key/value cache: which row has which. The memory itself is the decoders'
(`ldalign.generation.decoders`).

The scheme is PagedAttention's (Kwon et al., arXiv 2309.06180): the cache is cut into pages of 16
tokens, a row's pages lie anywhere, and rows whose prompts begin alike share the pages of that
beginning.
"""

import numpy as np

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """The numbers of free pages, and how many rows have each of the others."""

    def __init__(self, pages: int) -> None:
        # a stack: the last is taken first
        self._free = np.arange(pages, dtype=np.int32)[::-1].copy()
        self._count = pages
        self._users = np.zeros(pages, dtype=np.int32)

    @property
    def free(self) -> int:
        """Pages nobody has."""
        return self._count

    def take(self, count: int) -> np.ndarray:
        """`count` free pages, now with one user each: (count,) int32. The caller has looked at
        `free`.
        """
        assert count <= self._count, f"{count} pages wanted, {self._count} free"
        self._count -= count
        taken = self._free[self._count : self._count + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def share(self, pages: np.ndarray) -> None:
        """One user more for each of these pages."""
        self._users[pages] += 1

    def give_back(self, pages: np.ndarray) -> np.ndarray:
        """One user less; the pages that now have none are free, and returned."""
        self._users[pages] -= 1
        freed: np.ndarray = pages[self._users[pages] == 0]
        self._free[self._count : self._count + len(freed)] = freed
        self._count += len(freed)
        return freed


class SharedPages:
    """Full pages of the prompts under way, found by what they hold: rows with a common beginning
    need it once.

    A page is told by its tokens and by the page before it, which stands for all that comes before.
    """

    def __init__(self, pages: int) -> None:
        self._page: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._computed = np.zeros(pages, dtype=bool)

    def find(self, prompt: tuple[int, ...]) -> tuple[list[int], bool]:
        """The pages that hold the prompt's beginning, short of its last token; and whether all of
        them are computed.
        """
        found: list[int] = []
        for i in range((len(prompt) - 1) // PAGE):
            page = self._page.get((found[-1] if found else -1, prompt[i * PAGE : (i + 1) * PAGE]))
            if page is None:
                break
            found.append(page)
        return found, bool(self._computed[found].all())

    def add(self, prompt: tuple[int, ...], pages: np.ndarray) -> None:
        """Makes a new row's full prompt pages known; they are not computed yet, but for those known
        before.
        """
        before = -1
        for i in range(len(prompt) // PAGE):
            key = before, prompt[i * PAGE : (i + 1) * PAGE]
            before = int(pages[i])
            if key not in self._page:
                self._page[key], self._key[before] = before, key
                self._computed[before] = False

    def computed(self, pages: np.ndarray) -> None:
        """These hold what they will hold."""
        self._computed[pages] = True

    def forget(self, pages: np.ndarray) -> None:
        """These are free. A page goes no later than those that follow it: whoever has them has it
        too.
        """
        for page in pages.tolist():
            key = self._key.pop(page, None)
            if key is not None:
                del self._page[key]
