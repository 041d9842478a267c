"""Pairs of token ids: what training and scoring work on.

A row becomes a pair without a loser: its prompt and the data's response, cut to the length that the
model is trained with (`ldalign.data.preparation`). Then it gets a loser: a response that the policy
generated or the rejected one that preference data bring (`with_losers`), or the worse of two
samples, the better of which becomes the winner (`ranked_pairs`). Every pair starts with weight 1;
distances weight them later (`ldalign.objective`). Nothing here needs a model.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ldalign.data.ragged import Indices, TokenLists

Item = TypeVar("Item")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """A prompt and its winner, and its loser where there is one; token ids.

    A row for SFT is a pair whose `generated` is None. What is real and generated here is y
    and y' in the equations, winner and loser in the pages, chosen and rejected in preference
    data and in the metrics.
    """

    id: str  # of its row
    prompt: list[int]
    real: list[int]  # the winner: the data's response, or the preferred of two samples
    generated: list[int] | None = None  # the loser
    weight: float = 1.0  # s, what the pair's loss is multiplied with
    ref_real: float = 0.0  # the winner's log-prob under the reference, natural log, summed
    ref_generated: float = 0.0  # the loser's

    @property
    def responses(self) -> list[list[int]]:
        """The winner, then the loser where there is one."""
        return [self.real] if self.generated is None else [self.real, self.generated]

    @property
    def tokens(self) -> int:
        """The number of tokens that a model reads for this pair: the prompt is read once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def differs(self) -> bool:
        """Whether its two responses are not the same tokens."""
        return self.real != self.generated

    @property
    def usable(self) -> bool:
        """Whether it teaches anything: as token ids, its responses differ."""
        # Equal responses have margin 0 and opposite gradients; an empty loser has no log-prob to
        # lower.
        return self.generated is None or (self.differs and len(self.generated) > 0)

    @property
    def length_gap(self) -> int:
        """By how many tokens its two responses differ in length."""
        return abs(len(self.real) - len(self.generated or ()))


class Pairs(Sequence[Pair]):
    """Pairs of many rows, column by column: a pair is made when it is asked for.

    ids: of the rows. prompts, real, generated (None: no pair has a loser): their tokens. weights
    (N,), references (N, 2): as in `Pair`; None: 1, and 0.
    """

    def __init__(
        self,
        ids: Sequence[str],
        prompts: TokenLists,
        real: TokenLists,
        generated: TokenLists | None = None,
        weights: Floats | None = None,
        references: Floats | None = None,
    ) -> None:
        self.ids, self.prompts, self.real, self.generated = ids, prompts, real, generated
        self.weights = np.ones(len(prompts)) if weights is None else weights
        self.references = np.zeros((len(prompts), 2)) if references is None else references

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "Pairs":
        """Copies pairs into columns; what has them already is returned as it is."""
        if isinstance(pairs, Pairs):
            return pairs
        losers = [pair.generated for pair in pairs if pair.generated is not None]
        return cls(
            [pair.id for pair in pairs],
            TokenLists.of(pair.prompt for pair in pairs),
            TokenLists.of(pair.real for pair in pairs),
            TokenLists.of(losers) if len(losers) == len(pairs) else None,
            np.array([pair.weight for pair in pairs]),
            np.array([(pair.ref_real, pair.ref_generated) for pair in pairs]).reshape(-1, 2),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> "Pair | Pairs":
        if isinstance(index, slice):
            return self.take(index)
        return Pair(
            self.ids[index],
            self.prompts[index],
            self.real[index],
            None if self.generated is None else self.generated[index],
            float(self.weights[index]),
            *self.references[index].tolist(),
        )

    def take(self, indices: Indices) -> "Pairs":
        """Returns the chosen pairs, in the order in which they were chosen."""
        ids = self.ids[indices] if isinstance(indices, slice) else Chosen(self.ids, indices)
        return Pairs(
            ids,
            self.prompts.take(indices),
            self.real.take(indices),
            None if self.generated is None else self.generated.take(indices),
            self.weights[indices],
            self.references[indices],
        )

    def changed(
        self,
        *,
        ids: Sequence[str] | None = None,
        real: TokenLists | None = None,
        generated: TokenLists | None = None,
        weights: Floats | None = None,
        references: Floats | None = None,
    ) -> "Pairs":
        """Returns the same pairs with other columns."""
        return Pairs(
            self.ids if ids is None else ids,
            self.prompts,
            self.real if real is None else real,
            self.generated if generated is None else generated,
            self.weights if weights is None else weights,
            self.references if references is None else references,
        )

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """How many tokens a model reads for each pair, the prompt once: (N,)."""
        losers = 0 if self.generated is None else self.generated.lengths
        return self.prompts.lengths + self.real.lengths + losers

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Says of each pair whether it teaches anything, as `Pair.usable`: (N,)."""
        if self.generated is None:
            return np.ones(len(self), dtype=bool)
        return (self.generated.lengths > 0) & ~self.real.equals(self.generated)

    @property
    def content_hash(self) -> str:
        """sha256 of the tokens of all pairs, in their order."""
        digest = hashlib.sha256()
        for column in (self.prompts, self.real, self.generated):
            if column is not None:
                digest.update(column.lengths.tobytes())
                for i in range(len(column)):
                    digest.update(column.array(i).tobytes())
        return digest.hexdigest()


class Chosen(Sequence[Item], Generic[Item]):
    """Some items of a sequence, each got, and changed, when it is asked for.

    indices: which; None: all. change: what is made of each.
    """

    def __init__(
        self,
        items: Sequence[Item],
        indices: Indices | None = None,
        change: Callable[[Item], Item] | None = None,
    ) -> None:
        self.items, self.change = items, change
        self.indices = np.arange(len(items))
        if indices is not None:
            self.indices = self.indices[indices]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | Chosen[Item]":
        if isinstance(index, slice):
            return Chosen(self.items, self.indices[index], self.change)
        item = self.items[self.indices[index]]
        return item if self.change is None else self.change(item)


def with_losers(
    pairs: Sequence[Pair], generated: Sequence[Sequence[int]], max_length: int
) -> Pairs:
    """Returns the pairs with their losers, token ids, in the same order.

    A loser is cut so that it has at most max_length tokens with its prompt.
    """
    pairs, losers = Pairs.of(pairs), TokenLists.of(generated)
    if len(losers) != len(pairs):
        raise ValueError(f"{len(losers)} losers for {len(pairs)} pairs")
    return pairs.changed(generated=losers.cut(max_length - pairs.prompts.lengths))


def joined_pairs(parts: Sequence[Pairs]) -> Pairs:
    """Returns the pairs of several lists, one after the other, copied."""
    losers = [part.generated for part in parts if part.generated is not None]
    return Pairs(
        [name for part in parts for name in part.ids],
        TokenLists.joined([part.prompts for part in parts]),
        TokenLists.joined([part.real for part in parts]),
        TokenLists.joined(losers) if len(losers) == len(parts) else None,
        np.concatenate([part.weights for part in parts]),
        np.concatenate([part.references for part in parts]),
    )


def ranked_pairs(
    pairs: Sequence[Pair],
    samples: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    preferences: Sequence[float],
    max_length: int,
) -> Pairs:
    """Makes the preferred of two samples the winner and the other the loser; ties are left out.

    samples: a first and a second response (token ids) of each of N prompts. preferences (N,): how
    sure it is that the first is the better one, in [0, 1]; 0.5 and NaN (no verdict) are ties.
    """
    sure = np.asarray(preferences, dtype=np.float64)
    decided = np.flatnonzero((sure < 0.5) | (sure > 0.5))
    pairs = Pairs.of(pairs).take(decided)
    both = TokenLists.joined([TokenLists.of(side).take(decided) for side in samples])
    n, first = len(decided), sure[decided] > 0.5
    better, worse = np.arange(n) + np.where(first, 0, n), np.arange(n) + np.where(first, n, 0)
    room = max_length - pairs.prompts.lengths
    return pairs.changed(real=both.take(better).cut(room), generated=both.take(worse).cut(room))
