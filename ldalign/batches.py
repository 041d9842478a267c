"""Pairs, and how they become batches: row order, micro-batches by token budget, packing without padding.

The order of the rows is a function of (seed, epoch) over global indices. Ranks and micro-batches only split a global
batch; the divisor of the loss is fixed for the whole of it, so any split gives the same gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldalign import ops
from ldalign.layout import Packed
from ldalign.seeds import permutation
from ldalign.weights import LanguageModel


@dataclass(frozen=True)
class Pair:
    """What training and scoring work on, in token ids. `generated` None: a row for SFT, which has no loser."""

    id: str
    prompt: list[int]
    real: list[int]
    generated: list[int] | None = None
    weight: float = 1.0
    ref_real: float = 0.0  # summed log-probs under the reference, natural logs
    ref_generated: float = 0.0

    @property
    def responses(self) -> list[list[int]]:
        """Winner first, then the loser where there is one."""
        return [self.real] if self.generated is None else [self.real, self.generated]

    @property
    def tokens(self) -> int:
        """Tokens a model reads for this pair: the prompt is read once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Batch:
    """Pairs packed: sequences [prompt | real | generated] end to end; both responses continue the prompt."""

    pairs: Sequence[Pair]
    ids: Tensor  # (N,) int64
    layout: Packed
    rows: Tensor  # (M,) int64: the tokens whose hidden state predicts a response token
    targets: Tensor  # (M,) int64: the response tokens they predict
    lengths: list[int]  # response lengths: real, generated, real, ...

    @classmethod
    def pack(cls, pairs: Sequence[Pair], device: torch.device | str = "cpu") -> "Batch":
        """Packs pairs for one forward. The first token of either response is predicted by the prompt's last."""
        rows, start = [], 0
        for pair in pairs:
            if not pair.prompt or not all(pair.responses):
                raise ValueError(f"row {pair.id}: needs at least one prompt token and one token a response")
            last = start + len(pair.prompt) - 1
            start = last + 1
            for response in pair.responses:
                rows += [last, *range(start, start + len(response) - 1)]
                start += len(response)
        return cls(
            pairs=pairs,
            ids=torch.tensor([t for p in pairs for part in (p.prompt, *p.responses) for t in part], device=device),
            layout=Packed([[len(p.prompt), *map(len, p.responses)] for p in pairs], device),
            rows=torch.tensor(rows, device=device),
            targets=torch.tensor([t for p in pairs for response in p.responses for t in response], device=device),
            lengths=[len(response) for p in pairs for response in p.responses],
        )

    def split(self, per_response: Tensor) -> tuple[Tensor, Tensor]:
        """Per-response values of a batch of pairs as (real (P,), generated (P,))."""
        return per_response[0::2], per_response[1::2]


def token_logprobs(model: LanguageModel, batch: Batch) -> Tensor:
    """(M,) float32 natural-log probabilities of the batch's response tokens. No logits leave the head."""
    out = model(
        batch.ids,
        batch.layout,
        lambda hidden, weight: ops.linear_logprob(hidden.index_select(0, batch.rows), weight, batch.targets),
    )
    assert isinstance(out, Tensor)
    return out


def global_batches(count: int, size: int, epochs: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, row indices) of each optimizer step. The last batch of an epoch holds what is left: no row is skipped."""
    for epoch in range(epochs):
        order = permutation(seed, f"epoch/{epoch}", count)
        for start in range(0, count, size):
            yield epoch, order[start : start + size]


def count_steps(count: int, size: int, epochs: int) -> int:
    """How many batches `global_batches` yields."""
    return epochs * -(-count // size)


def deal(costs: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Splits items over ranks and micro-batches: result[rank][micro] lists item indices.

    Items go, dearest first, to the least loaded rank; a rank's items then fill micro-batches of at most `budget` cost
    (a dearer single item gets one of its own). Every rank has the same number of micro-batches, as FSDP's collectives
    need; a rank that runs out has empty ones.
    """
    loads = [0] * ranks
    mine: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        mine[least].append(i)
    plans: list[list[list[int]]] = []
    for items in mine:
        micros: list[list[int]] = []
        room = 0
        for i in items:
            if not micros or costs[i] > room:
                micros.append([])
                room = budget
            micros[-1].append(i)
            room -= costs[i]
        plans.append(micros)
    most = max(len(micros) for micros in plans)
    return [micros + [[]] * (most - len(micros)) for micros in plans]
