"""LD-Align's objective, equation by equation, in the paper's order (arXiv 2404.06390): start here.

x is a prompt, y the data's response to it (the winner), y' the policy's own (the loser); pi is the
policy that is trained, pi_ref the one it starts from; E and D are the guide's encoder and decoder.
Log-probs are natural logarithms, of a whole response the sum over its tokens.

    reconstruction   L = -mean of log D(y | x, E(x, y)) and log D(y' | x, E(x, y'))          (4.1)
    distance         d_i = || E(x_i, y_i) - E(x_i, y'_i) ||                                  (4.2.1)
    weight           s_i = d_i / mean_j d_j                                                  (4.2.2)
    margin           Delta_i = log pi(y) / pi_ref(y) - log pi(y') / pi_ref(y')               (4.2.3)
    loss             l_i = -s_i log sigmoid(beta Delta_i), averaged over the pairs           (4.2.3)
                     with d l_i / d log pi(y) = -beta s_i sigmoid(-beta Delta_i), and the
                     opposite for y': far pairs pull hard, near pairs barely.

Distances and weights are computed here wherever the program needs them. The two losses run in
training as fused kernels, which never hold a log-prob a token in memory (`ops.sft_loss`,
`ops.pair_loss`); `tests/test_objective.py` holds both to this page in float64. Below the equations
are other people's losses, which the keys `loss.*` know, and the other weights that the key
`weights` knows, controls of the method.

Shapes: M response tokens, N rows, P pairs, Z latent width.
"""

import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.data.pairs import Pair
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.system.seeds import permutation

log = logging.getLogger(__name__)

Metric = Literal["euclidean", "cosine"]
# What a pair may be weighted by; `latent` is the method, the others are its controls.
WEIGHTS = (
    "latent",
    "uniform",
    "shuffled",
    "length",
    "inverse",
    "semantic",
    "pooled",
    "oracle",
)
# A share of the mean distance. Nearer pairs count as this near: no inverse weight exceeds 10.
NEAREST = 0.1


# ----------------------------------------------------------------------------- the five equations


def reconstruction_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The guide's loss (), in nats a token: -mean of the log-probs (M,) that the decoder gives to
    the tokens of the real responses, and -mean of those (M',) of the generated ones, each response
    with its own latent (section 4.1).
    """
    return -real.mean() - generated.mean()


def latent_distance(real: Tensor, generated: Tensor, metric: Metric = "euclidean") -> Tensor:
    """The distances (N,) float32 of real and generated responses, from their latents (N, Z) each:
    the length of the difference (section 4.2.1), or as a choice of ours 1 - cos of the angle.
    """
    if metric == "cosine":
        return cosine_distance(real, generated)
    return (real - generated).norm(dim=1).float()


def distance_weights(distances: Tensor, kept: Sequence[bool]) -> Tensor:
    """The weights (N,) float64, without a unit: s_i = d_i / mean_j d_j, the mean over the kept
    pairs of the whole iteration (section 4.2.2).

    Pairs not kept have weight 0, so the pairs that are trained on have mean weight 1, as
    SPIN's have. Where all distances are zero, they say nothing, and every kept pair has
    weight 1 (with a warning).
    """
    keep = torch.tensor(list(kept), dtype=torch.float64)
    distances = distances.double() * keep
    mean = distances.sum() / keep.sum().clamp(min=1)
    if mean <= 0:
        log.warning("all distances are zero: every pair has weight 1")
        return keep
    return distances / mean


def margin(
    logp_real: Tensor, logp_generated: Tensor, ref_real: Tensor, ref_generated: Tensor
) -> Tensor:
    """Delta (P,), in nats: by how much more than the reference the policy prefers y to y' (section
    4.2.3). All four are summed log-probs (P,), of the policy and of the reference.
    """
    return (logp_real - ref_real) - (logp_generated - ref_generated)


def dpo_loss(margins: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Each pair's share of the loss (P,), in nats: -s log sigmoid(beta Delta) (section 4.2.3). The
    loss of a step is its sum over the global batch, divided by the number of pairs in it.
    """
    return -weights * F.logsigmoid(beta * margins)


def dpo_coefficient(margins: Tensor, weights: Tensor, beta: float) -> Tensor:
    """d `dpo_loss` / d log pi(y) (P,), what a pair pulls with: -beta s sigmoid(-beta Delta)
    (section 4.2.3). The derivative by log pi(y') is the opposite.
    """
    return -beta * weights * torch.sigmoid(-beta * margins)


# ------------------------------------------------------------------ other losses, off by default


def smoothed_dpo_loss(
    margins: Tensor, weights: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Conservative DPO (P,), in nats (Mitchell 2023, ericmitchell.ai/cdpo.pdf): the expected loss
    where winner and loser are the wrong way round with probability e = label_smoothing,
    -s [(1 - e) log sigmoid(beta Delta) + e log sigmoid(-beta Delta)].
    """
    right, wrong = dpo_loss(margins, weights, beta), dpo_loss(-margins, weights, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def ipo_loss(margins: Tensor, weights: Tensor, beta: float) -> Tensor:
    """IPO (P,) (arXiv 2310.12036, equation 17, whose tau is beta): s (Delta - 1/(2 beta))^2. It
    draws every margin towards the same finite value, where DPO's has no end.
    """
    return weights * (margins - 1 / (2 * beta)).square()


def winner_nll(logp_real: Tensor, tokens: Tensor) -> Tensor:
    """-log pi(y) / |y| (P,), in nats a token: the term of RPO (arXiv 2404.19733) that keeps the
    winner likely. logp_real (P,): summed log-probs; tokens (P,): the lengths |y|.
    """
    return -logp_real / tokens


def optional_loss(
    logps: tuple[Tensor, Tensor],
    references: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor],
    weights: Tensor,
    beta: float,
    options: LossOptions = DPO,
) -> Tensor:
    """Each pair's share of the loss (P,) with the options of the keys `loss.*`; `dpo_loss` by
    default. logps, references, tokens: of y and of y', (P,) each.

    With length_normalised every log-prob of the margin is divided by its response's tokens. The
    weight s scales the preference and not the NLL: s says how much a pair's two responses differ,
    and the NLL has one response.
    """
    per = tokens if options.length_normalised else (torch.ones_like(weights),) * 2
    real, generated, ref_real, ref_generated = (
        x / n for side in (logps, references) for x, n in zip(side, per, strict=True)
    )
    delta = margin(real, generated, ref_real, ref_generated)
    loss = preference_loss(delta, weights, beta, options)
    return loss + options.nll * winner_nll(logps[0], tokens[0])


def preference_loss(
    margins: Tensor, weights: Tensor, beta: float, options: LossOptions = DPO
) -> Tensor:
    """The part of `optional_loss` that the margins (P,) make."""
    if options.kind == "ipo":
        return ipo_loss(margins, weights, beta)
    return smoothed_dpo_loss(margins, weights, beta, options.label_smoothing)


# -------------------------------------------------------------------------- choices and controls


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """The distances (N,) float32 of latents a and b (N, Z): 1 - cos(a_i, b_i), between 0 and 2,
    exactly 0 where they are equal.

    A zero vector is at distance 1 from any other vector (cos taken as 0) and at 0
    from another zero vector.
    """
    a, b = a.double(), b.double()
    lengths = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    # Half the squared distance of the unit vectors: 1 - cos would lose small distances to rounding,
    # or its sign.
    a, b = (x / length.where(length > 0, 1.0) for x, length in zip((a, b), lengths, strict=True))
    half = (a - b).square().sum(dim=1) / 2
    one_is_zero = ((lengths[0] == 0) != (lengths[1] == 0))[:, 0]
    return half.where(~one_is_zero, 1.0).clamp(max=2.0).float()


def contrast_loss(own: Tensor, sibling: Tensor) -> Tensor:
    """The guide's sibling contrast (N,), in nats: softplus(-G) of its sibling gain G, which is
    log D(y | x, z_y) - log D(y | x, z_y'): of the summed log-probs (N,) of a response with its own
    latent, and with that of the other response to the same prompt.

    Ours, not the paper's. It is InfoNCE (arXiv 1807.03748) with one negative: ln 2 minus its mean
    bounds the information that a latent has about which of the two responses is its own, which a
    decoder that knows the language has no other reason to use.
    """
    return F.softplus(sibling - own)


def length_distance(pairs: Sequence[Pair]) -> Tensor:
    """The distances (N,) float64 of pairs in token ids that know of length alone: |n_i - n'_i|, by
    how many tokens the two responses differ.
    """
    return torch.tensor([pair.length_gap for pair in pairs], dtype=torch.float64)


def oracle_distance(right: Sequence[bool], contrast: float) -> Tensor:
    """The distances (N,) float64 of one who knows which losers are right answers: 1 + c of a wrong
    loser, which is to become less likely, and 1 - c of a right one, which is not.

    contrast: c, in (0, 1]. What these weights buy bounds what a perfect distance could.
    """
    signs = 1 - 2 * torch.tensor(list(right), dtype=torch.float64)
    return 1 + contrast * signs


def pair_weights(
    kind: str,
    distances: Tensor,
    kept: Sequence[bool],
    seed: int,
    clip: float | None = None,
) -> tuple[Tensor, int]:
    """The weights (N,) float64 of pairs by the key `weights`, from their distances (N,), and how
    many of them `clip` lowered.

    s_i = d_i / mean_j d_j, the method's, where d_i is the latent distance. In its controls d_i is
    another (uniform: 1, as SPIN has it; length: `length_distance`; semantic: of sentence
    embeddings; pooled: of the start policy's mean states; oracle: `oracle_distance`), or the latent
    distances weigh otherwise:
        shuffled: the weights are dealt out among the kept pairs at random, so that only their
            distribution is left;
        inverse: they are of 1 / d_i, so that near pairs pull hard.
    All have mean 1 over the kept pairs. clip: no weight exceeds it; the rest is left as it is.
    """
    weights = distance_weights(distances, kept)
    if kind == "inverse":
        weights = distance_weights(1.0 / weights.clamp(min=NEAREST), kept)
    if kind == "shuffled":
        places = torch.tensor(list(kept)).nonzero()[:, 0]
        order = torch.from_numpy(permutation(seed, "weights/shuffled", len(places)))
        weights[places] = weights[places[order]]
    if clip is None:
        return weights, 0
    return weights.clamp(max=clip), int((weights > clip).sum())


def effective_size(weights: Tensor) -> float:
    """Effective sample size of weights, (sum w)^2 / sum w^2 (Kish 1965), as
    a share of their number.
    """
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights)) if len(weights) else 0.0
