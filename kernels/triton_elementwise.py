# mypy: disable-error-code="no-untyped-def"
"""Triton: rope_, swiglu and weighted_dpo, one read and one write of every element.

rope_         x <- R(angle) x for the pairs (x[e], x[e + E/2]), in place. Backward: dx = R(-angle)
              dy, the same kernel with `inverse`. x (N, H, E), cos and sin (N, E/2).
swiglu        y = g s u with s = sigmoid(g);  dg = dy u s (1 + g (1 - s)),  du = dy g s.
              Keeps gate and up, side by side.
weighted_dpo  Delta = (sums_real - ref_real) - (sums_generated - ref_generated),
              l = -log sigmoid(beta Delta),
              d(w l)/d(sums_real) = -beta w sigmoid(-beta Delta), the opposite for sums_generated.
              All (P,) float32. With label smoothing e, and of kind ipo: docs/kernels.md.

float32, bfloat16 and float16 in and out; the arithmetic is float32, rounded once at the store.
Oracles: `rope`, `swiglu` and `weighted_dpo_loss` in `ldalign.kernels.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.loss_options import Kind
from ldalign.kernels.triton_common import launch, narrow, unit_stride

HEADS = 4  # a program of rope_ turns this many heads with the cosines it has loaded
# Pairs of one head a program of rope_ holds: no fewer than its threads, so that each pair has one
# thread, which reads before it writes.
ROPE_PAIRS = 1024
SWIGLU_BLOCK = 2048
DPO_BLOCK = 1024


# N and P are not specialised on: a new batch size must not mean a new compilation.
@triton.jit(do_not_specialize=["N"])
def _rope_kernel(
    x,
    cos,
    sin,
    N,
    H,
    half,
    token_stride,
    head_stride,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, HALF)
    inside = (tokens < N)[:, None] & (e < half)[None, :]
    angle = tokens[:, None] * half + e[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        mask = inside & (e < tl.where(head < H, half, 0))[None, :]  # none of a head beyond the last
        place = x + tokens[:, None] * token_stride + head * head_stride + e[None, :]
        a = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(place + half, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, narrow(a * c - b * s, x.dtype.element_ty), mask=mask)
        tl.store(place + half, narrow(b * c + a * s, x.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_kernel(gate_up, y, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = gate_up + row * 2 * F + at
    g = tl.load(gate, mask=at < F).to(tl.float32)
    u = tl.load(gate + F, mask=at < F).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(y + row * F + at, narrow(g * s * u, y.dtype.element_ty), mask=at < F)


@triton.jit
def _swiglu_backward_kernel(dy, gate_up, dgate_up, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dy + row * F + at, mask=at < F).to(tl.float32)
    gate = gate_up + row * 2 * F + at
    g = tl.load(gate, mask=at < F).to(tl.float32)
    u = tl.load(gate + F, mask=at < F).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    dgate = dgate_up + row * 2 * F + at
    tl.store(dgate, narrow(d * u * s * (1 + g * (1 - s)), dgate_up.dtype.element_ty), mask=at < F)
    tl.store(dgate + F, narrow(d * g * s, dgate_up.dtype.element_ty), mask=at < F)


@triton.jit
def sigmoid_of_minus(x):
    """1 / (1 + exp(x)), of which the exponential never overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, e, 1.0) / (1 + e)


@triton.jit
def pull(x, beta, smoothing, IPO: tl.constexpr):
    """-dl/dx of a pair's loss l at x = beta Delta."""
    if IPO:
        slope = (1 - 2 * x) / (beta * beta)
    else:
        slope = sigmoid_of_minus(x) - smoothing
    return slope


@triton.jit(do_not_specialize=["P"])
def _weighted_dpo_kernel(
    real,
    generated,
    ref_real,
    ref_generated,
    weight,
    loss,
    unweighted,
    chosen,
    rejected,
    coefficient,
    P,
    beta,
    smoothing,
    IPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, P, BLOCK):  # one program, so that the sum has one order
        p = start + tl.arange(0, BLOCK)
        mask = p < P
        w = tl.load(weight + p, mask=mask, other=0.0)
        c = beta * (
            tl.load(real + p, mask=mask, other=0.0) - tl.load(ref_real + p, mask=mask, other=0.0)
        )
        r = beta * (
            tl.load(generated + p, mask=mask, other=0.0)
            - tl.load(ref_generated + p, mask=mask, other=0.0)
        )
        x = c - r
        if IPO:
            value = (x - 0.5) * (x - 0.5) / (beta * beta)
        else:
            e = tl.exp(-tl.abs(x))
            # A tiny e is lost in 1 + e. Where that rounds to u, log(u) e / (u - 1) makes up for it.
            u = 1 + e
            log1p = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
            value = tl.maximum(-x, 0.0) + log1p + smoothing * x  # NaN: e is NaN too
        total += tl.where(mask, w * value, 0.0)
        tl.store(unweighted + p, value, mask=mask)
        tl.store(chosen + p, c, mask=mask)
        tl.store(rejected + p, r, mask=mask)
        tl.store(coefficient + p, -beta * w * pull(x, beta, smoothing, IPO), mask=mask)
    tl.store(loss, tl.sum(total, 0))


def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, heads: int) -> None:
    """x (N, H, E), cos and sin (N, E/2): turns the first `heads` heads in place.

    They turn forwards or, with `inverse`, back.
    """
    N, _, E = x.shape
    half = E // 2
    rows, cos, sin = unit_stride(x), cos.contiguous(), sin.contiguous()
    width = triton.next_power_of_2(half)
    tokens = max(1, ROPE_PAIRS // width)
    launch(
        _rope_kernel,
        (triton.cdiv(N, tokens), triton.cdiv(heads, HEADS)),
        x,
        rows,
        cos,
        sin,
        N,
        heads,
        half,
        rows.stride(0),
        rows.stride(1),
        INVERSE=inverse,
        HEADS=HEADS,
        TOKENS=tokens,
        HALF=width,
        num_warps=4,
    )
    if rows is not x:
        x.copy_(rows)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F), gates before ups: (..., F)."""
    gate_up = gate_up.contiguous()
    F = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], F))
    grid = (y.numel() // max(1, F), triton.cdiv(F, SWIGLU_BLOCK))
    launch(_swiglu_kernel, grid, y, gate_up, y, F, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, laid out as it is."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    F = dy.shape[-1]
    out = torch.empty_like(gate_up)
    grid = (dy.numel() // max(1, F), triton.cdiv(F, SWIGLU_BLOCK))
    launch(_swiglu_backward_kernel, grid, dy, dy, gate_up, out, F, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out


def weighted_dpo(
    sums_real: Tensor,
    sums_generated: Tensor,
    ref_real: Tensor,
    ref_generated: Tensor,
    weight: Tensor,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted DPO loss of P pairs, five inputs (P,) float32, and what its backward needs.

    Returns loss () = sum of w l, l, chosen, rejected, d loss / d sums_real, the last four (P,).
    """
    inputs = [
        x.float().contiguous() for x in (sums_real, sums_generated, ref_real, ref_generated, weight)
    ]
    loss = torch.empty((), dtype=torch.float32, device=weight.device)
    outputs = [torch.empty_like(inputs[0]) for _ in range(4)]
    launch(
        _weighted_dpo_kernel,
        (1,),
        loss,
        *inputs,
        loss,
        *outputs,
        len(weight),
        beta,
        label_smoothing,
        IPO=kind == "ipo",
        BLOCK=DPO_BLOCK,
        num_warps=4,
    )
    unweighted, chosen, rejected, coefficient = outputs
    return loss, unweighted, chosen, rejected, coefficient
