# mypy: disable-error-code="no-untyped-def"
"""Triton: generation. Attention over a paged key/value cache, and the choice of the next token.

**paged_attention.** s_ij = q_i . k_j / sqrt(E), o_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij), j
over the positions up to query i's own; with a window, the last `window` of them. q (N, H, E):
the new tokens of R rows, row after row; keys and values (pages, 16, K, E); rows (R, 2) int64, a
row's new tokens and those before them; pages (R, P) int32: position j of a row lies in slot j %
16 of page pages[row, j // 16]. float32, bfloat16 or float16; softmax and sums are float32, the
result is rounded once.

The rows of a query tile are tokens x the H/K heads that share a key head, so that one read of a key
serves them all; in decoding that read is nearly all the work. Positions are looked up in the page
table as they are needed, and no slot is read but those that some query of the tile sees.

One body runs in three ways. Prompts: a program takes one tile of a row's queries through all keys
that it sees. Decoding many rows: the same with a tile of one token. Decoding few rows would leave
most of a GPU idle, so a row's keys are cut into runs of whole tiles, a program each ("flash
decoding"). Run s leaves its sum of p v, its largest score m_s (to base 2) and its sum l_s of p in
float32, and with M = max_s m_s a second kernel makes of them

    o = sum_s 2^(m_s - M) o_s / sum_s 2^(m_s - M) l_s.

No atomics, and every sum has one order: repeatable bit for bit. Grids depend on shapes and on
`most`, not on what is on the device: nothing is read back, and a step of decoding can be
captured in a CUDA graph.

**sample.** p_v = exp((z_v - max z) / temperature), but 0 where that is below min_p. With c_v the
sum of p up to v, the token is the first with c_v > uniform * c_V; its log-prob is log(p_v / c_V).
One program a row reads the logits twice, for the maximum and for the sums of p by blocks, and then
the block again in which c passes. Sums within a block are float32; over blocks, and in the last
step, float64. Rounding at a block's end must not choose what has p = 0: only blocks and tokens
with some probability are candidates, and where c passes at none of them it is the last.
temperature 0 takes the largest logit, the lowest id of equals. The penalty is PyTorch's, before the
kernel, and so is the k-th largest logit, below which top_k has p = 0.

top_p keeps the logits above a bound b, and of those equal to it the first few. Nothing is sorted: b
is the least logit above which there is less than top_p of the mass. float32 numbers are in order as
integers (sign apart), so b is found by cutting an interval of integers into eight at a time; a cut
reads the row once. An interval of float32 numbers takes at most eleven, and begins at
max z - temperature (1 + log(V / (1 - top_p))): what lies below has less than 1 - top_p of the mass.

**rope_to_pages.** Queries and keys of qkv (N, H + 2K, E) are turned as `ops.rope` says; keys and
values go to slot slots[n] of the flattened pages, queries (N, H, E) to the result: one read and one
write of each number.

Oracles: `ldalign.kernels.reference.paged_attention`, `sample` and `rope_to_pages`.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.reference import penalised
from ldalign.kernels.triton_attention import (
    LOG2_E,
    Tiles,
    load_rows,
    sees,
    softmax_scale,
    store_rows,
    tile_product,
)
from ldalign.kernels.triton_common import capability, launch, narrow, unit_stride
from ldalign.kernels.triton_elementwise import HEADS, ROPE_PAIRS

# Tests set it: so many runs of keys, a power of two, whatever `splits` would say.
SPLITS: int | None = None
MOST_SPLITS = 64  # the second kernel holds all of them at once
LEAST_KEYS = 128  # of a run: shorter ones would cost more than they gain
PROGRAMS = 2  # wanted for each multiprocessor
BLOCK = 4096  # logits of a row whose probabilities are summed first
CUT_BLOCK = 1024  # logits that are compared with all cuts at once
CUTS = 8  # into which top_p's interval is cut


def tiles(
    dtype: torch.dtype, E: int, group: int, decoding: bool, capability: tuple[int, int] | None
) -> Tiles:
    """Returns the tiles, chosen so that no register is spilled at E = 64 and 128."""
    if capability is None:  # the interpreter: small, so that small shapes have several
        return Tiles(16, 16, 1, 1)
    if dtype == torch.float32:
        return Tiles(16, 16 if E > 64 else 32, 8, 2) if decoding else Tiles(32, 16, 4, 1)
    wide = E > 64
    if decoding:
        # Products take 16 rows at least.
        return Tiles(max(16, min(64, triton.next_power_of_2(group))), 32 if wide else 64, 4, 3)
    # On 10 sums come out of tensor memory through registers: larger tiles of wide rows spill.
    if wide and capability[0] == 10:
        return Tiles(64, 32, 8, 3)
    return Tiles(64 if wide and capability[0] != 9 else 128, 64, 8, 3)


def splits(programs: int, tokens: int, processors: int) -> int:
    """Returns into how many runs the keys of a row are cut, a power of two.

    A row has at most `tokens` keys; uncut, `programs` programs would run.
    """
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS * processors, programs))
    able = 1 << max(1, tokens // LEAST_KEYS).bit_length() - 1  # rounded down
    return min(wanted, able, MOST_SPLITS)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 132  # an H100 has so many; where there is no GPU to ask


# ---------------------------------------------------------------------------------------- attention


@triton.jit
def _attend(
    state,
    q,
    position,
    keys,
    values,
    table,
    strides,
    start,
    end,
    last,
    scale,
    window,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds the keys at positions start to end to each row's state.

    The state is (sum of p v, largest score, sum of p).
    """
    total, m, norm = state
    page_stride, slot_stride = strides
    # Beyond the last position that a query of the tile sees, that one again.
    held = tl.minimum(start + tl.arange(0, KEYS), last)
    page = tl.load(table + held // PAGE)
    for at in range(start, end, KEYS):
        places = at + tl.arange(0, KEYS)
        offsets = page.to(tl.int64) * page_stride + held % PAGE * slot_stride
        # A tile ahead: keys and values can be fetched early only if their places are known early.
        held = tl.minimum(places + KEYS, last)
        page = tl.load(table + held // PAGE)
        s = tl.full((q.shape[0], KEYS), 0.0, tl.float32)
        s = tile_product(q, tl.trans(load_rows(keys, offsets, E, BLOCK_E)), s)
        if MASKED:
            s = tl.where(
                sees(position[:, None] - places[None, :], window, WINDOW), s, float("-inf")
            )
        # tl.max passes over NaN, but the sum does not: one NaN score makes the row NaN.
        m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new * scale
        if MASKED and WINDOW:  # a row may have seen no key yet
            base = tl.where(m_new == float("-inf"), 0.0, base)
        p = tl.exp2(s * scale - base[:, None])
        shrink = tl.exp2(m * scale - base)
        norm = norm * shrink + tl.sum(p, 1)
        p = narrow(p, values.dtype.element_ty)
        total = tile_product(p, load_rows(values, offsets, E, BLOCK_E), total * shrink[:, None])
        m = m_new
    return total, m, norm


# Numbers that change from step to step are not specialised on: they must not mean a compilation.
@triton.jit(do_not_specialize=["N", "row_tiles", "splits", "table_stride", "window"])
def _paged_attention_kernel(
    q,
    keys,
    values,
    rows,
    starts,
    pages,
    out,
    largest,
    norms,
    N,
    row_tiles,
    splits,
    q_stride,
    q_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    table_stride,
    scale,
    window,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """DECODE: every row has one new token.

    SPLIT: out, largest and norms hold a part for each run of keys.
    """
    program = tl.program_id(0)
    head = (program % K).to(tl.int64)  # neighbours read the other heads of the same tokens
    program = program // K
    split = program % splits
    program = program // splits
    tile_row = program % row_tiles * ROWS
    row = (program // row_tiles).to(tl.int64)
    count = tl.load(rows + row * 2).to(tl.int32) * G
    before = tl.load(rows + row * 2 + 1).to(tl.int32)
    if tile_row >= count:  # the grid has room for `most` tokens of each row
        return

    places = tile_row + tl.arange(0, ROWS)
    inside = places < count
    # Beyond the end the last one again: cheaper than a mask, and never stored.
    places = tl.minimum(places, count - 1)
    position = before + places // G
    query_head = head * G + places % G
    if DECODE:
        token = row + places // G  # of one token's heads: row + 0
    else:
        token = tl.load(starts + row) + places // G
    q_rows = load_rows(q, token * q_stride + query_head * q_head_stride, E, BLOCK_E)

    first = before + tile_row // G
    last = before + (tl.minimum(tile_row + ROWS, count) - 1) // G
    start = first * 0
    if WINDOW:
        start = tl.maximum(first - window + 1, 0)
    end = last + 1
    k = keys + head * head_stride
    v = values + head * head_stride
    table = pages + row * table_stride
    strides = (page_stride, slot_stride)
    state = (
        tl.full((ROWS, BLOCK_E), 0.0, tl.float32),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.full((ROWS,), 0.0, tl.float32),
    )
    # One position, so that start is the window's own: what is left to mask lies beyond the end.
    if DECODE:
        if SPLIT:
            run = tl.cdiv(tl.cdiv(end - start, KEYS), splits) * KEYS
            start += split * run  # may lie beyond the end: a run of no keys
            end = tl.minimum(start + run, end)
        state = _attend(
            state,
            q_rows,
            position,
            k,
            v,
            table,
            strides,
            start,
            end,
            last,
            scale,
            window,
            True,
            False,
            PAGE,
            E,
            BLOCK_E,
            KEYS,
        )
    else:
        # Positions a to b, whole tiles of keys, all queries see: no mask there.
        a = start
        if WINDOW:
            a = start + tl.cdiv(tl.maximum(last - window + 1, 0) - start, KEYS) * KEYS
            state = _attend(
                state,
                q_rows,
                position,
                k,
                v,
                table,
                strides,
                start,
                a,
                last,
                scale,
                window,
                True,
                WINDOW,
                PAGE,
                E,
                BLOCK_E,
                KEYS,
            )
        b = a + tl.maximum(first + 1 - a, 0) // KEYS * KEYS
        state = _attend(
            state,
            q_rows,
            position,
            k,
            v,
            table,
            strides,
            a,
            b,
            last,
            scale,
            window,
            False,
            WINDOW,
            PAGE,
            E,
            BLOCK_E,
            KEYS,
        )
        state = _attend(
            state,
            q_rows,
            position,
            k,
            v,
            table,
            strides,
            b,
            end,
            last,
            scale,
            window,
            True,
            WINDOW,
            PAGE,
            E,
            BLOCK_E,
            KEYS,
        )
    total, m, norm = state
    at = token * (K * G) + query_head
    if SPLIT:
        at += split.to(tl.int64) * N * (K * G)
        # Nobody reads a run of no keys.
        store_rows(out, at * E, total, inside & (norm != 0), E, BLOCK_E)
        tl.store(largest + at, m * scale, mask=inside)
        tl.store(norms + at, norm, mask=inside)
    else:
        store_rows(out, at * E, total / norm[:, None], inside, E, BLOCK_E)


@triton.jit(do_not_specialize=["count"])
def _merge_splits_kernel(
    parts, largest, norms, out, count, SPLITS: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One head of one token, of `count` in all."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SPLITS).to(tl.int64) * count + row
    e = tl.arange(0, BLOCK_E)
    m = tl.load(largest + at)
    norm = tl.load(norms + at)
    share = tl.exp2(m - tl.max(m, 0))
    some = norm != 0  # also where it is NaN
    o = tl.load(
        parts + at[:, None] * E + e[None, :], mask=some[:, None] & (e < E)[None, :], other=0.0
    )
    total = tl.sum(o * share[:, None], 0) / tl.sum(norm * share, 0)
    tl.store(out + row * E + e, narrow(total, out.dtype.element_ty), mask=e < E)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    pages: Tensor,
    most: int,
    window: int | None,
) -> Tensor:
    """Returns (N, H, E), contiguous.

    most: the largest number of new tokens of a row.
    """
    q, rows, pages = unit_stride(q), rows.contiguous(), unit_stride(pages)
    if keys.stride() != values.stride() or unit_stride(keys) is not keys:
        keys, values = keys.contiguous(), values.contiguous()
    N, H, E = q.shape
    R, P = pages.shape
    _, page, K, _ = keys.shape
    G = H // K
    decoding = most == 1 and N == R
    t = tiles(q.dtype, E, G, decoding, capability(q.device))
    row_tiles = triton.cdiv(most * G, t.rows)
    programs = R * K * row_tiles
    parts = 1
    if decoding and programs:
        longest = P * page if window is None else min(P * page, window)
        parts = SPLITS or splits(programs, longest, _processors(q.device))
    out = torch.empty((N, H, E), dtype=q.dtype, device=q.device)
    partial = largest = norms = out  # stand-ins, where nothing is split
    if parts > 1:
        partial = torch.empty((parts, N, H, E), dtype=torch.float32, device=q.device)
        largest, norms = (
            torch.empty((parts, N, H), dtype=torch.float32, device=q.device) for _ in range(2)
        )
    starts = rows if decoding else rows[:, 0].cumsum(0) - rows[:, 0]  # a row's first token
    block = max(16, triton.next_power_of_2(E))
    launch(
        _paged_attention_kernel,
        (programs * parts,),
        q,
        q,
        keys,
        values,
        rows,
        starts,
        pages,
        partial,
        largest,
        norms,
        N,
        row_tiles,
        parts,
        *q.stride()[:2],
        *keys.stride()[:3],
        pages.stride(0),
        softmax_scale(E),
        window or 0,
        DECODE=decoding,
        SPLIT=parts > 1,
        WINDOW=window is not None,
        PAGE=page,
        K=K,
        G=G,
        E=E,
        BLOCK_E=block,
        ROWS=t.rows,
        KEYS=t.keys,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    if parts > 1:
        _merge_splits(partial, largest, norms, out)
    return out


def _merge_splits(partial: Tensor, largest: Tensor, norms: Tensor, out: Tensor) -> None:
    """Makes out (N, H, E) of the sums (S, N, H, E) and (S, N, H) that S runs of keys left."""
    N, H, E = out.shape
    parts = len(partial)
    launch(
        _merge_splits_kernel,
        (N * H,),
        out,
        partial,
        largest,
        norms,
        out,
        N * H,
        SPLITS=parts,
        E=E,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        num_warps=1 if parts <= 8 else 4,
    )


# ------------------------------------------------------------------------------------------ sampler


@triton.jit
def _weights(z_row, at, V, m, scale, min_p, bound, last, CUT: tl.constexpr):
    """Logits and p at these ids; beyond the vocabulary -inf and 0.

    CUT: 0 too below the bound and, of those equal to it, beyond the id `last`.
    """
    z = tl.load(z_row + at, mask=at < V, other=float("-inf"))
    p = tl.exp2((z - m) * scale)
    p = tl.where(p < min_p, 0.0, p)
    if CUT:
        p = tl.where((z > bound) | ((z == bound) & (at <= last)), p, 0.0)
    return z, p


@triton.jit
def _rank(z):
    """An int32 for each float32, in the same order: equal for equals, the two zeros included."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass_above(z_row, V, m, scale, floor, ranks, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of p above each of the ranks (CUTS,), of logits of `floor` and more; float64.

    Every sum has the same order, so that a lower rank has no smaller one.
    """
    sums = tl.full((CUTS, BLOCK), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + at, mask=at < V, other=float("-inf"))
        p = tl.where(z >= floor, tl.exp2((z - m) * scale), 0.0)
        sums += tl.where(_rank(z)[None, :] > ranks[:, None], p[None, :], 0.0)
    return tl.sum(sums.to(tl.float64), 1)


@triton.jit
def _top_p(z_row, V, m, scale, floor, top_p, depth, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """The least logit that top_p keeps, and the last id of those equal to it that it keeps."""
    all_of_them = tl.full((1,), -(2**31), tl.int32)
    wanted = top_p * tl.sum(_mass_above(z_row, V, m, scale, floor, all_of_them, 1, BLOCK), 0)
    # Above rank `low` there is the wanted mass or more, above `high` less: `mass`.
    low = _rank(m - depth).to(tl.int64) - 1
    high = _rank(m).to(tl.int64)
    mass = wanted * 0.0
    while high - low > 1:
        cuts = low + (high - low) * (tl.arange(0, CUTS) + 1).to(tl.int64) // CUTS
        above = _mass_above(z_row, V, m, scale, floor, cuts.to(tl.int32), CUTS, BLOCK)
        enough = above >= wanted
        mass = tl.maximum(mass, tl.max(tl.where(enough, 0.0, above), 0))
        low = tl.maximum(low, tl.max(tl.where(enough, cuts, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, cuts), 0))
    rank = high.to(tl.int32)
    bound = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    # Of n that are equal to the bound the first so many, with p each.
    p = tl.exp2((bound - m) * scale).to(tl.float64)
    kept = tl.minimum(tl.ceil((wanted - mass) / p), V * 1.0).to(tl.int32)
    last = V
    before = 0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + at, mask=at < V, other=float("-inf"))
        equal = (z == bound).to(tl.int32)
        found = (equal > 0) & (before + tl.cumsum(equal, 0) == kept)
        last = tl.minimum(last, tl.min(tl.where(found, at, V), 0))
        before += tl.sum(equal, 0)
    return bound, last


@triton.jit
def _passing(weights, index, wanted):
    """The first index with some weight at which the cumulative sum passes `wanted`.

    If there is none, the last.
    """
    passed = (tl.cumsum(weights, 0) > wanted) & (weights > 0)
    last = tl.max(tl.where(weights > 0, index, 0), 0)
    return tl.minimum(tl.min(tl.where(passed, index, 2**30), 0), last)


@triton.jit
def _sample_kernel(
    logits,
    floors,
    uniform,
    ids,
    logp,
    V,
    stride,
    scale,
    min_p,
    top_p,
    depth,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CUTS: tl.constexpr,
    CUT_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = lane
    for start in range(0, V, BLOCK):
        at = start + lane
        z = tl.load(z_row + at, mask=at < V, other=float("-inf"))
        if GREEDY:
            where = tl.where(z > largest, at, where)  # the first of equals stays
        largest = tl.maximum(largest, z)
    m = tl.max(largest, 0)

    bound = float("-inf")
    last = V
    if TOP_K:
        bound = tl.load(floors + row)
    if TOP_P:
        bound, last = _top_p(z_row, V, m, scale, bound, top_p, depth, CUTS, CUT_BLOCK)
    CUT: tl.constexpr = TOP_K or TOP_P

    block = tl.arange(0, BLOCKS)
    sums = tl.full((BLOCKS,), 0.0, tl.float32)
    for i in range(tl.cdiv(V, BLOCK)):
        _, p = _weights(z_row, i * BLOCK + lane, V, m, scale, min_p, bound, last, CUT)
        sums = tl.where(block == i, tl.sum(p, 0), sums)
    wide = sums.to(tl.float64)
    total = tl.sum(wide, 0)

    if GREEDY:
        # The lowest id of all that have it.
        chosen = tl.min(tl.where(largest == m, where, V - 1), 0)
        score = m
    else:
        wanted = tl.load(uniform + row) * total
        own = _passing(wide, block, wanted)
        wanted -= tl.sum(tl.where(block < own, wide, 0.0), 0)
        z, p = _weights(z_row, own * BLOCK + lane, V, m, scale, min_p, bound, last, CUT)
        place = _passing(p.to(tl.float64), lane, wanted)
        chosen = own * BLOCK + place
        score = tl.sum(tl.where(lane == place, z, 0.0), 0)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(logp + row, ((score - m) * scale - tl.log2(total.to(tl.float32))) / LOG2_E)


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
    """Returns the next tokens (R,) int64 and their log-probs (R,) float32.

    logits (R, V) float32 are left as they are.
    """
    z = penalised(logits, penalty, seen)
    R, V = z.shape
    greedy = temperature == 0
    if greedy:
        temperature, top_k, top_p, min_p = 1.0, 0, 1.0, 0.0
    z = unit_stride(z)
    floors = z  # a stand-in
    if 0 < top_k < V:
        floors = z.topk(top_k, dim=-1, sorted=True).values[:, -1].contiguous()
    depth = temperature * (1 + math.log(V / (1 - top_p))) if top_p < 1 else 0.0
    ids = torch.empty(R, dtype=torch.int64, device=z.device)
    logp = torch.empty(R, dtype=torch.float32, device=z.device)
    launch(
        _sample_kernel,
        (R,),
        z,
        z,
        floors,
        uniform.double().contiguous(),
        ids,
        logp,
        V,
        z.stride(0),
        math.log2(math.e) / temperature,
        min_p,
        top_p,
        depth,
        GREEDY=greedy,
        TOP_K=0 < top_k < V,
        TOP_P=top_p < 1,
        BLOCKS=triton.next_power_of_2(triton.cdiv(V, BLOCK)),
        BLOCK=BLOCK,
        CUTS=CUTS,
        CUT_BLOCK=min(BLOCK, CUT_BLOCK),
        num_warps=16 if top_p < 1 else 8,  # with both cuts 8 would spill
    )
    return ids, logp


# -------------------------------------------------------------------------------- the cache's pages


# N is not specialised on: a new batch size must not mean a new compilation.
@triton.jit(do_not_specialize=["N"])
def _rope_to_pages_kernel(
    qkv,
    cos,
    sin,
    slots,
    q,
    keys,
    values,
    N,
    half,
    token_stride,
    head_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, HALF)[None, :]
    mask = (tokens < N)[:, None] & (e < half)
    angle = tokens[:, None] * half + e
    c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(slots + tokens, mask=tokens < N, other=0)[:, None]
    dtype = q.dtype.element_ty
    for i in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + i
        if head < H + 2 * K:
            source = qkv + tokens[:, None] * token_stride + head * head_stride + e
            a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
            x = narrow(a * c - b * s, dtype)
            y = narrow(b * c + a * s, dtype)
            if head < H:
                goal = q + (tokens[:, None] * H + head) * (2 * half) + e
                tl.store(goal, x, mask=mask)
                tl.store(goal + half, y, mask=mask)
            else:
                if head < H + K:
                    goal = keys + (slot * K + head - H) * (2 * half) + e
                    tl.store(goal, x, mask=mask)
                    tl.store(goal + half, y, mask=mask)
                else:
                    goal = values + (slot * K + head - H - K) * (2 * half) + e
                    tl.store(goal, narrow(a, dtype), mask=mask)
                    tl.store(goal + half, narrow(b, dtype), mask=mask)


def rope_to_pages(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, keys: Tensor, values: Tensor, slots: Tensor
) -> Tensor:
    """Returns the queries (N, H, E), turned; writes turned keys, and values, to their slots."""
    N, all_heads, E = qkv.shape
    K, half = (all_heads - heads) // 2, E // 2
    qkv, cos, sin = unit_stride(qkv), cos.contiguous(), sin.contiguous()
    q = torch.empty((N, heads, E), dtype=qkv.dtype, device=qkv.device)
    width = triton.next_power_of_2(half)
    tokens = max(1, ROPE_PAIRS // width)
    launch(
        _rope_to_pages_kernel,
        (triton.cdiv(N, tokens), triton.cdiv(all_heads, HEADS)),
        q,
        qkv,
        cos,
        sin,
        slots.contiguous(),
        q,
        keys,
        values,
        N,
        half,
        qkv.stride(0),
        qkv.stride(1),
        H=heads,
        K=K,
        HEADS=HEADS,
        TOKENS=tokens,
        HALF=width,
        num_warps=4,
    )
    return q
