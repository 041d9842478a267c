"""Which row of a generation has which pages of the key/value cache.

Numbers only: the memory itself is the decoders' (`ldalign.generation.decoders`). The scheme is
PagedAttention's (Kwon et al., arXiv 2309.06180): the cache is cut into pages of 16 tokens, a row's
pages lie anywhere, and rows whose prompts begin alike share the pages of that beginning.
"""

import numpy as np

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """Returns how many pages hold so many tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """Keeps the numbers of the free pages, and how many rows use each of the others."""

    def __init__(self, pages: int) -> None:
        # A stack: the pages given back last are taken first.
        self._free = np.arange(pages, dtype=np.int32)[::-1].copy()  # its first `_count` are free
        self.size = self._count = self._fewest = pages
        self._users = np.zeros(pages, dtype=np.int32)

    @property
    def free(self) -> int:
        """The number of pages that no row uses."""
        return self._count

    @property
    def untouched(self) -> int:
        """The number of pages that no row has used yet."""
        return self._fewest

    def take(self, count: int) -> np.ndarray:
        """Takes `count` free pages, (count,) int32; each has one user then.

        The caller has looked at `free`.
        """
        assert count <= self._count, f"{count} pages wanted, {self._count} free"
        self._count -= count
        self._fewest = min(self._fewest, self._count)
        taken = self._free[self._count : self._count + count][::-1].copy()
        self._users[taken] = 1
        return taken

    def share(self, pages: np.ndarray) -> None:
        """Counts one user more for each of these pages."""
        self._users[pages] += 1

    def give_back(self, pages: np.ndarray) -> np.ndarray:
        """Counts one user less for each of these pages; returns those that are free now."""
        self._users[pages] -= 1
        freed: np.ndarray = pages[self._users[pages] == 0]
        self._free[self._count : self._count + len(freed)] = freed
        self._count += len(freed)
        return freed


class SharedPages:
    """Finds full pages of the prompts under way by what they hold, so that rows share them.

    A page is known by its tokens and by the page before it, which stands for all that comes before.
    """

    def __init__(self, pages: int) -> None:
        # (page before, -1 for none; the page's tokens) -> page, and back
        self._page: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._computed = np.zeros(pages, dtype=bool)

    def find(self, prompt: tuple[int, ...]) -> tuple[list[int], bool]:
        """Returns the pages that hold the prompt's beginning, and whether all are computed.

        They stop short of the prompt's last token.
        """
        found: list[int] = []
        # Short of the last token: the row computes that itself, for the logits after it.
        for i in range((len(prompt) - 1) // PAGE):
            before = found[-1] if found else -1
            page = self._page.get((before, prompt[i * PAGE : (i + 1) * PAGE]))
            if page is None:
                break
            found.append(page)
        return found, bool(self._computed[found].all())

    def add(self, prompt: tuple[int, ...], pages: np.ndarray) -> None:
        """Makes the full prompt pages of a new row known.

        Those that nobody had are not computed yet.
        """
        before = -1
        for i in range(len(prompt) // PAGE):
            key = before, prompt[i * PAGE : (i + 1) * PAGE]
            before = int(pages[i])
            if key not in self._page:
                self._page[key], self._key[before] = before, key
                self._computed[before] = False

    def computed(self, pages: np.ndarray) -> None:
        """Notes that these pages hold their keys and values."""
        self._computed[pages] = True

    def forget(self, pages: np.ndarray) -> None:
        """Drops pages that are free.

        A page never goes before those that follow it: whoever uses them uses it too.
        """
        for page in pages.tolist():
            key = self._key.pop(page, None)
            if key is not None:
                del self._page[key]
