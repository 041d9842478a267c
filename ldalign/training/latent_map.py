"""How a guide's map to the latent begins: drawn and standardised, or fitted in closed form.

The mean of a response's token states moves with the tokens that happen to be in it, and along some
directions far more than along others. `fit` measures states in units of that movement, as speaker
recognition does with speakers for responses and utterances for tokens: within-class covariance
normalisation (Hatch, Kajarekar and Stolcke 2006) and the leading directions of linear discriminant
analysis (Dehak et al. 2011). Nothing of it is learned by gradients, nor depends on chance.

Shapes: R responses, M tokens of all of them, D width of the states, Z latent width.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.models.guide import Guide, States, runs
from ldalign.system.errors import NumericsError
from ldalign.system.metrics import Bar

FIT_PAIRS = 512  # whose states the map is fitted to
STANDARD_PAIRS = 64  # that say what a drawn map's mean and deviation are
READ_TOKENS = 4096  # at a time
# Of the mean variance of a state's places, added to each: a few hundred responses do not know the
# directions along which states hardly move, and dividing by next to nothing would blow those up.
SHRINKAGE = 0.1
ROUNDING = 1e-9  # a share of the largest variance below which there is none

# fitted, and left at that; tuned: fitted, and trained from there on; drawn at random, and trained
LatentMap = Literal["fitted", "tuned", "drawn"]


@torch.no_grad()
def fit(
    guide: Guide,
    pairs: Sequence[Pair],
    states: Sequence[States] | None = None,
    budget: int = READ_TOKENS,
) -> None:
    """Sets the map to the latent of a guide that reads mean states by `discriminant_map`, over both
    responses of the first FIT_PAIRS pairs. states: of each pair, where they are known; budget: else
    the most tokens that are read at a time.

    The states in front of the tokens stand for those of the tokens: all but one are the same.
    Raises NumericsError naming rows whose states are not finite.
    """
    first = pairs[:FIT_PAIRS]
    width = guide.encoder.embedding.embedding_dim
    within = torch.zeros(width, width, dtype=torch.float64, device=guide.latent.null.device)
    means, tokens = [], 0
    known = None if states is None else zip(([p] for p in first), states, strict=False)
    for batch, own in _read(guide, first, budget) if known is None else known:
        if not bool(own.read.isfinite().all() and own.before.isfinite().all()):
            raise NumericsError(
                f"row {', '.join(pair.id for pair in batch)}: the guide's states are not finite; "
                "look at the weights that its towers begin as"
            )
        within += scatter(own.before, [len(y) for pair in batch for y in pair.responses])
        tokens += len(own.before)
        means.append(own.read)
    linear = guide.latent.to_latent
    weight, bias = discriminant_map(torch.cat(means), within / tokens, linear.out_features)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def scatter(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns how the token states of responses vary about each response's mean: (D, D) float64,
    the sum over the tokens of the outer product of their deviations.

    states (M, D): one response after the other. lengths: the number of tokens of each.
    """
    parts = [part - part.mean(0) for part in states.double().split(list(lengths))]
    apart = torch.cat(parts)
    return apart.T @ apart


def discriminant_map(means: Tensor, within: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Returns the weight (Z, D) and bias (Z,), float64, of the map z = W m + b of a response's mean
    state m to the `width` directions in which responses differ most, in units in which the tokens
    of one response vary about as much in every direction (but for SHRINKAGE). z has mean 0, and
    deviation 1 over all.

    The directions are those of all differences of responses. Those of a prompt's two responses
    alone would be fewer, and would lie along the very differences that are to be measured: rows
    that were fitted to would be farther apart than others, whatever they say.

    means (R, D): the responses' mean states. within (D, D): the covariance of token states about
    the mean of their response. Where responses differ in fewer directions, the others are zero.
    """
    means = means.double()
    middle = means.mean(0)
    spread = within.diagonal().mean()
    least = torch.where(spread > 0, SHRINKAGE * spread, 1.0)  # 0: of one token each
    factor = torch.linalg.cholesky(within + torch.diag(least.expand(len(within))))
    # (D, R) each; equal responses leave no more than the rounding of their mean
    scaled, whole = (
        torch.linalg.solve_triangular(factor, x.T, upper=False) for x in (means - middle, means)
    )
    sizes, directions = torch.linalg.eigh(scaled @ scaled.T)  # the largest last
    least = torch.maximum(ROUNDING * sizes[-1], ROUNDING**2 * whole.square().sum())
    leading = directions.T[sizes > least].flip(0)[:width]
    # An eigenvector's sign is whatever rounding makes it.
    leading = leading * leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()
    weight = torch.zeros(width, len(within)).to(means)
    weight[: len(leading)] = torch.linalg.solve_triangular(factor, leading, upper=False, left=False)
    deviation = ((means - middle) @ weight.T).square().mean().sqrt().clamp(min=1e-12)
    weight = weight / deviation
    return weight, -weight @ middle


@torch.no_grad()
def standardise(guide: Guide, pairs: Sequence[Pair], budget: int = READ_TOKENS) -> None:
    """Moves and scales the map to the latent so that the latents of the first STANDARD_PAIRS pairs
    have mean 0 in each place and deviation 1 over all: what is added to the decoder begins as the
    difference of responses, not as what they share. budget: the most tokens read at a time.
    """
    if not pairs:
        return
    linear = guide.latent.to_latent
    queries = guide.config.latent_tokens if guide.config.readout == "queries" else 1
    read = torch.cat([own.read for _, own in _read(guide, pairs[:STANDARD_PAIRS], budget)]).double()
    z = read @ linear.weight.double().T + linear.bias.double()  # (R, Z), or (R m, k) of queries
    middle = z.unflatten(0, (-1, queries)).mean(0)
    deviation = (z.unflatten(0, (-1, len(middle))) - middle).square().mean().sqrt()
    linear.weight.div_(deviation.clamp(min=1e-12))
    # one map makes all m latents
    linear.bias.copy_((linear.bias.double() - middle.mean(0)) / deviation.clamp(min=1e-12))


def _read(guide: Guide, pairs: Sequence[Pair], budget: int) -> Iterator[tuple[list[Pair], States]]:
    with Bar("guide: states", len(pairs), "rows") as progress:
        for run in runs(range(len(pairs)), [pair.tokens for pair in pairs], budget):
            batch = [pairs[i] for i in run]
            yield batch, guide.states(batch)
            progress(len(batch), 0)
