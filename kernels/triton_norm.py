# mypy: disable-error-code="no-untyped-def"
"""Triton: rms_norm, alone or right after the residual addition, forward and backward.

y = x r w with r = 1 / sqrt(mean(x^2) + eps), a scale a row. With g = dy w and n = x r:

    dx = r (g - n mean(g n)),  dw = sum over rows of dy n.

With the addition, x = total = a + b, rounded to its dtype, and the gradient of total that arrives
from later layers joins: da = db = dx + dtotal.

x (N, D), weight (D,) in float32, bfloat16 or float16; the arithmetic is float32, rounded once at
the store. Kept: x (or total) and r (N,) float32; n is made again in the backward. dw is summed
without atomics: each program adds up a fixed run of rows, a second kernel adds up the programs in
order. Oracle: `ldalign.kernels.reference.rms_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.triton_common import launch, narrow, unit_stride

TILE = 4096  # values a program holds at a time: many short rows, or one long one
WIDEST = 32_768
# Partial sums of dw in the backward: some four for each multiprocessor of a large GPU.
PROGRAMS = 512


# N is not specialised on: a new batch size must not mean a new compilation.
@triton.jit(do_not_specialize=["N"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    total,
    rstd,
    N,
    D,
    x_stride,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    out = rows[:, None] * D + cols[None, :]
    source = x + rows[:, None] * x_stride + cols[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        other = residual + rows[:, None] * residual_stride + cols[None, :]
        value += tl.load(other, mask=mask, other=0.0).to(tl.float32)
        rounded = narrow(value, total.dtype.element_ty)
        tl.store(total + out, rounded, mask=mask)
        # The norm of what is kept, as if the addition were an operation of its own.
        value = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(y + out, narrow(value * r[:, None] * w[None, :], y.dtype.element_ty), mask=mask)
    tl.store(rstd + rows, r, mask=rows < N)


@triton.jit(do_not_specialize=["N", "rows_a_program"])
def _rms_norm_backward_kernel(
    dy,
    dtotal,
    x,
    weight,
    rstd,
    dx,
    partial,
    N,
    D,
    rows_a_program,
    dy_stride,
    dtotal_stride,
    x_stride,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_a_program
    cols = tl.arange(0, BLOCK)
    w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    dw = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for start in range(0, rows_a_program, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        upstream = dy + rows[:, None] * dy_stride + cols[None, :]
        d = tl.load(upstream, mask=mask, other=0.0).to(tl.float32)
        source = x + rows[:, None] * x_stride + cols[None, :]
        value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + rows, mask=rows < N, other=0.0)
        n = value * r[:, None]
        g = d * w[None, :]
        result = r[:, None] * (g - n * (tl.sum(g * n, 1) / D)[:, None])
        if ADD:
            joins = dtotal + rows[:, None] * dtotal_stride + cols[None, :]
            result += tl.load(joins, mask=mask, other=0.0).to(tl.float32)
        tl.store(
            dx + rows[:, None] * D + cols[None, :], narrow(result, dx.dtype.element_ty), mask=mask
        )
        dw += d * n
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + cols, tl.sum(dw, 0), mask=cols < D)


@triton.jit(do_not_specialize=["P"])
def _sum_rows_kernel(partial, out, P, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < P)[:, None] & (cols < D)[None, :]
        total += tl.load(partial + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, narrow(tl.sum(total, 0), out.dtype.element_ty), mask=cols < D)


def _tile(D: int, values: int) -> dict[str, int]:
    """The rows and columns that a program holds, and its warps.

    There are warps enough for at most so many values a thread, up to 16.
    """
    if not 0 < D <= WIDEST:
        raise ValueError(
            f"rms_norm: width {D}; the Triton kernel holds rows of 1 to {WIDEST} values"
        )
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // max(block, 64))  # a narrow row must not make a tile of thousands of rows
    return {
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, min(16, rows * block // (32 * values))),
    }


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    N, D = x.shape
    tile = _tile(D, values=32)
    x, other = unit_stride(x), unit_stride(x if residual is None else residual)
    y = torch.empty((N, D), dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else y
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_kernel,
        (triton.cdiv(N, tile["ROWS"]),),
        x,
        x,
        other,
        weight.contiguous(),
        y,
        total,
        rstd,
        N,
        D,
        x.stride(0),
        other.stride(0),
        eps,
        ADD=residual is not None,
        **tile,
    )
    return y, total, rstd


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    tile = _tile(D, values=16)  # beside a row's values each thread keeps its share of w and dw
    dy, x, joins = unit_stride(dy), unit_stride(x), unit_stride(dy if dtotal is None else dtotal)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight)
    run = tile["ROWS"] * triton.cdiv(triton.cdiv(N, tile["ROWS"]), PROGRAMS)  # rows of one program
    programs = triton.cdiv(N, run) if run else 0
    partial = torch.empty((programs, D), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_backward_kernel,
        (programs,),
        x,
        dy,
        joins,
        x,
        weight,
        rstd,
        dx,
        partial,
        N,
        D,
        run,
        dy.stride(0),
        joins.stride(0),
        x.stride(0),
        ADD=dtotal is not None,
        **tile,
    )
    # Without rows it is a sum over none: zeros.
    launch(
        _sum_rows_kernel,
        (triton.cdiv(D, 32),),
        x,
        partial,
        dweight,
        programs,
        D,
        ROWS=128,
        BLOCK=32,
        num_warps=4,
    )
    return dx, dweight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y (N, D) and rstd (N,) float32 of x (N, D), weight (D,)."""
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx (N, D) and dweight (D,) in weight's dtype."""
    return _backward(dy, None, x, weight, rstd)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y = norm(total), total = x + residual rounded to the dtype, and rstd (N,)."""
    return _forward(x, residual, weight, eps)


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of x and of residual, which is one, and dweight."""
    return _backward(dy, dtotal, total, weight, rstd)
