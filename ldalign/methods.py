"""Methods are pair sources, nothing else: what differs between SFT, SPIN and LD-Align is which pairs they train on.

`sft`: real responses, no loser. `spin` (arXiv 2401.01335): (real, generated, 1). `ld_align` (arXiv 2404.06390): (real,
generated, s) with s the latent distance over its mean.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldalign.batches import Pair
from ldalign.data import Row
from ldalign.errors import InputError
from ldalign.tokenizer import Tokenizer

log = logging.getLogger(__name__)
TOO_MANY = 0.01  # share of rows whose prompt alone fills max_length, above which the setting is wrong, not the rows


@dataclass(frozen=True)
class Prepared:
    """Rows in token ids, and what was done to fit them."""

    rows: list[Row]  # those kept
    pairs: list[Pair]  # one a kept row, without a loser: an SFT row as it stands
    dropped: list[str]  # ids of rows whose prompt alone fills max_length
    cut: int  # responses that lost their end, and with it their end token


def prepare(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Prepared:
    """Prompt and response ids of every row, at most max_length tokens together; the response is what is cut.

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
            f"max_length={max_length}: the prompt alone fills it in {len(out.dropped)} of {len(rows)} rows (the first: "
            f"{out.dropped[0]}); raise max_length or drop these rows"
        )
    return replace(out, cut=cut)


def with_losers(pairs: Sequence[Pair], generated: Sequence[Sequence[int]], max_length: int) -> list[Pair]:
    """The pairs with their sampled losers (token ids, cut to max_length with their prompt)."""
    return [
        replace(pair, generated=list(ids[: max_length - len(pair.prompt)]))
        for pair, ids in zip(pairs, generated, strict=True)
    ]


def usable(pair: Pair) -> bool:
    """Whether a pair teaches anything: its responses differ, as token ids."""
    return pair.generated is None or (pair.real != pair.generated and len(pair.generated) > 0)


def distance_weights(distances: Tensor, kept: Sequence[bool]) -> Tensor:
    """(N,) float64 weights s_i = d_i / mean_j d_j, the mean over the kept pairs of the whole iteration (paper 4.2.2).

    Pairs not kept have weight 0, so the pairs that are trained on have mean weight 1, as SPIN's have. Where all
    distances are zero, they say nothing, and every kept pair has weight 1 (with a warning).
    """
    keep = torch.tensor(list(kept), dtype=torch.float64)
    distances = distances.double() * keep
    mean = distances.sum() / keep.sum().clamp(min=1)
    if mean <= 0:
        log.warning("all latent distances are zero: every pair has weight 1")
        return keep
    return distances / mean


def effective_size(weights: Tensor) -> float:
    """Effective sample size of weights, (sum w)^2 / sum w^2 (Kish 1965), as a share of their number."""
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights)) if len(weights) else 0.0
