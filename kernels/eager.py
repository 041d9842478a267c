"""Every op in plain PyTorch, forward and backward apart: the backend for any device.

It is the kernels' reading copy, too. All backends offer these functions with these signatures;
`ldalign.ops` adds checks and autograd. They differ from `reference.py`, the oracle, in doing no
work twice: gradients by formula, the head in pieces.

Shapes: N rows (flat tokens), D width, V vocabulary, P pairs, S = 2P responses (runs of rows; real,
generated, real, ...), H heads, E head width. "Wide" is float32, or float64 where the inputs are.
docs/kernels.md derives the gradients.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.kernels import reference
from ldalign.kernels.loss_options import DPO, Kind, LossOptions
from ldalign.kernels.pieces import row_pieces, whole_pairs
from ldalign.kernels.reference import accumulate_dtype
from ldalign.system.transfer import to_device

WORKSPACE_BYTES = 64 * 2**20  # a piece's wide logits stay below this


def available() -> bool:
    """Says that this backend runs everywhere."""
    return True


def why_not() -> str:
    """Returns why `available()` is false: never."""
    return ""


# ----------------------------------------------------------------------------------------- the head


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T)[target] and the log-sum-exp, (N,) wide each.

    The log-prob is 0 where the target is ignored.
    """
    logp = torch.empty(len(target), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(logp)
    for rows in row_pieces(len(hidden), _rows(weight)):
        logits = hidden[rows] @ weight.T
        logp[rows], lse[rows] = _logprob(logits, target[rows], ignore_index)
    return logp, lse


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden (N, D) and dweight (V, D) under grad (N,); None where not needed.

    d logp / d logits = one_hot(target) - softmax, from logits made again.
    Ignored rows come with grad 0.
    """
    out = _Gradients(hidden, weight, need_hidden, need_weight)
    for rows in row_pieces(len(hidden), _rows(weight)):
        out.add(rows, _logit_gradient(hidden[rows] @ weight.T, target[rows], lse[rows], grad[rows]))
    return out.finish()


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: Sequence[int],
    reference_sums: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    options: LossOptions = DPO,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Summed log-probs (S,) of the responses, and the loss's gradients, all in one pass.

    The loss is scale * `reference.pair_loss`. A response's tokens share one coefficient, known as
    soon as both sums of its pair are: the logits of a piece of whole pairs are turned into their
    gradient where they stand. A pair longer than a piece is visited twice.
    """
    sums = torch.zeros(len(lengths), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    out = _Gradients(hidden, weight, need_hidden, need_weight)
    for piece in whole_pairs(lengths, _rows(weight)):
        visits = list(piece.rows(_rows(weight)))
        kept = None  # the logits, where the piece is one visit long
        logps, lses = [], []
        for rows in visits:
            kept = hidden[rows] @ weight.T
            logp, lse = _logprob(kept, target[rows])
            logps.append(logp)
            lses.append(lse)
        chosen = piece.responses
        runs = torch.cat(logps).split(list(lengths[chosen]))  # a response's log-probs each
        sums[chosen] = torch.stack([run.sum() for run in runs])
        if not (need_hidden or need_weight):
            continue
        (lengths_here,) = to_device(hidden.device, torch.tensor(list(lengths[chosen])))
        coefficient = _coefficients(
            sums[chosen] - reference_sums[chosen],
            lengths_here.clamp(min=1).to(sums.dtype),
            pair_weight[piece.pairs],
            beta,
            scale,
            options,
        )
        per_row = coefficient.repeat_interleave(lengths_here, output_size=piece.stop - piece.start)
        for rows, lse in zip(visits, lses, strict=True):
            logits = kept if len(visits) == 1 else hidden[rows] @ weight.T
            assert logits is not None
            here = slice(rows.start - piece.start, rows.stop - piece.start)
            out.add(rows, _logit_gradient(logits, target[rows], lse, per_row[here]))
    return sums, *out.finish()


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs (N,) wide, and the gradients of scale * sum -logp, in one pass.

    Every row's coefficient is -scale.
    """
    logp = torch.empty(len(target), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
    out = _Gradients(hidden, weight, need_hidden, need_weight)
    for rows in row_pieces(len(hidden), _rows(weight)):
        logits = hidden[rows] @ weight.T
        logp[rows], lse = _logprob(logits, target[rows])
        if need_hidden or need_weight:
            out.add(rows, _logit_gradient(logits, target[rows], lse, torch.full_like(lse, -scale)))
    return logp, *out.finish()


def weighted_dpo(
    real: Tensor,
    generated: Tensor,
    ref_real: Tensor,
    ref_generated: Tensor,
    weight: Tensor,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted DPO loss of P pairs, all wide, and what its backward needs.

    Returns loss () = sum of weight * l, l (P,), rewards chosen and rejected
    (P,), d loss / d real (P,).
    """
    chosen, rejected = beta * (real - ref_real), beta * (generated - ref_generated)
    x = chosen - rejected
    if kind == "ipo":
        unweighted, pull = (x - 0.5).square() / beta**2, (1 - 2 * x) / beta**2
    else:
        unweighted = -F.logsigmoid(x) + label_smoothing * x
        pull = torch.sigmoid(-x) - label_smoothing
    coefficient = -beta * weight * pull
    return (weight * unweighted).sum(), unweighted, chosen, rejected, coefficient


def _rows(weight: Tensor) -> int:
    return max(1, WORKSPACE_BYTES // (4 * max(1, len(weight))))


def _logprob(
    logits: Tensor, target: Tensor, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    wide = accumulate_dtype(logits.dtype)
    largest = logits.amax(1).to(wide)
    lse = logits.to(wide, copy=True).sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
    ignored = None if ignore_index is None else target == ignore_index
    picked = target if ignored is None else target.masked_fill(ignored, 0)
    logp = logits.gather(1, picked[:, None])[:, 0].to(wide) - lse
    return (logp if ignored is None else logp.masked_fill(ignored, 0)), lse


def _logit_gradient(logits: Tensor, target: Tensor, lse: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * (one_hot(target) - softmax), rounded once to the logits' dtype."""
    z = logits.to(lse.dtype)
    z = z.sub_(lse[:, None]) if z.dtype != logits.dtype else z - lse[:, None]
    z.exp_().mul_(-coefficient[:, None])
    inside = target.clamp(0)  # an ignored row may have a negative target; its coefficient is 0
    return z.scatter_add_(1, inside[:, None], coefficient[:, None]).to(logits.dtype)


def _coefficients(
    gap: Tensor, lengths: Tensor, weight: Tensor, beta: float, scale: float, options: LossOptions
) -> Tensor:
    """d loss / d sums (S,), from the gaps (S,) of the sums to the reference's.

    -scale beta weight sigmoid(-beta Delta) for a real response, the opposite for its rival; what
    the options make of it: docs/kernels.md. lengths (S,): 1 or more.
    """
    gap = gap / lengths if options.length_normalised else gap
    none = gap.new_zeros(())  # the gaps stand for the policy's log-probs: the reference's are 0
    both = gap[0::2], gap[1::2], none, none
    pull = weighted_dpo(*both, weight, beta, options.kind, options.label_smoothing)[-1] * scale
    coefficient = torch.stack((pull, -pull), dim=1).flatten()
    coefficient = coefficient / lengths if options.length_normalised else coefficient
    if options.nll:
        coefficient[0::2] -= scale * options.nll / lengths[0::2]
    return coefficient


class _Gradients:
    """dh and dw of a head whose logit gradients come piece by piece.

    dw is summed wide and rounded once.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
    ) -> None:
        self.hidden, self.weight = hidden, weight
        self.dh = torch.zeros_like(hidden) if need_hidden else None
        self.dw = (
            torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype)) if need_weight else None
        )

    def add(self, rows: slice, dz: Tensor) -> None:
        if self.dh is not None:
            self.dh[rows] = dz @ self.weight
        if self.dw is not None:
            self.dw += dz.T @ self.hidden[rows]

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        return self.dh, None if self.dw is None else self.dw.to(self.weight.dtype)


# ---------------------------------------------------------------------------------------- the block


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight (N, D), and 1 / rms (N,) wide."""
    wide = x.to(accumulate_dtype(x.dtype))
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight.to(wide.dtype)).to(x.dtype), scale[:, 0]


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """dx (N, D) and dweight (D,) under the upstream gradient dy (N, D).

    With g = dy w and y = x r w: dx = r (g - x r^2 mean(g x)), dw = sum dy x r.
    """
    scale = scale[:, None]
    normed = x.to(scale.dtype) * scale
    grad = grad.to(scale.dtype)
    dweight = (grad * normed).sum(0).to(weight.dtype)
    grad = grad * weight.to(scale.dtype)
    normed.mul_((grad * normed).mean(-1, keepdim=True))
    return grad.sub_(normed).mul_(scale).to(x.dtype), dweight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of x + residual, that sum itself (rounded to their dtype first), and 1 / rms."""
    total = x + residual
    y, scale = rms_norm(total, weight, eps)
    return y, total, scale


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is also the residual's, and dweight (D,).

    It is the norm's, plus what reaches the sum from elsewhere.
    """
    wide = scale.dtype
    normed = total.to(wide) * scale[:, None]
    dweight = (grad.to(wide) * normed).sum(0).to(weight.dtype)
    g = grad.to(wide) * weight.to(wide)
    normed.mul_((g * normed).mean(-1, keepdim=True))
    return g.sub_(normed).mul_(scale[:, None]).add_(grad_total.to(wide)).to(total.dtype), dweight


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, heads: int) -> None:
    """Turns pairs (x[e], x[e + E/2]) of the first `heads` heads by their angle, in place.

    `inverse` turns them back, which is the gradient.
    """
    x[:, :heads] = reference.rope(x[:, :heads], cos, -sin if inverse else sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gates before ups."""
    wide = accumulate_dtype(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, -1)
    return F.silu(gate).mul_(up).to(gate_up.dtype)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s))."""
    wide = accumulate_dtype(gate_up.dtype)
    (g, up), dy = gate_up.to(wide).chunk(2, -1), grad.to(wide)
    s = torch.sigmoid(g)
    dup = (g * s).mul_(dy)
    dgate = (1 - s).mul_(g).add_(1).mul_(s).mul_(dy).mul_(up)
    return torch.cat((dgate, dup), -1).to(gate_up.dtype)


# ---------------------------------------------------------------------------------------- attention


def pair_attention(
    qkv: Tensor, heads: int, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Segment by segment: (N, H, E), and the log-sum-exps (N, H) wide."""
    out = qkv.new_empty(len(qkv), heads, qkv.shape[2])
    lse = qkv.new_empty(len(qkv), heads, dtype=accumulate_dtype(qkv.dtype))
    for own, keys, unseen in reference.segment_masks(segments, window, qkv.device):
        q, k, v = reference.split_heads(qkv, heads, own, keys)
        scores = _scores(q, k).masked_fill_(unseen, float("-inf"))
        sums = scores.logsumexp(-1)
        out[own] = (
            ((scores - sums[..., None]).exp_().to(v.dtype) @ v[:, None])
            .flatten(0, 1)
            .transpose(0, 1)
        )
        lse[own] = sums.flatten(0, 1).T
    return out, lse


def pair_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    segments: Tensor,
    window: int | None,
) -> Tensor:
    """dqkv (N, H + 2K, E) under the upstream gradient dy (N, H, E).

    With p = exp(scores - lse): dv = p^T dy, ds = p (dy v^T - dy . y) /
    sqrt(E), dq = ds k, dk = ds^T q.
    """
    K, E = (qkv.shape[1] - heads) // 2, qkv.shape[2]
    wide = accumulate_dtype(qkv.dtype)
    dq = qkv.new_empty(len(qkv), heads, E)
    dkv = qkv.new_zeros(len(qkv), 2 * K, E, dtype=wide)  # a prompt's sums over all its responses
    delta = (grad.to(wide) * out.to(wide)).sum(-1)  # (N, H)

    def grouped(x: Tensor) -> Tensor:  # (T, H, ...) -> (K, H/K, T, ...)
        return x.unflatten(1, (K, -1)).movedim(0, 2)

    for own, keys, unseen in reference.segment_masks(segments, window, qkv.device):
        q, k, v = reference.split_heads(qkv, heads, own, keys)
        dy = grouped(grad[own])
        p = (_scores(q, k) - grouped(lse[own])[..., None]).exp_().masked_fill_(unseen, 0.0)
        ds = (
            (dy @ v[:, None].transpose(-1, -2))
            .to(wide)
            .sub_(grouped(delta[own])[..., None])
            .mul_(p)
            .mul_(E**-0.5)
        )
        p, ds = p.to(qkv.dtype), ds.to(qkv.dtype)
        dq[own] = (ds @ k[:, None]).flatten(0, 1).transpose(0, 1)
        dk, dv = (
            (a.transpose(-1, -2) @ b).to(wide).sum(1).transpose(0, 1) for a, b in ((ds, q), (p, dy))
        )
        dkv.index_add_(0, keys, torch.cat((dk, dv), 1))
    return torch.cat((dq, dkv.to(qkv.dtype)), 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(K, G, T, E) and (K, n, E) -> scaled scores (K, G, T, n), wide."""
    return (
        (q @ k[:, None].transpose(-1, -2)).to(accumulate_dtype(q.dtype)).mul_(q.shape[-1] ** -0.5)
    )


# ----------------------------------------------------------------------------------- the optimizers


def adamw_(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    factor: Tensor | None,
    learning_rate: float,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    seed: int,
) -> None:
    """AdamW's step number `step`, from 1 (arXiv 1711.05101), in place and in float32.

    p and grad, mean and square are float32 or bfloat16. What is bfloat16 is rounded up or down
    at random, by its distance from both neighbours: rounded to the nearest, steps below 1/512 of
    a weight would be lost. factor () float32, None for 1: the gradient's (`scale_`).
    """
    random = _random_bits(p, seed)
    g = scale_(grad, factor).float()
    m = mean.float().mul_(beta1).add_(g, alpha=1 - beta1)
    v = square.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    _store(
        p,
        p.float()
        .mul_(1 - learning_rate * decay)
        .addcdiv_(m, size, value=-learning_rate / (1 - beta1**step)),
        random,
    )
    _store(mean, m, random >> 16)
    _store(square, v, random >> 8)


def rmsprop_(
    p: Tensor,
    grad: Tensor,
    square: Tensor,
    factor: Tensor | None,
    learning_rate: float,
    decay: float,
    alpha: float,
    eps: float,
    seed: int,
) -> None:
    """RMSprop's step as torch.optim has it (no momentum, not centred), in place.

    Rounding and factor are as in `adamw_`.
    """
    random = _random_bits(p, seed)
    g = scale_(grad, factor).float().add(p.float(), alpha=decay)
    v = square.float().mul_(alpha).addcmul_(g, g, value=1 - alpha)
    _store(p, p.float().addcdiv_(g, v.sqrt().add_(eps), value=-learning_rate), random)
    _store(square, v, random >> 16)


def scale_(grad: Tensor, factor: Tensor | None) -> Tensor:
    """The gradient times the factor, in place, rounded to its dtype.

    On the CPU, where a number can be looked at without a wait, 1 costs no pass.
    """
    if factor is None or (factor.device.type == "cpu" and factor == 1):
        return grad
    return grad.mul_(factor)


def _random_bits(p: Tensor, seed: int) -> Tensor:
    """32 random bits a value of p, in int64.

    They are MurmurHash3's finalizer of the value's index, keyed by the seed.
    """
    h = (
        torch.arange(p.numel(), device=p.device)
        .view(p.shape)
        .mul_(0x9E3779B9)
        .add_(seed)
        .bitwise_and_(0xFFFFFFFF)
    )
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor).bitwise_and_(0xFFFFFFFF)
    return h ^ (h >> 16)


def _store(to: Tensor, value: Tensor, random: Tensor) -> None:
    # With random bits added below those that stay, truncating rounds at random.
    if to.dtype == torch.bfloat16:
        bits = (
            (value.view(torch.int32) + (random & 0xFFFF).int())
            .bitwise_and_(-0x10000)
            .view(torch.float32)
        )
        value = torch.where(value.isfinite(), bits, value)
    to.copy_(value)


# --------------------------------------------------------------------------------------- generation

BLOCK = 256  # tokens whose probabilities are summed first


def rope_to_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Turned queries; turned keys, and values, go to their pages (`reference.rope_to_pages`)."""
    K = keys.shape[2]
    turned = reference.rope(qkv[:, : heads + K], cos, sin)
    keys.view(-1, *keys.shape[2:])[slots] = turned[:, heads:]
    values.view(-1, *values.shape[2:])[slots] = qkv[:, heads + K :]
    return turned[:, :heads]


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    most: int,
    window: int | None,
) -> Tensor:
    """Attention of new tokens over their rows' pages (`reference.paged_attention`).

    Where each row has one new token, all are computed at once.
    """
    if most > 1:
        return reference.paged_attention(q, keys, values, rows, pages, window)
    # (R, K, P * 16, E)
    k, v = (x[pages.long()].flatten(1, 2).transpose(1, 2) for x in (keys, values))
    R, H, E = q.shape
    scores = (q.view(R, k.shape[1], -1, E) @ k.transpose(-1, -2)).to(
        accumulate_dtype(q.dtype)
    ) / math.sqrt(E)
    gap = rows[:, 1:] - torch.arange(k.shape[2], device=q.device)  # (R, P * 16)
    unseen = (gap < 0) if window is None else (gap < 0) | (gap >= window)
    probs = scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1).to(v.dtype)
    return (probs @ v).view(R, H, E)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The next tokens and their log-probs (`reference.sample`).

    Without a cumulative sum over the whole vocabulary.
    """
    if temperature == 0:
        return reference.sample(logits, uniform, 0.0, 0, 1.0, 0.0, penalty, seen)
    probs = reference.kept(
        reference.penalised(logits, penalty, seen) / temperature, top_k, top_p, min_p
    )
    ids = _invert(probs, uniform)
    return ids, probs.gather(1, ids[:, None])[:, 0].log()


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token (R,) at which each row's cumulative distribution passes `uniform`.

    First its block is found, then the token in the block. Partial sums are float64: over a
    vocabulary, float32 ones would move boundaries by more than the logits' rounding.
    """
    # (R, V / BLOCK, BLOCK)
    padded = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    blocks = padded.sum(-1).double().cumsum(-1)
    wanted = uniform[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, wanted, right=True).clamp(max=blocks.shape[1] - 1)
    before = F.pad(blocks, (1, 0)).gather(1, block)
    inside = padded.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]  # (R, BLOCK)
    offset = torch.searchsorted(inside.double().cumsum(-1), wanted - before, right=True).clamp(
        max=BLOCK - 1
    )
    ids = (block * BLOCK + offset)[:, 0]
    # A number within rounding of a block's end can pass its last token, onto one of probability 0
    # or past the last.
    lost = F.pad(probs, (0, 1)).gather(1, ids[:, None].clamp(max=probs.shape[-1]))[:, 0] <= 0
    return torch.where(lost, block[:, 0] * BLOCK + inside.argmax(-1), ids)
