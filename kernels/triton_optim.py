# mypy: disable-error-code="no-untyped-def"
"""Triton: the optimizers' steps, one read and one write of all that a parameter has.

AdamW      m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
           w <- (1 - eta lambda) w - eta/(1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
RMSprop    g <- g + lambda w,  v <- a v + (1 - a) g^2,  w <- w - eta g / (sqrt(v) + eps)

g is the gradient times `factor`, rounded to the gradient's dtype: a tensor () float32 on the device
(or None for 1), so that clipping costs neither a pass nor a wait. Weights, gradients and averages
are float32 or bfloat16, each as it likes; the arithmetic is float32. What is bfloat16 is rounded at
random, with the bits of `ldalign.kernels.eager._random_bits`, made here. Every number that changes
from step to step is an argument, never a constant: a parameter's kernel is compiled once.
Oracles: `adamw` and `rmsprop` in `ldalign.kernels.reference`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.triton_common import launch, narrow

BLOCK = 1024  # with WARPS 8 values a thread: 128 bits of bfloat16, twice that of float32
WARPS = 4


@triton.jit
def _random_bits(at, seed):
    """32 random bits an index: MurmurHash3's finalizer of its low half, keyed by the seed."""
    h = at.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _store(to, at, value, seed, SHIFT: tl.constexpr, mask):
    """Where `to` is bfloat16, 16 of the random bits are added below those that stay."""
    if to.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + (_random_bits(at, seed) >> SHIFT & 0xFFFF)) & 0xFFFF0000
        finite = (bits & 0x7F800000) != 0x7F800000
        value = tl.where(finite, up, bits).to(tl.float32, bitcast=True)
    tl.store(to + at, narrow(value, to.dtype.element_ty), mask=mask)


@triton.jit
def _gradient(grad, factor, at, mask):
    g = tl.load(grad + at, mask=mask)
    if factor is not None:
        g = narrow(g.to(tl.float32) * tl.load(factor), grad.dtype.element_ty)
    return g.to(tl.float32)


@triton.jit
def _average(average, at, value, share, rest, mask):
    return tl.load(average + at, mask=mask).to(tl.float32) * share + value * rest


# N is specialised on, as 16 numbers are loaded at once only where it is a multiple of that.
@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    p,
    grad,
    mean,
    square,
    factor,
    N,
    seed,
    keep,
    rate,
    share1,
    rest1,
    share2,
    rest2,
    root,
    eps,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = _gradient(grad, factor, at, mask)
    m = _average(mean, at, g, share1, rest1, mask)
    v = _average(square, at, g * g, share2, rest2, mask)
    size = tl.sqrt_rn(v) * root + eps
    w = tl.load(p + at, mask=mask).to(tl.float32) * keep - tl.div_rn(rate * m, size)
    _store(p, at, w, seed, 0, mask)
    _store(mean, at, m, seed, 16, mask)
    _store(square, at, v, seed, 8, mask)


@triton.jit(do_not_specialize=["seed"])
def _rmsprop_kernel(
    p, grad, square, factor, N, seed, decay, rate, share, rest, eps, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    w = tl.load(p + at, mask=mask).to(tl.float32)
    g = _gradient(grad, factor, at, mask) + w * decay
    v = _average(square, at, g * g, share, rest, mask)
    _store(p, at, w - tl.div_rn(rate * g, tl.sqrt_rn(v) + eps), seed, 0, mask)
    _store(square, at, v, seed, 16, mask)


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
    """Step number `step`, from 1, in place (`ldalign.kernels.eager.adamw_`)."""
    _launch(
        _adamw_kernel,
        (p, grad, mean, square),
        factor,
        seed,
        1 - learning_rate * decay,
        learning_rate / (1 - beta1**step),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**step),
        eps,
    )


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
    """A step in place (`ldalign.kernels.eager.rmsprop_`)."""
    _launch(
        _rmsprop_kernel,
        (p, grad, square),
        factor,
        seed,
        decay,
        learning_rate,
        alpha,
        1 - alpha,
        eps,
    )


def _launch(
    kernel: object, tensors: tuple[Tensor, ...], factor: Tensor | None, seed: int, *numbers: float
) -> None:
    p = tensors[0]
    for x in tensors:
        if x.shape != p.shape or not x.is_contiguous():
            raise ValueError(
                f"optimizer's step: a tensor of shape {tuple(x.shape)}, strides {x.stride()}; "
                f"expected dense ones of shape {tuple(p.shape)}"
            )
    # The same bits as a signed number: from 2^31 on the argument would get another type.
    signed = seed - 2**32 if seed >= 2**31 else seed
    launch(
        kernel,
        (triton.cdiv(p.numel(), BLOCK),),
        p,
        *tensors,
        factor,
        p.numel(),
        signed,
        *map(float, numbers),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
