"""Continuous batching: rows enter as others leave, prompts and responses share the steps.

A row's tokens depend on (seed, its key) and on nothing else: each step takes one uniform number of
the row's own counter-based stream and inverts the cumulative distribution with it. Whatever the
batch, the order or the rank, the same row gives the same tokens, as far as its logits have the same
bits. With the C++ decoder they always have. The modules' own forward changes last bits with the
number of rows: there a draw that falls within rounding of a boundary may differ.

What a step costs in Python does not grow with the rows: the engine keeps one numpy
array for each property of the rows, works on all rows at once, and touches a single row
only as it enters and leaves.

On a GPU a step without prompts is a CUDA graph that needs nothing of the host
(`ldalign.generation.standing`), and the next one begins before the host has read its tokens: what
the host does with them, 0.3 to 0.6 ms, is done meanwhile. So it learns a step late that a row has
ended, and drops the one token more that the row was given. A step with prompts costs the host more:
where prompts wait, some rows leave before the next prompts enter, all at once.

A request may bring a *draft*, a text that its response may resemble. Then a step computes some of
its tokens (`ldalign.generation.drafts`) with the response's newest one, and as many stay as the row
would have drawn anyway: it gets several tokens in one step, and they are the same.

A *place* is an index into those arrays: a row has one from its entry to its end. Shapes: R places,
L the longest row in tokens, P its pages, A places under way, C of them that get a token in a step,
N new tokens of a step, S tokens drawn in it: C, and one for each token of a draft.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ldalign.generation.decoders import Decoder
from ldalign.generation.drafts import Draft
from ldalign.generation.paged_cache import PAGE, PagePool, SharedPages, pages_for
from ldalign.generation.sampling import Response, Sampling, blank_unsound, sample
from ldalign.generation.standing import StandingSteps
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.memory import OutOfMemory, available_bytes, is_out_of_memory
from ldalign.system.seeds import uniforms
from ldalign.system.transfer import to_device

log = logging.getLogger(__name__)
CACHE_SHARE = 0.5  # the cache's share of the free memory, where no budget is given
# With graphs, this share of the rows leaves before others enter. A row of 200 tokens, of 256 rows:
# under 5 % of the steps have prompts in them, and half of the share, 6 %, of the places are empty.
REFILL_SHARE = 1 / 9


# Of each decoder that is alive, the pages of its cache.
_POOLS: WeakKeyDictionary[Decoder, PagePool] = WeakKeyDictionary()


def _free_bytes(decoder: Decoder) -> int:
    """The bytes that there are for caches: the decoder's own, of an earlier engine, goes.

    A CPU's memory is taken as it is first used, so a living cache can count as free.
    """
    free = available_bytes(decoder.device)
    for other, pool in _POOLS.items():
        untouched = pool.untouched if other.device.type == "cpu" else 0
        if other is decoder:
            free += (pool.size - untouched) * decoder.page_bytes()
        elif other.device == decoder.device:
            free -= untouched * other.page_bytes()
    return max(0, free)


@dataclass(frozen=True)
class Request:
    """One response to make."""

    key: str  # names the row's random stream
    prompt: Sequence[int]  # token ids, at least one
    index: int = 0  # the caller's own number for it
    name: str = ""  # what an error calls it; "": its key
    draft: Sequence[int] = ()  # token ids that the response may resemble


class Drawn(NamedTuple):
    """At most one new token of each of some places."""

    places: np.ndarray  # (C,)
    ids: np.ndarray  # (C,) int64
    logp: np.ndarray  # (C,) of the tokens


@dataclass(frozen=True)
class Flight:
    """A step that was begun and not yet read."""

    places: np.ndarray  # (n,)
    entered: np.ndarray  # (n,) when their rows entered, as a place may have another row by now
    result: Callable[[], np.ndarray]  # waits for it: (n, 3), as `StandingSteps.launch` says


class Engine:
    """Generates with one decoder and one way of sampling.

    rows: the most that are under way at a time.
    longest: tokens that a prompt has with its response at most; a response is cut there.
    step_tokens: the most new tokens of one step, and so the longest that a row under way waits, as
        every row under way gets a token in each; None: as the decoder says.
    cache_bytes: the most that the key/value cache may take; None: half of what is free.
    draft_tokens: the most tokens of a request's draft that a step computes; 0: drafts are not
        looked at, as where steps are graphs.
    decode: ids to text, needed for stop strings alone.

    Raises InputError where the budget does not hold one row. Where memory runs out all the same,
    the cache or the step is halved until it fits: fewer rows are under way at a time, the text is
    the same. Raises OutOfMemory where not even one row's cache, or one token, fits.
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
        step_tokens: int | None = None,
        cache_bytes: int | None = None,
        draft_tokens: int = 0,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.decoder, self.sampling, self.seed, self.decode = decoder, sampling, seed, decode
        assert decode is not None or not sampling.stop, "stop strings need `decode`"
        self.ends = np.array(sorted(end_ids), dtype=np.int64)
        self.longest, self.step_tokens = longest, step_tokens or decoder.step_tokens
        budget = cache_bytes
        if budget is None:
            budget = int(CACHE_SHARE * _free_bytes(decoder))
        each = pages_for(longest)  # what one row can need
        pages = min(rows * each, budget // decoder.page_bytes())
        if pages < each:
            raise InputError(
                f"generation: the cache may take {budget / 2**20:.0f} MiB, but one row of "
                f"{longest} tokens needs {each * decoder.page_bytes() / 2**20:.0f}; lower "
                "max_new_tokens or raise sampling.cache_gib"
            )
        pages = self._allocate(pages, each)
        self._most = max(rows, self.step_tokens)  # tokens of a step; less once memory ran out
        self.pool = _POOLS[decoder] = PagePool(pages)
        self.shared = SharedPages(pages)
        # One entry a place.
        self.requests: list[Request | None] = [None] * rows  # None: the place is free
        # (R, L), -1 in a row under way: not there yet, but where a draft was
        self.tokens = np.zeros((rows, longest), dtype=np.int64)
        counts = np.zeros((5, rows), dtype=np.int64)
        self.length, self.held = counts[0], counts[1]  # (R,) tokens so far; those in the cache
        self.begin, self.end = counts[2], counts[3]  # (R,) where the response begins, must end
        self.entered = counts[4]  # (R,) the clock as the row entered
        self.pages = np.zeros((rows, each), dtype=np.int32)  # (R, P)
        self.draws = np.zeros((rows, sampling.max_new_tokens))  # uniform numbers, one a token
        self.logp = np.zeros(rows)  # (R,) float64, summed over the response so far
        self._clock = 0  # rows that have entered
        self._full = 0  # rows under way as one was refused for lack of room; 0: they may enter
        self.standing: StandingSteps | None = None
        if decoder.graphed is not None:
            self.standing = StandingSteps(decoder.graphed, sampling, rows, longest, pages)
        # A step of drafts has another shape each time.
        self.draft_tokens = draft_tokens if self.standing is None else 0
        self.drafts: list[Draft | None] = [None] * rows  # None: the row brought none
        self._known = np.zeros(rows, dtype=bool)  # (R,) whether the standing steps have the row
        self._flight: Flight | None = None

    def _allocate(self, pages: int, least: int) -> int:
        """Makes the cache, halved until memory holds it; returns its pages, `least` or more."""
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
        """Does the work; False where memory did not suffice, and what it held is free again."""
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
        """Yields the responses as they are finished, each with its request.

        `requests` is read when there is room for one more. on_tokens gets the new tokens of each
        step with their requests, to show text as it comes. Raises NumericsError, which names the
        request, for logits that are NaN or infinite.
        """
        waiting, queue = iter(requests), deque[Request]()
        while True:
            self._let_in(queue, waiting)
            active = np.flatnonzero(self.length)  # (A,) a free place has length 0
            if not len(active):
                self._flight = None  # of rows that have ended
                return
            for places, ids, logp in self._next_tokens(active):
                # Behind its last token a draft may have gone on.
                there = self.length[places] > 0
                chosen, ids, logp = places[there], ids[there], logp[there]
                if on_tokens is not None:
                    on_tokens([self._request(place) for place in chosen], ids.tolist())
                yield from self._append(chosen, ids, logp)

    def _request(self, place: int) -> Request:
        request = self.requests[place]
        assert request is not None
        return request

    def _open(self) -> bool:
        """Whether rows may enter now, as far as there is room."""
        if self._full and self.standing is not None:
            left = self._full - int(np.count_nonzero(self.length))
            if left < max(1, int(self._full * REFILL_SHARE)):
                return False
        self._full = 0
        return True

    def _let_in(self, queue: deque[Request], waiting: Iterator[Request]) -> None:
        """Has requests enter in their order, as far as there is room.

        queue: those that were read of `waiting` and have not entered. One whose beginning a row
        under way is computing waits until it can share that: a place and pages are kept for it, and
        others enter before it.
        """
        kept: list[Request] = []
        kept_pages = 0
        while self._open():
            request = queue.popleft() if queue else next(waiting, None)
            if request is None:
                break
            prompt = self._prompt(request)
            free = np.flatnonzero(self.length == 0)[len(kept) :]
            shared, computed = self.shared.find(prompt)
            wanted = pages_for(self._end(prompt)) - len(shared)
            if not len(free) or wanted > self.pool.free - kept_pages:
                queue.appendleft(request)
                if not kept:
                    self._full = int(np.count_nonzero(self.length))
                break
            if computed:
                self._admit(request, prompt, int(free[0]), np.array(shared, dtype=np.int32))
            else:
                kept.append(request)
                kept_pages += wanted
        queue.extendleft(reversed(kept))

    def _prompt(self, request: Request) -> tuple[int, ...]:
        prompt = tuple(request.prompt)
        if not 0 < len(prompt) < self.longest:
            raise InputError(
                f"generation: the prompt of {request.key!r} has {len(prompt)} tokens; expected 1 "
                f"to {self.longest - 1}"
            )
        return prompt

    def _end(self, prompt: Sequence[int]) -> int:
        """The most tokens of a row, so that it can be given all the pages that it can ever need:
        none has to be thrown out half done.
        """
        return min(len(prompt) + self.sampling.max_new_tokens, self.longest)

    def _admit(
        self, request: Request, prompt: tuple[int, ...], place: int, shared: np.ndarray
    ) -> None:
        """Gives the request this place and its pages, which begin with the `shared` ones."""
        end = self._end(prompt)
        needed = pages_for(end)
        self.pool.share(shared)
        own = self.pool.take(needed - len(shared))
        self.pages[place, :needed] = np.concatenate((shared, own))
        self.requests[place] = request
        self.tokens[place] = -1
        self.tokens[place, : len(prompt)] = prompt
        self.length[place] = self.begin[place] = len(prompt)
        self.held[place], self.end[place] = len(shared) * PAGE, end
        self.draws[place] = uniforms(self.seed, request.key, self.sampling.max_new_tokens)
        self.logp[place] = 0.0
        wanted = self.draft_tokens and request.draft
        self.drafts[place] = Draft(request.draft, self.draft_tokens) if wanted else None
        self.entered[place], self._clock = self._clock, self._clock + 1
        self.shared.add(prompt, self.pages[place])

    def _next_tokens(self, active: np.ndarray) -> list[Drawn]:
        """Takes the places under way (A,) one step further.

        Returns their new tokens, in the order in which each has them; of more than one token the
        last may be behind the row's end.
        """
        flight, standing = self._flight, self.standing
        prompts = bool((self.held[active] < self.begin[active]).any())
        if standing is None or prompts or not standing.ready(len(active)):
            # What is on its way comes first: the host's step goes on from it.
            self._flight = None
            return self._step(active) if flight is None else [self._land(flight)]
        if flight is None:
            flight = self._launch(standing, active)
        places = flight.places[self._alive(flight)]
        # Each has a token on its way, which may be known to be its last.
        ahead = places[self.length[places] + 1 < self.end[places]]
        more = len(ahead) > 0 and standing.ready(len(ahead))
        self._flight = self._launch(standing, ahead) if more else None
        return [self._land(flight)]

    def _launch(self, standing: StandingSteps, places: np.ndarray) -> Flight:
        """Begins a standing step of these places (n,)."""
        new = places[~self._known[places]]
        self._known[new] = True
        columns = (self.held, self.begin, self.tokens, self.draws, self.pages)
        result = standing.launch(places, new, *(column[new] for column in columns))
        return Flight(places, self.entered[places], result)

    def _alive(self, flight: Flight) -> np.ndarray:
        """Which of the flight's rows have not left: (n,) bool."""
        places = flight.places
        return (self.entered[places] == flight.entered) & (self.length[places] > 0)

    def _land(self, flight: Flight) -> Drawn:
        """Waits for the flight; returns its tokens."""
        alive = self._alive(flight)
        places, (ids, logp, sound) = flight.places[alive], flight.result()[alive].T
        self._refuse_unsound(places, sound > 0)
        self.held[places] += 1
        return Drawn(places, ids.astype(np.int64), logp)

    def _step(self, everyone: np.ndarray) -> list[Drawn]:
        """One forward over these places (A,), by the host's numbers; as `_next_tokens` returns."""
        active, new = self._share_out(everyone)
        whole = self.held[active] + new == self.length[active]  # nothing of the prompt is left
        drafted = self._put_drafts(active, new, whole)  # (A,) tokens of drafts
        drawn = np.where(whole, drafted + 1, 0)  # (A,) tokens to draw
        place, turn = _spread(active, drawn)  # (S,)
        picked = logp = sound = torch.zeros(0)

        def work() -> None:
            nonlocal picked, logp, sound
            picked, logp, sound = self._forward(active, new + drafted, drawn)

        if not self._fits(work):
            self._halve_steps(int((new + drafted).sum()))
            return self._step(everyone)
        ids = picked.cpu().numpy()
        # A token is the row's where the draft before it is what was drawn. Behind a row's draft,
        # where anything may stand, it counts for no other.
        wrong = ids != self.tokens[place, self.length[place] + turn]  # (S,)
        wrong = np.cumsum(np.append(0, wrong))[:-1]  # (S,) of all before it
        kept = wrong == wrong[np.arange(len(ids)) - turn]  # (S,)
        self._refuse_unsound(place[kept], sound.cpu().numpy()[kept])
        prompts = active[self.held[active] < self.begin[active]]
        self.held[active] += new
        self.held[active[whole]] += np.bincount(np.cumsum(turn == 0)[kept] - 1) - 1
        self._known[active] = False
        # A row in its prompt may have filled pages that others wait for.
        for i in prompts:
            self.shared.computed(self.pages[i, : self.held[i] // PAGE])
        logps = logp.cpu().numpy()
        taken = [kept & (turn == n) for n in range(int(drawn.max(initial=0)))]
        return [Drawn(place[at], ids[at], logps[at]) for at in taken if at.any()]

    def _put_drafts(self, active: np.ndarray, new: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """Puts drafts behind the tokens of the `whole` (A,) bool of the places `active` (A,), as
        far as a step of `new` (A,) tokens has room; returns how many tokens each got: (A,) int64.
        """
        drafted = np.zeros_like(new)
        if not self.draft_tokens:
            return drafted
        room = min(self.step_tokens, self._most) - int(new.sum())
        for n in np.flatnonzero(whole):
            place = active[n]
            if (draft := self.drafts[place]) is None:
                continue
            length = self.length[place]
            # The last token of all is drawn, not computed.
            most = max(0, min(room, int(self.end[place] - length) - 1))
            proposal = draft.proposal()[:most]
            self.tokens[place, length : length + len(proposal)] = proposal
            drafted[n] = len(proposal)
            room -= len(proposal)
        return drafted

    def _refuse_unsound(self, chosen: np.ndarray, sound: np.ndarray) -> None:
        """Raises NumericsError for the first of the places (C,) that is not `sound` (C,) bool."""
        if sound.all():
            return
        place = int(chosen[int(np.argmin(sound))])
        request, made = self._request(place), int(self.length[place] - self.begin[place])
        raise NumericsError(
            f"generation: {request.name or request.key!r}: the model's logits after a prompt of "
            f"{len(request.prompt)} tokens and {made} of the answer are NaN or infinite; mend its "
            "weights, or give dtype=float32 where they overflow in bfloat16"
        )

    def _share_out(self, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deals a step's tokens out: the places that compute in it, and how many tokens each."""
        new = self.length[active] - self.held[active]  # (A,) not in the cache yet
        # Responses under way first, with one token each, so that no long prompt makes them wait;
        # then prompts of which others have computed all but the last page, and the other prompts,
        # in the order in which they entered.
        order = np.lexsort((self.entered[active], new > PAGE, new > 1))
        active, new = active[order], new[order]
        before = np.cumsum(new) - new  # (A,) tokens wanted by those further ahead
        # Every response under way gets its token, even where step_tokens is smaller than the rows.
        room = min(max(self.step_tokens, len(active)), self._most)
        new = np.minimum(new, room - before)  # of a prompt, a part; 0 or less: not in this step
        return active[new > 0], new[new > 0]

    def _halve_steps(self, tokens: int) -> None:
        """After a step of so many tokens ran out of memory: none has more than half of them."""
        if tokens == 1:
            raise OutOfMemory(
                "generation: a step of one token: out of memory; give a smaller model"
            )
        if self._most >= max(len(self.requests), self.step_tokens):  # said once
            log.warning(
                "generation: no memory for a step of %d tokens; going on with smaller ones",
                tokens,
            )
        self._most = tokens // 2

    def _forward(
        self, active: np.ndarray, new: np.ndarray, drawn: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `new` (A,) tokens of the places `active` (A,), and draws one after each of the
        last `drawn` (A,) of them.

        Returns the S tokens drawn (S,), their log-probs (S,), and whether all their logits are
        finite (S,). Changes nothing but the cache, where doing it again writes the same: so a step
        can be tried again.
        """
        # The step's tokens lie end to end, place after place.
        first = np.cumsum(new) - new  # (A,) where each place's run begins
        place = np.repeat(active, new)  # (N,)
        position = np.arange(len(place)) + np.repeat(self.held[active] - first, new)  # (N,)
        ids = self.tokens[place, position]  # (N,)
        width = pages_for(int((self.held[active] + new).max()))  # pages that any place needs now
        counts = np.stack((new, self.held[active]), axis=1)  # (A, 2)
        chosen, turn = _spread(active, drawn)  # (S,)
        # After which of the N tokens logits are wanted.
        last = np.repeat(first + new - drawn, drawn) + turn  # (S,)
        logits = self.decoder.step(
            torch.from_numpy(ids),
            torch.from_numpy(counts),
            torch.from_numpy(self.pages[active, :width]),
            torch.from_numpy(last),
        )  # (S, V)
        if not len(chosen):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0).bool()
        sound = blank_unsound(logits)
        seen = None
        if self.sampling.repetition_penalty != 1:
            length = self.length[chosen] + turn  # (S,)
            tokens = self.tokens[chosen, : length.max()]  # (S, longest so far)
            tokens[np.arange(tokens.shape[1]) >= length[:, None]] = -1  # of a draft
            (seen,) = to_device(logits.device, torch.from_numpy(tokens))
        # The n-th token of a response takes the n-th number of its row's stream.
        draws = self.draws[chosen, self.length[chosen] + turn - self.begin[chosen]]  # (S,)
        (uniform,) = to_device(logits.device, torch.from_numpy(draws))
        return *sample(logits, uniform, self.sampling, seen), sound

    def _append(
        self, chosen: np.ndarray, ids: np.ndarray, logp: np.ndarray
    ) -> Iterator[tuple[Request, Response]]:
        """Adds a token to each chosen place (C,); the finished rows leave and are yielded."""
        self.tokens[chosen, self.length[chosen]] = ids
        self.length[chosen] += 1
        self.logp[chosen] += logp
        if self.draft_tokens:
            for place, token in zip(chosen.tolist(), ids.tolist(), strict=True):
                if (draft := self.drafts[place]) is not None:
                    draft.append(token)
        stopped = np.isin(ids, self.ends)
        if self.sampling.stop:
            stopped |= np.fromiter(map(self._says_stop, chosen), dtype=bool)
        for n in np.flatnonzero(stopped | (self.length[chosen] == self.end[chosen])):
            yield self._leave(int(chosen[n]), "stop" if stopped[n] else "length")

    def _says_stop(self, place: int) -> bool:
        """Whether the end of the response holds a stop string."""
        assert self.decode is not None
        # A token stands for one byte or more, so as many tokens as the longest stop string has
        # bytes are enough; 4 more, as a token may begin or end inside a character.
        most = max(len(text.encode()) for text in self.sampling.stop) + 4
        first = max(self.begin[place], self.length[place] - most)
        text = self.decode(self.tokens[place, first : self.length[place]].tolist())
        return any(stop in text for stop in self.sampling.stop)

    def _leave(self, place: int, reason: str) -> tuple[Request, Response]:
        """Frees the place and its pages; returns the request and its response."""
        request = self._request(place)
        ids = self.tokens[place, self.begin[place] : self.length[place]].tolist()
        own = self.pages[place, : pages_for(int(self.end[place]))]
        self.shared.forget(self.pool.give_back(own))
        self.requests[place], self.length[place] = None, 0
        return request, Response(ids, reason, float(self.logp[place]))


def _spread(places: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each place (A,) as often as `counts` (A,) says: (S,), and the how manieth of its
    place each is, from 0: (S,).
    """
    first = np.cumsum(counts) - counts
    return np.repeat(places, counts), np.arange(int(counts.sum())) - np.repeat(first, counts)
