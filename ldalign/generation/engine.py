"""Continuous batching: rows enter as others leave, prompts and responses are computed in the same
steps.

A row's tokens depend on (seed, its key) and on nothing else: each step takes one uniform number of
the row's own counter-based stream and inverts the cumulative distribution with it. Whatever the
batch, the order or the rank, the same row gives the same tokens, as far as its logits have the same
bits: with the C++ decoder always; with the modules' own forward, whose products change their last
bits with the number of rows, but for a draw that falls within rounding of a boundary.

What a step costs in Python does not grow with the rows: a row is touched when it enters and when it
leaves.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldalign.generation.decoders import Decoder
from ldalign.generation.paged_cache import PAGE, PagePool, SharedPages, pages_for
from ldalign.generation.sampling import Response, Sampling, sample
from ldalign.system.errors import InputError
from ldalign.system.memory import OutOfMemory, available_bytes, is_out_of_memory
from ldalign.system.seeds import uniforms

log = logging.getLogger(__name__)
CACHE_SHARE = 0.5  # of the memory that is free: what the cache may take where no budget is given


@dataclass(frozen=True)
class Request:
    """One response to make. The key names its random stream; the index is the caller's."""

    key: str
    prompt: Sequence[int]  # token ids, at least one
    index: int = 0


class Engine:
    """Generates with one decoder and one way of sampling.

    rows: the most that are generated at a time. longest: no prompt with its response has more
    tokens than that; a response is cut there. step_tokens: the most new tokens of one step, so the
    longest wait of a row that is being continued. cache_bytes: the most the key/value cache may
    take; None: half of what is free. decode: ids to text, needed for stop strings alone. Raises
    InputError where the budget does not hold one row.

    Where memory runs out all the same, the cache or the step is halved until it fits: fewer rows
    are under way at a time, the text is the same. Raises OutOfMemory where not even one row's
    cache, or one token, fits.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        end_ids: Sequence[int],
        seed: int,
        *,
        longest: int,
        rows: int = 64,
        step_tokens: int = 512,
        cache_bytes: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.decoder, self.sampling, self.seed, self.decode = decoder, sampling, seed, decode
        assert decode is not None or not sampling.stop, "stop strings need `decode`"
        self.ends = np.array(sorted(end_ids), dtype=np.int64)
        self.longest, self.step_tokens = longest, step_tokens
        each = pages_for(longest)
        budget = (
            int(CACHE_SHARE * available_bytes(decoder.device))
            if cache_bytes is None
            else cache_bytes
        )
        pages = min(rows * each, budget // decoder.page_bytes())
        if pages < each:
            raise InputError(
                f"generation: the cache may take {budget / 2**20:.0f} MiB, but one row of "
                f"{longest} tokens needs {each * decoder.page_bytes() / 2**20:.0f}; lower "
                "max_new_tokens or raise sampling.cache_gib"
            )
        pages = self._allocate(pages, each)
        self._most = max(rows, step_tokens)  # new tokens of a step; less once memory has run out
        self.pool = PagePool(pages)
        # Of each of the rows' places: the request (None: free), its tokens so far and how many of
        # them are in the cache, where the response begins and must end, its pages, its random
        # numbers, its log-prob, when it entered.
        self.requests: list[Request | None] = [None] * rows
        self.tokens = np.full((rows, longest), -1, dtype=np.int64)
        self.length, self.held, self.begin, self.end, self.entered = np.zeros(
            (5, rows), dtype=np.int64
        )
        self.pages = np.zeros((rows, each), dtype=np.int32)
        self.draws = np.zeros((rows, sampling.max_new_tokens))
        self.logp = np.zeros(rows)
        self._clock = 0
        self.shared = SharedPages(pages)

    def _allocate(self, pages: int, least: int) -> int:
        """How many pages the cache has: so many, or the largest half of a half of them that memory
        holds.
        """
        wanted = pages
        while not self._fits(partial(self.decoder.allocate, pages, self.longest)):
            if pages == least:
                raise OutOfMemory(
                    f"generation: the cache of one row of {self.longest} tokens "
                    f"({least * self.decoder.page_bytes() / 2**20:.0f} MiB): out of memory; lower "
                    "max_new_tokens"
                )
            pages = max(least, pages // 2)
        if pages < wanted:
            log.warning(
                "generation: no memory for a cache of %d rows; going on with %d at a time",
                wanted // least,
                pages // least,
            )
        return pages

    @staticmethod
    def _fits(work: Callable[[], None]) -> bool:
        """Does the work; False if there was not the memory for it. What it held
        is free again then.
        """
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    @torch.no_grad()
    def run(
        self,
        requests: Iterable[Request],
        on_tokens: Callable[[list[Request], list[int]], None] | None = None,
    ) -> Iterator[tuple[Request, Response]]:
        """The responses, as they are finished. `requests` is read when there is room for one more.

        on_tokens gets the new tokens of each step, with their requests: for text as it comes.
        """
        waiting = iter(requests)
        following = next(waiting, None)
        while True:
            while following is not None and self._admit(following):
                following = next(waiting, None)
            active = np.flatnonzero(self.length)
            if not len(active):
                return
            chosen, ids, logp = self._step(active)
            if on_tokens is not None:
                on_tokens([self._request(place) for place in chosen], ids.tolist())
            yield from self._append(chosen, ids, logp)

    def _request(self, place: int) -> Request:
        request = self.requests[place]
        assert request is not None
        return request

    def _admit(self, request: Request) -> bool:
        """Gives the request a place and pages, if there are any now."""
        prompt = tuple(request.prompt)
        if not 0 < len(prompt) < self.longest:
            raise InputError(
                f"generation: the prompt of {request.key!r} has {len(prompt)} tokens; expected 1 "
                f"to {self.longest - 1}"
            )
        free = np.flatnonzero(self.length == 0)
        if not len(free):
            return False
        found, computed = self.shared.find(prompt)
        if not computed:
            return False  # soon they can be shared
        shared = np.array(found, dtype=np.int32)
        end = min(len(prompt) + self.sampling.max_new_tokens, self.longest)
        # All that the row can ever need: so no row has to be thrown out half done.
        wanted = pages_for(end) - len(shared)
        if wanted > self.pool.free:
            return False
        place = int(free[0])
        self.pool.share(shared)
        self.pages[place, : pages_for(end)] = np.concatenate((shared, self.pool.take(wanted)))
        self.requests[place] = request
        self.tokens[place] = -1
        self.tokens[place, : len(prompt)] = prompt
        self.length[place] = self.begin[place] = len(prompt)
        self.held[place], self.end[place] = len(shared) * PAGE, end
        self.draws[place] = uniforms(self.seed, request.key, self.sampling.max_new_tokens)
        self.logp[place] = 0.0
        self.entered[place], self._clock = self._clock, self._clock + 1
        self.shared.add(prompt, self.pages[place])
        return True

    def _step(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One forward over these places: those that got a token, the tokens,
        and their log-probs.
        """
        everyone = active
        new = self.length[active] - self.held[active]
        # Rows in the middle of a response first, each with its one token; then prompts, in their
        # order.
        order = np.lexsort((self.entered[active], new > 1))
        active, new = active[order], new[order]
        before = np.cumsum(new) - new
        new = np.minimum(new, min(max(self.step_tokens, len(active)), self._most) - before)
        active, new = active[new > 0], new[new > 0]
        whole = self.held[active] + new == self.length[active]  # nothing of the prompt is left
        chosen = active[whole]
        picked = logp = torch.zeros(0)

        def work() -> None:
            nonlocal picked, logp
            picked, logp = self._forward(active, new, whole)

        if not self._fits(work):
            tokens = int(new.sum())
            if tokens == 1:
                raise OutOfMemory(
                    "generation: a step of one token: out of memory; give a smaller model"
                )
            if self._most >= max(len(self.requests), self.step_tokens):
                log.warning(
                    "generation: no memory for a step of %d tokens; going on with smaller ones",
                    tokens,
                )
            self._most = tokens // 2
            return self._step(everyone)
        self.held[active] += new
        for place in active[self.held[active] <= self.begin[active]]:  # still in the prompt
            self.shared.computed(self.pages[place, : self.held[place] // PAGE])
        return chosen, picked.cpu().numpy(), logp.cpu().numpy()

    def _forward(
        self, active: np.ndarray, new: np.ndarray, whole: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Computes so many new tokens of these places; of the `whole` ones the next tokens and
        their log-probs.

        Changes nothing but the cache, where doing it again writes the same.
        """
        first = np.cumsum(new) - new
        place = np.repeat(active, new)
        ids = self.tokens[place, np.arange(len(place)) + np.repeat(self.held[active] - first, new)]
        width = pages_for(int((self.held[active] + new).max()))
        logits = self.decoder.step(
            torch.from_numpy(ids),
            torch.from_numpy(np.stack((new, self.held[active]), axis=1)),
            torch.from_numpy(self.pages[active, :width]),
            torch.from_numpy((first + new - 1)[whole]),
        )
        chosen = active[whole]
        if not len(chosen):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.from_numpy(self.tokens[chosen, : self.length[chosen].max()]).to(
                logits.device
            )
        uniform = torch.from_numpy(self.draws[chosen, self.length[chosen] - self.begin[chosen]]).to(
            logits.device
        )
        return sample(logits, uniform, self.sampling, seen)

    def _append(
        self, chosen: np.ndarray, ids: np.ndarray, logp: np.ndarray
    ) -> Iterator[tuple[Request, Response]]:
        """Adds the tokens; the finished rows leave."""
        self.tokens[chosen, self.length[chosen]] = ids
        self.length[chosen] += 1
        self.logp[chosen] += logp
        stopped = np.isin(ids, self.ends)
        if self.sampling.stop:
            stopped |= np.fromiter(map(self._says_stop, chosen), dtype=bool)
        for n in np.flatnonzero(stopped | (self.length[chosen] == self.end[chosen])):
            yield self._leave(int(chosen[n]), "stop" if stopped[n] else "length")

    def _says_stop(self, place: int) -> bool:
        assert self.decode is not None
        # A token stands for one byte or more, but may end inside a character.
        most = max(len(text.encode()) for text in self.sampling.stop) + 4
        first = max(self.begin[place], self.length[place] - most)
        text = self.decode(self.tokens[place, first : self.length[place]].tolist())
        return any(stop in text for stop in self.sampling.stop)

    def _leave(self, place: int, reason: str) -> tuple[Request, Response]:
        request = self._request(place)
        ids = self.tokens[place, self.begin[place] : self.length[place]].tolist()
        self.shared.forget(
            self.pool.give_back(self.pages[place, : pages_for(int(self.end[place]))])
        )
        self.requests[place], self.length[place] = None, 0
        return request, Response(ids, reason, float(self.logp[place]))
