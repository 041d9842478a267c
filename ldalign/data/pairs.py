"""Pairs of token ids: what training and scoring work on, and how rows become them.

A row becomes a pair without a loser (`prepare`): its prompt and the data's response, cut to the
length that the model is trained with. Then it gets a loser: a response that the policy generated
(`with_losers`), the rejected one that preference data bring (`rejected_pairs`), or the worse of two
samples, the better of which becomes the winner (`ranked_pairs`). Every pair starts with weight 1;
distances weight them later (`ldalign.objective`). Nothing here needs a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.system.errors import InputError

# Above this share of rows whose prompt alone fills max_length, the setting is wrong, not the rows.
TOO_MANY = 0.01


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
    def length_gap(self) -> int:
        """By how many tokens its two responses differ in length."""
        return abs(len(self.real) - len(self.generated or ()))


@dataclass(frozen=True)
class Prepared:
    """Rows as pairs of token ids, and what was done to fit them."""

    rows: list[Row]  # those kept
    pairs: list[Pair]  # one a kept row, without a loser: an SFT row as it stands
    dropped: list[str]  # ids of rows whose prompt alone fills max_length
    cut: int  # responses that lost their end, and with it their end token


def prepare(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Prepared:
    """Turns rows into pairs without losers, at most max_length tokens each.

    The response is what is cut, and loses its end token then; a row whose prompt alone fills
    max_length is dropped. Raises InputError when those are more than 1 % of the rows.
    """
    kept: list[Row] = []
    pairs: list[Pair] = []
    dropped: list[str] = []
    cut = 0
    for row in rows:
        prompt, response = tokenizer.pair_ids(row)
        room = max_length - len(prompt)
        if room < 1:  # a pair without a response teaches nothing
            dropped.append(row.id)
            continue
        cut += len(response) > room
        kept.append(row)
        pairs.append(Pair(row.id, list(prompt), list(response[:room])))
    if len(dropped) > TOO_MANY * len(rows):
        raise InputError(
            f"max_length={max_length}: the prompt alone fills it in {len(dropped)} of {len(rows)} "
            f"rows (the first: {dropped[0]}); raise max_length or drop these rows"
        )
    return Prepared(kept, pairs, dropped, cut)


def with_losers(
    pairs: Sequence[Pair], generated: Sequence[Sequence[int]], max_length: int
) -> list[Pair]:
    """Returns the pairs with their sampled losers, token ids, in the same order.

    A loser is cut so that it has at most max_length tokens with its prompt.
    """
    return [
        replace(pair, generated=list(ids[: max_length - len(pair.prompt)]))
        for pair, ids in zip(pairs, generated, strict=True)
    ]


def usable(pair: Pair) -> bool:
    """Says whether a pair teaches anything: as token ids, its responses differ."""
    if pair.generated is None:
        return True
    # Equal responses have margin 0 and opposite gradients; an empty loser has no log-prob to lower.
    return pair.differs and len(pair.generated) > 0


def rejected_pairs(
    rows: Sequence[Row], pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int
) -> list[Pair]:
    """Returns the pairs with the rows' own rejected responses as losers.

    They become ids as the chosen ones do. Raises InputError for a row without one.
    """
    losers = []
    for row in rows:
        if row.rejected is None:
            raise InputError(
                f"{row.where or row.id}: has no rejected response, which method=dpo needs: rows "
                f"are {{prompt, chosen, rejected}} (docs/data.md)"
            )
        # The loser as a row of its own, so that the template writes it as it writes the winner.
        loser = replace(row, response=row.rejected, rejected=None)
        losers.append(tokenizer.pair_ids(loser).response)
    return with_losers(pairs, losers, max_length)


def ranked_pairs(
    pairs: Sequence[Pair],
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    preferences: Sequence[float],
    max_length: int,
) -> list[Pair | None]:
    """Makes the preferred of two samples the winner and the other the loser; None for a tie.

    samples: two responses (token ids) a prompt. preferences: how sure it is that the first is the
    better one, in [0, 1]; 0.5 and NaN (no verdict) are ties.
    """
    out: list[Pair | None] = []
    for pair, (first, second), preference in zip(pairs, samples, preferences, strict=True):
        if not preference < 0.5 and not preference > 0.5:  # 0.5, and NaN: it compares false
            out.append(None)
            continue
        better, worse = (first, second) if preference > 0.5 else (second, first)
        room = max_length - len(pair.prompt)
        out.append(replace(pair, real=list(better[:room]), generated=list(worse[:room])))
    return out
