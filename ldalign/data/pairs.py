"""Methods are pair sources, nothing else: what differs between them is which pairs they train on,
with which weights.

`sft`: real responses, no loser. `spin` (arXiv 2401.01335): (real, generated, 1). `ld_align` (arXiv
2404.06390): (real, generated, s) with s the latent distance over its mean. `dpo` (arXiv
2305.18290): (chosen, rejected, 1) of preference data. `self_reward` (arXiv 2401.10020) and `rlaif`
(arXiv 2309.00267): (better, worse, 1) of two own samples, as the policy itself or another judge
says. Which stages make them is in `ldalign.run.methods`; here is what needs no model.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldalign.data.rows import Row
from ldalign.data.tokenizer import Tokenizer
from ldalign.system.errors import InputError

log = logging.getLogger(__name__)
# share of rows whose prompt alone fills max_length, above which the setting is wrong, not the rows
TOO_MANY = 0.01


@dataclass(frozen=True)
class Pair:
    """What training and scoring work on, in token ids. `generated` None: a row for SFT, which has
    no loser.
    """

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
class Prepared:
    """Rows in token ids, and what was done to fit them."""

    rows: list[Row]  # those kept
    pairs: list[Pair]  # one a kept row, without a loser: an SFT row as it stands
    dropped: list[str]  # ids of rows whose prompt alone fills max_length
    cut: int  # responses that lost their end, and with it their end token


def prepare(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Prepared:
    """Prompt and response ids of every row, at most max_length tokens together; the response is
    what is cut.

    Raises InputError when more than 1 % of the rows have no room for a response.
    """
    out = Prepared([], [], [], 0)
    cut = 0
    for row in rows:
        prompt, response = tokenizer.pair_ids(row)
        room = max_length - len(prompt)
        if room < 1:
            out.dropped.append(row.id)
            continue
        cut += len(response) > room
        out.rows.append(row)
        out.pairs.append(Pair(row.id, list(prompt), list(response[:room])))
    if len(out.dropped) > TOO_MANY * len(rows):
        raise InputError(
            f"max_length={max_length}: the prompt alone fills it in {len(out.dropped)} of "
            f"{len(rows)} rows (the first: {out.dropped[0]}); raise max_length or drop these rows"
        )
    return replace(out, cut=cut)


def with_losers(
    pairs: Sequence[Pair], generated: Sequence[Sequence[int]], max_length: int
) -> list[Pair]:
    """The pairs with their sampled losers (token ids, cut to max_length with their prompt)."""
    return [
        replace(pair, generated=list(ids[: max_length - len(pair.prompt)]))
        for pair, ids in zip(pairs, generated, strict=True)
    ]


def usable(pair: Pair) -> bool:
    """Whether a pair teaches anything: its responses differ, as token ids."""
    return pair.generated is None or (pair.real != pair.generated and len(pair.generated) > 0)


def rejected_pairs(
    rows: Sequence[Row], pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int
) -> list[Pair]:
    """The pairs with the rows' own rejected responses, in ids as the chosen ones are. InputError
    for a row without.
    """
    losers = []
    for row in rows:
        if row.rejected is None:
            raise InputError(
                f"{row.where or row.id}: has no rejected response, which method=dpo needs: rows "
                f"are {{prompt, chosen, rejected}}}} (docs/data.md)"
            )
        losers.append(
            tokenizer.pair_ids(replace(row, response=row.rejected, rejected=None)).response
        )
    return with_losers(pairs, losers, max_length)


def ranked_pairs(
    pairs: Sequence[Pair],
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    preferences: Sequence[float],
    max_length: int,
) -> list[Pair | None]:
    """Of two samples (token ids) a prompt, the preferred as winner and the other as loser; None for
    a tie.

    preferences: that the first is better, in [0, 1]; 0.5 and NaN (no verdict) are ties.
    """
    out: list[Pair | None] = []
    for pair, (first, second), preference in zip(pairs, samples, preferences, strict=True):
        if not preference < 0.5 and not preference > 0.5:
            out.append(None)
            continue
        better, worse = (first, second) if preference > 0.5 else (second, first)
        room = max_length - len(pair.prompt)
        out.append(replace(pair, real=list(better[:room]), generated=list(worse[:room])))
    return out
