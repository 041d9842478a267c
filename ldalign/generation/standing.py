"""Decoding on a GPU: steps whose whole work, sampler included, is one CUDA graph.

A step of decoding is some hundred small kernels, and to launch them one by one takes longer than
they do. So all that a step needs lies on the device, a line for each place: its tokens, how many of
them the cache holds, its pages, its uniform numbers. A step reads it there, writes the next tokens
there, and is captured for a few numbers of rows; rows that are not there stand for a spare place,
whose page nobody else reads. The host sends a line where a row has come, and the places of a step
where they are not those of the step before. It gets (id, log-prob, soundness) of all rows by one
copy, and may begin the next step before it has them.

Shapes: R places, L the longest row in tokens, T the most new tokens of a row, P the pages of a row,
n rows of a step, m of them new.
"""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ldalign.generation.decoders import GraphDecoder
from ldalign.generation.paged_cache import pages_for
from ldalign.generation.sampling import Sampling, blank_unread, sample
from ldalign.system.memory import is_out_of_memory

log = logging.getLogger(__name__)
# Rows that have a graph, beside the most that there are.
SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)


class StandingSteps:
    """Steps of decoding over the places of an engine.

    decoder: its cache is allocated.
    spare_page: the one of its pages that no row has.
    """

    def __init__(
        self, decoder: GraphDecoder, sampling: Sampling, rows: int, longest: int, spare_page: int
    ) -> None:
        self.decoder, self.sampling, self.graphs = decoder, sampling, decoder.graphs()
        self.sizes = [*(size for size in SIZES if size < rows), rows]
        self.replays: dict[int, Callable[[], None]] = {}
        self.spare = rows  # the place of rows that fill up a graph
        T, P = sampling.max_new_tokens, pages_for(longest)
        # A place's line: tokens in the cache, where the response begins, tokens, numbers, pages.
        shape = rows + 1, 2 + longest + T + P
        self.lines = torch.zeros(shape, dtype=torch.int64, device=decoder.device)
        self.held, self.begin = self.lines[:, 0], self.lines[:, 1]  # (R + 1,)
        self.tokens, draws, self.pages = self.lines[:, 2:].split((longest, T, P), 1)
        self.draws = draws.view(torch.float64)  # (R + 1, T)
        self.begin[self.spare].fill_(1)
        self.pages[self.spare].fill_(spare_page)
        self.order = torch.full((rows,), self.spare, device=decoder.device)  # a step's places first
        self.sent = np.zeros(0, dtype=np.int64)  # the places that `order` begins with
        # (R, 3) float64, which holds an id exactly: id, log-prob, and whether the logits are finite
        self.result = torch.zeros(rows, 3, dtype=torch.float64, device=decoder.device)

    def ready(self, rows: int) -> bool:
        """Says whether a step of so many rows can be done here; captures what it needs.

        All larger ones come before it: the largest takes the memory that the others then share.
        """
        needed = self._size(rows)
        for size in [size for size in reversed(self.sizes) if size >= needed > 0]:
            if size not in self.replays:
                self._capture(size)
        return self._size(rows) in self.replays

    def launch(
        self,
        places: np.ndarray,
        new: np.ndarray,
        held: np.ndarray,
        begin: np.ndarray,
        tokens: np.ndarray,
        draws: np.ndarray,
        pages: np.ndarray,
    ) -> Callable[[], np.ndarray]:
        """Begins a step of these places (n,), int64, for which there is a graph (`ready`).

        new (m,) int64: places whose rows came, or went on elsewhere, since they were last here;
        and their held (m,), begin (m,), tokens (m, L), draws (m, T) float64, pages (m, P).

        Returns what waits for the step's result (n, 3) float64: id, log-prob, and 1 where all
        logits are finite.
        """
        size, n, m = self._size(len(places)), len(places), len(new)
        if m or not np.array_equal(places, self.sent):
            order = np.pad(places, (0, size - n), constant_values=self.spare)
            lines = np.hstack((held[:, None], begin[:, None], tokens, draws.view(np.int64), pages))
            sent = self.graphs.upload(np.concatenate((order, new, lines.ravel())))
            self.order[:size] = sent[:size]
            self.lines[sent[size : size + m]] = sent[size + m :].view(lines.shape)
            self.sent = places
        self.replays[size]()
        return self.graphs.download(self.result[:n])

    def _size(self, rows: int) -> int:
        """The smallest number of rows with a graph that is not smaller; 0 where there is none."""
        return min((size for size in self.sizes if size >= rows), default=0)

    def _capture(self, size: int) -> None:
        # What is captured is also computed, more than once: no row may be changed by it.
        self.order.fill_(self.spare)
        self.sent = self.sent[:0]
        try:
            self.replays[size] = self.graphs.capture(partial(self._step, size))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("generation: no memory for a CUDA graph of %d rows; going on without", size)
            self.sizes.remove(size)

    def _step(self, size: int) -> None:
        """The work of one step; nothing in it may be read by the host."""
        order = self.order[:size]
        held = self.held[order]  # (n,)
        ids = self.tokens[order, held]
        logits = self.decoder.decode(ids, held, self.pages[order].int())  # (n, V)
        sound = blank_unread(logits)
        seen = self.tokens[order] if self.sampling.repetition_penalty != 1 else None
        # The n-th token of a response takes the n-th number of its row's stream.
        uniform = self.draws[order, held + 1 - self.begin[order]]
        ids, logp = sample(logits, uniform, self.sampling, seen)
        self.tokens[order, held + 1] = ids
        self.held[order] = held + 1
        self.held[self.spare].zero_()
        self.result[:size] = torch.stack((ids.double(), logp.double(), sound.double()), 1)
