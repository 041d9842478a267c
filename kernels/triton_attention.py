# mypy: disable-error-code="no-untyped-def"
"""Triton: pair attention, forward and backward: causal, grouped-query, over prompts computed once.

    s_ij = q_i . k_j / sqrt(E),  lse_i = log sum_j exp s_ij,
    p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j,

where j are the keys that i sees: its prefix and its own segment up to itself, within the window
(`ldalign.kernels.segments`). With g = d loss / d o and delta_i = g_i . o_i:

    dp_ij = g_i . v_j,  ds_ij = p_ij (dp_ij - delta_i),
    dq_i = sum_j ds_ij k_j / sqrt(E),  dk_j = sum_i ds_ij q_i / sqrt(E),  dv_j = sum_i p_ij g_i.

qkv (N, H + 2K, E) in float32, bfloat16 or float16: H query heads, K key heads, K value heads; out
(N, H, E), lse (N, H) float32. Kept: qkv, out and lse. p is made again in the backward; no tensor of
queries x keys is ever in memory.

As in FlashAttention-2 (arXiv 2307.08691), with three turns. The rows of a query tile are tokens x
the H/K heads that share a key head, so that one read of a key serves them all. A query tile goes
through its keys by position, prefix and segment as one sequence, each key looked up where it lies.
And dk, dv come from a kernel of their own, which walks through all queries that see a tile of keys:
those of its segment and of every response that has it as prefix, and all heads of the group. So
nothing is added atomically and every sum has one order: repeatable bit for bit.

Sums are float32; p and ds are rounded to the inputs' dtype for their products, results once, at the
store. Oracle: `ldalign.kernels.reference.pair_attention`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels import segments as work
from ldalign.kernels.triton_common import INTERPRETED, capability, launch, narrow, unit_stride

LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """A tile's query rows (tokens x heads of a group) and keys, and how a program runs them."""

    rows: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


def plan(dtype: torch.dtype, E: int, capability: tuple[int, int] | None) -> Plan:
    """Returns the tiles for this dtype, head width and GPU."""
    if capability is None:  # the interpreter: small, so that small shapes have several
        return Plan(Tiles(16, 16, 1, 1), Tiles(16, 16, 1, 1), Tiles(16, 16, 1, 1))
    wide = E > 64
    if dtype == torch.float32:  # no tensor cores: they would cut float32 to 10 bits of mantissa
        if wide:
            return Plan(Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 2), Tiles(16, 32, 8, 2))
        return Plan(Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 8, 2))
    if capability[0] in (9, 10):  # wgmma or newer, and 227 KiB of shared memory
        forward, dq, dkv = Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)
        if wide and capability[0] == 9:
            dkv = Tiles(32, 128, 8, 2)  # dk and dv take half of all registers: 64 rows spill
        elif wide:  # sums come out of tensor memory through registers: larger tiles spill
            forward, dkv = Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)
        elif capability[0] == 10:
            dkv = Tiles(64, 64, 8, 3)  # 128 keys spill by Triton 3.6
        return Plan(forward, dq, dkv)
    if wide:
        return Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2))
    return Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 2))  # 64 rows spill


# ------------------------------------------------------------------------------------ shared by all


@triton.jit
def load_rows(x, offsets, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Loads rows of E numbers, 0 where there is none."""
    e = tl.arange(0, BLOCK_E)
    at = x + offsets[:, None] + e[None, :]
    if E == BLOCK_E:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=(e < E)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(x, offsets, rows, inside, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Stores rows of E numbers, rounded to the tensor's dtype."""
    e = tl.arange(0, BLOCK_E)
    mask = inside[:, None] & (e < E)[None, :]
    tl.store(x + offsets[:, None] + e[None, :], narrow(rows, x.dtype.element_ty), mask=mask)


@triton.jit
def tile_product(a, b, total):
    """Returns total + a b, in float32 without TF32."""
    # The interpreter's dot takes bfloat16 for the integers it is stored as. Products are exact.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def sees(gap, window, WINDOW: tl.constexpr):
    """Whether a query so many positions after a key sees it."""
    seen = gap >= 0
    if WINDOW:
        seen = seen & (gap < window)
    return seen


@triton.jit
def _query_rows(tile, G: tl.constexpr, ROWS: tl.constexpr):
    """A tile's rows: tokens, heads within the group, positions, which are there.

    The last result (first position, last, prefix tokens, where prefix and segment begin) is what
    `_key_offsets` and `_key_ranges` want.
    """
    row = tl.load(tile)
    begin = tl.load(tile + 1)
    length = tl.load(tile + 2)
    prefix_begin = tl.load(tile + 3)
    prefix = tl.load(tile + 4)
    rows = row + tl.arange(0, ROWS)
    inside = rows < length * G
    # Beyond the end the last one again: cheaper than a mask, and never stored.
    rows = tl.minimum(rows, length * G - 1)
    token = rows // G
    first = prefix + row // G
    last = prefix + (tl.minimum(row + ROWS, length * G) - 1) // G
    return (
        (begin + token).to(tl.int64),
        rows % G,
        prefix + token,
        inside,
        (first, last, prefix, prefix_begin, begin),
    )


@triton.jit
def _key_offsets(positions, place, stride):
    """Where the keys at these positions lie.

    Beyond the last that a query of the tile sees, it is that one again.
    """
    _, last, prefix, prefix_begin, begin = place
    positions = tl.minimum(positions, last)
    return (positions + tl.where(positions < prefix, prefix_begin, begin - prefix)).to(
        tl.int64
    ) * stride


@triton.jit
def _key_ranges(place, window, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """Positions (start, a, b, end): start to end is what any query of the tile sees.

    Of it a to b all queries see: no mask there. start to a and a to b are whole tiles of keys.
    """
    first, last, _, _, _ = place
    start = first * 0
    a = start
    if WINDOW:
        start = tl.maximum(first - window + 1, 0)
        a = start + tl.cdiv(tl.maximum(last - window + 1, 0) - start, KEYS) * KEYS
    return start, a, a + tl.maximum(first + 1 - a, 0) // KEYS * KEYS, last + 1


@triton.jit
def _loop(ranges, MASKED: tl.constexpr):
    """Returns (first, end, hole, skipped): a loop over its range, `skipped` added from `hole` on.

    It goes through a to b, or if MASKED through what lies on both sides of it. One loop for both:
    with one for each a windowed kernel has half as much code again, and spills registers.
    """
    start, a, b, end = ranges
    if MASKED:
        return start, end - (b - a), a, b - a
    return a, b, b, a * 0


# ------------------------------------------------------------------------------------------ forward


@triton.jit
def _attend(
    state,
    q,
    position,
    k,
    v,
    ranges,
    place,
    stride,
    scale,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds keys to each row's state, (sum of p v, largest score, sum of p).

    MASKED: those that some rows of the tile do not see, else those that all see.
    """
    total, m, norm = state
    first, end, hole, skipped = _loop(ranges, MASKED)
    for at in range(first, end, KEYS):
        if MASKED:
            at += tl.where(at < hole, 0, skipped)
        keys = at + tl.arange(0, KEYS)
        offsets = _key_offsets(keys, place, stride)
        s = tl.full((q.shape[0], KEYS), 0.0, tl.float32)
        s = tile_product(q, tl.trans(load_rows(k, offsets, E, BLOCK_E)), s)
        if MASKED:
            s = tl.where(sees(position[:, None] - keys[None, :], window, WINDOW), s, float("-inf"))
        # tl.max passes over NaN, but the sum does not: one NaN score makes the row NaN.
        m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new * scale
        if MASKED and WINDOW:  # a row may have seen no key yet
            base = tl.where(m_new == float("-inf"), 0.0, base)
        p = tl.exp2(s * scale - base[:, None])
        shrink = tl.exp2(m * scale - base)
        norm = norm * shrink + tl.sum(p, 1)
        total = tile_product(
            narrow(p, v.dtype.element_ty),
            load_rows(v, offsets, E, BLOCK_E),
            total * shrink[:, None],
        )
        m = m_new
    return total, m, norm


# A window is not specialised on: its value must not mean a compilation.
@triton.jit(do_not_specialize=["window"])
def _attention_kernel(
    qkv,
    out,
    lse,
    tiles,
    stride,
    head_stride,
    scale,
    window,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(0) % K
    token, member, position, inside, place = _query_rows(tiles + tl.program_id(0) // K * 5, G, ROWS)
    k = qkv + (K * G + head).to(tl.int64) * head_stride
    v = k + K * head_stride
    q = load_rows(qkv, token * stride + (head * G + member) * head_stride, E, BLOCK_E)
    ranges = _key_ranges(place, window, WINDOW, KEYS)
    state = (
        tl.full((ROWS, BLOCK_E), 0.0, tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.full((ROWS,), 0.0, tl.float32),
    )
    state = _attend(
        state,
        q,
        position,
        k,
        v,
        ranges,
        place,
        stride,
        scale,
        window,
        False,
        WINDOW,
        E,
        BLOCK_E,
        KEYS,
    )
    state = _attend(
        state,
        q,
        position,
        k,
        v,
        ranges,
        place,
        stride,
        scale,
        window,
        True,
        WINDOW,
        E,
        BLOCK_E,
        KEYS,
    )
    total, m, norm = state
    row = token * (K * G) + head * G + member
    store_rows(out, row * E, total / norm[:, None], inside, E, BLOCK_E)
    tl.store(lse + row, (m * scale + tl.log2(norm)) / LOG2_E, mask=inside)


# ----------------------------------------------------------------------------------------- backward


@triton.jit
def _query_gradient(
    dq,
    q,
    g,
    lse,
    delta,
    position,
    k,
    v,
    ranges,
    place,
    stride,
    scale,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds ds k of the keys that all rows see, or if MASKED of the others. lse to base 2."""
    first, end, hole, skipped = _loop(ranges, MASKED)
    for at in range(first, end, KEYS):
        if MASKED:
            at += tl.where(at < hole, 0, skipped)
        keys = at + tl.arange(0, KEYS)
        offsets = _key_offsets(keys, place, stride)
        k_rows = load_rows(k, offsets, E, BLOCK_E)
        zero = tl.full((q.shape[0], KEYS), 0.0, tl.float32)
        p = tl.exp2(tile_product(q, tl.trans(k_rows), zero) * scale - lse[:, None])
        if MASKED:
            p = tl.where(sees(position[:, None] - keys[None, :], window, WINDOW), p, 0.0)
        dp = tile_product(g, tl.trans(load_rows(v, offsets, E, BLOCK_E)), zero)
        dq = tile_product(narrow(p * (dp - delta[:, None]), k.dtype.element_ty), k_rows, dq)
    return dq


@triton.jit(do_not_specialize=["window"])
def _attention_dq_kernel(
    grad,
    qkv,
    out,
    lse,
    delta,
    dqkv,
    tiles,
    stride,
    head_stride,
    grad_stride,
    grad_head_stride,
    scale,
    window,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq, and delta for the other kernel."""
    head = tl.program_id(0) % K
    token, member, position, inside, place = _query_rows(tiles + tl.program_id(0) // K * 5, G, ROWS)
    k = qkv + (K * G + head).to(tl.int64) * head_stride
    v = k + K * head_stride
    query_head = head * G + member
    row = token * (K * G) + query_head
    g = load_rows(grad, token * grad_stride + query_head * grad_head_stride, E, BLOCK_E)
    o = load_rows(out, row * E, E, BLOCK_E)
    row_delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=inside)
    row_lse = tl.load(lse + row) * LOG2_E
    q = load_rows(qkv, token * stride + query_head * head_stride, E, BLOCK_E)
    ranges = _key_ranges(place, window, WINDOW, KEYS)
    dq = tl.full((ROWS, BLOCK_E), 0.0, tl.float32)
    dq = _query_gradient(
        dq,
        q,
        g,
        row_lse,
        row_delta,
        position,
        k,
        v,
        ranges,
        place,
        stride,
        scale,
        window,
        False,
        WINDOW,
        E,
        BLOCK_E,
        KEYS,
    )
    dq = _query_gradient(
        dq,
        q,
        g,
        row_lse,
        row_delta,
        position,
        k,
        v,
        ranges,
        place,
        stride,
        scale,
        window,
        True,
        WINDOW,
        E,
        BLOCK_E,
        KEYS,
    )
    store_rows(
        dqkv, (token * (K * G + 2 * K) + query_head) * E, dq * (scale / LOG2_E), inside, E, BLOCK_E
    )


@triton.jit
def _key_gradients(
    dk,
    dv,
    k_rows,
    v_rows,
    keys,
    queries,
    pointers,
    strides,
    ranges,
    scale,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds ds q and p g of a reader's rows that see all keys, or if MASKED of the others.

    s, p, dp and ds are transposed, (keys, rows).
    """
    first, count, shift = queries
    q, grad, lse, delta = pointers
    stride, head_stride, grad_stride, grad_head_stride = strides
    begin, end, hole, skipped = _loop(ranges, MASKED)
    for at in range(begin, end, ROWS):
        if MASKED:
            at += tl.where(at < hole, 0, skipped)
        rows = at + tl.arange(0, ROWS)
        inside = rows < count
        rows = tl.minimum(rows, count - 1)
        token = first + rows // G
        row = token.to(tl.int64)
        q_rows = load_rows(q, row * stride + rows % G * head_stride, E, BLOCK_E)
        g_rows = load_rows(grad, row * grad_stride + rows % G * grad_head_stride, E, BLOCK_E)
        row = row * (K * G) + rows % G
        # For a row that is not there, p is 0.
        row_lse = tl.load(lse + row, mask=inside, other=float("inf")) * LOG2_E
        zero = tl.full((k_rows.shape[0], ROWS), 0.0, tl.float32)
        p = tl.exp2(tile_product(k_rows, tl.trans(q_rows), zero) * scale - row_lse[None, :])
        if MASKED:
            p = tl.where(sees(token[None, :] - keys[:, None] + shift, window, WINDOW), p, 0.0)
        dv = tile_product(narrow(p, q.dtype.element_ty), g_rows, dv)
        dp = tile_product(v_rows, tl.trans(g_rows), zero)
        ds = p * (dp - tl.load(delta + row)[None, :])
        dk = tile_product(narrow(ds, q.dtype.element_ty), q_rows, dk)
    return dk, dv


@triton.jit(do_not_specialize=["window"])
def _attention_dkv_kernel(
    grad,
    qkv,
    lse,
    delta,
    dqkv,
    tiles,
    readers,
    stride,
    head_stride,
    grad_stride,
    grad_head_stride,
    scale,
    window,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = (tl.program_id(0) % K).to(tl.int64)
    tile = tiles + tl.program_id(0) // K * 4
    first_key = tl.load(tile)
    last_key = tl.load(tile + 1) - 1
    keys = first_key + tl.arange(0, KEYS)
    token = tl.minimum(keys, last_key).to(tl.int64)
    k_rows = load_rows(qkv, token * stride + (K * G + head) * head_stride, E, BLOCK_E)
    v_rows = load_rows(qkv, token * stride + (K * G + K + head) * head_stride, E, BLOCK_E)
    dk = tl.full((KEYS, BLOCK_E), 0.0, tl.float32)
    dv = tl.full((KEYS, BLOCK_E), 0.0, tl.float32)
    q = qkv + head * G * head_stride
    g = grad + head * G * grad_head_stride
    pointers = (q, g, lse + head * G, delta + head * G)
    strides = (stride, head_stride, grad_stride, grad_head_stride)
    for reader in range(tl.load(tile + 2), tl.load(tile + 3)):
        first = tl.load(readers + reader * 3)
        count = (tl.load(readers + reader * 3 + 1) - first) * G
        shift = tl.load(readers + reader * 3 + 2)
        queries = (first, count, shift)
        # Rows a to b, whole tiles, see all keys: no mask there.
        a = tl.minimum(tl.cdiv(tl.maximum(last_key - shift - first, 0) * G, ROWS) * ROWS, count)
        b = count
        if WINDOW:
            seeing_all = (window + first_key - shift - first) * G
            b = tl.where(
                seeing_all >= count, count, a + tl.maximum(seeing_all - a, 0) // ROWS * ROWS
            )
        ranges = (a * 0, a, b, count)
        dk, dv = _key_gradients(
            dk,
            dv,
            k_rows,
            v_rows,
            keys,
            queries,
            pointers,
            strides,
            ranges,
            scale,
            window,
            True,
            WINDOW,
            K,
            G,
            E,
            BLOCK_E,
            ROWS,
        )
        dk, dv = _key_gradients(
            dk,
            dv,
            k_rows,
            v_rows,
            keys,
            queries,
            pointers,
            strides,
            ranges,
            scale,
            window,
            False,
            WINDOW,
            K,
            G,
            E,
            BLOCK_E,
            ROWS,
        )
    offsets = (token * (K * G + 2 * K) + K * G + head) * E
    inside = keys <= last_key
    store_rows(dqkv, offsets, dk * (scale / LOG2_E), inside, E, BLOCK_E)
    store_rows(dqkv, offsets + K * E, dv, inside, E, BLOCK_E)


# ------------------------------------------------------------------------------------ the functions


def pair_attention(
    qkv: Tensor, heads: int, segments: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns out (N, H, E) and lse (N, H) float32.

    qkv (N, H + 2K, E), H = heads; segments (S, 4) int64 on the CPU.
    """
    qkv = unit_stride(qkv)
    N, _, E = qkv.shape
    out = torch.empty((N, heads, E), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((N, heads), dtype=torch.float32, device=qkv.device)
    t = plan(qkv.dtype, E, capability(qkv.device)).forward
    sizes = _sizes(qkv, heads, window)
    tiles = _query_tiles(segments, sizes["G"], t, window, qkv.device)
    launch(
        _attention_kernel,
        (len(tiles) * sizes["K"],),
        qkv,
        qkv,
        out,
        lse,
        tiles,
        qkv.stride(0),
        qkv.stride(1),
        softmax_scale(E),
        window or 0,
        **sizes,
        ROWS=t.rows,
        KEYS=t.keys,
        num_warps=t.warps,
        num_stages=t.stages,
    )
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
    """Returns the gradient of sum(grad * out), (N, H + 2K, E) contiguous."""
    grad, qkv, out, lse = unit_stride(grad), unit_stride(qkv), out.contiguous(), lse.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    t = plan(qkv.dtype, qkv.shape[2], capability(qkv.device))
    sizes = _sizes(qkv, heads, window)
    numbers = (*qkv.stride()[:2], *grad.stride()[:2], softmax_scale(qkv.shape[2]), window or 0)
    tiles = _query_tiles(segments, sizes["G"], t.dq, window, qkv.device)
    launch(
        _attention_dq_kernel,
        (len(tiles) * sizes["K"],),
        qkv,
        grad,
        qkv,
        out,
        lse,
        delta,
        dqkv,
        tiles,
        *numbers,
        **sizes,
        ROWS=t.dq.rows,
        KEYS=t.dq.keys,
        num_warps=t.dq.warps,
        num_stages=t.dq.stages,
    )
    tiles, readers = _key_tiles(segments, t.dkv, window, qkv.device)
    launch(
        _attention_dkv_kernel,
        (len(tiles) * sizes["K"],),
        qkv,
        grad,
        qkv,
        lse,
        delta,
        dqkv,
        tiles,
        readers,
        *numbers,
        **sizes,
        ROWS=t.dkv.rows,
        KEYS=t.dkv.keys,
        num_warps=t.dkv.warps,
        num_stages=t.dkv.stages,
    )
    return dqkv


def softmax_scale(E: int) -> float:
    """Returns 1 / sqrt(E) in powers of two: scores times this are logarithms to base 2."""
    return math.log2(math.e) / math.sqrt(E)


def _sizes(qkv: Tensor, heads: int, window: int | None) -> dict[str, int]:
    K = (qkv.shape[1] - heads) // 2
    E = qkv.shape[2]
    return {
        "WINDOW": window is not None,
        "K": K,
        "G": heads // K,
        "E": E,
        "BLOCK_E": max(16, triton.next_power_of_2(E)),
    }


def _query_tiles(
    segments: Tensor, group: int, t: Tiles, window: int | None, device: torch.device
) -> Tensor:
    return work.derived(
        segments,
        ("query tiles", group, t.rows, window, device),
        lambda rows: work.on_device(device, work.query_tiles(rows, group, t.rows, window))[0],
    )


def _key_tiles(
    segments: Tensor, t: Tiles, window: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    def make(rows: list[work.Segment]) -> tuple[Tensor, Tensor]:
        tiles, readers = work.on_device(device, *work.key_tiles(rows, t.keys, window))
        return tiles, readers

    return work.derived(segments, ("key tiles", t.keys, window, device), make)
