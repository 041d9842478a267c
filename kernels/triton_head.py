# mypy: disable-error-code="no-untyped-def"
"""Triton: the head. Log-probs without logits in memory, losses with their gradients in one pass.

    z = h W^T,  lse = log sum_v exp z[v],
    logp = z[target] - lse,  d logp / d z[v] = [v = target] - exp(z[v] - lse).

hidden (N, D) and weight (V, D) in one of float32, bfloat16, float16; target (N,) int64; sums
and log-probs float32.

Forward alone (`linear_logprob`): one kernel multiplies a tile of rows by one slab of the vocabulary
and keeps of it the largest logit, the sum of exponentials and the target's logit; a second merges
the slabs in order. Logits exist only in registers. Slabs have a fixed size, so they fill a GPU when
rows are few, and a row's value does not depend on the rows beside it.

With gradients (`pair_loss`, `sft_loss`, `linear_logprob_backward`): rows go in pieces of at most
WORKSPACE_BYTES of logits. The three products, Z = H W^T, dH = dZ W and dW = dZ^T H, are the vendor
library's; between them two passes over Z in memory take its row statistics and turn it, in place,
into c (onehot - softmax). c is one number a row: the upstream gradient, or for pairs -+ scale beta
w sigmoid(-beta Delta) (or what the loss's options make of it), known once both responses of a pair
are summed. So a piece holds whole pairs; a pair longer than the workspace is visited twice. Nothing
is read back to the host.

A target outside [0, V) that is not ignored gives NaN, and no gradient: to look on the host would
mean to wait for the GPU. Repeatable bit for bit: no atomics, and every sum has one order. Oracle:
`ldalign.kernels.reference`.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.kernels.pieces import row_pieces, whole_pairs
from ldalign.kernels.triton_common import INTERPRETED, capability, launch, narrow, unit_stride
from ldalign.kernels.triton_elementwise import pull

WORKSPACE_BYTES = 512 * 2**20  # logits of one piece of rows
SLAB_BYTES = 16 * 2**20  # of dW in float32 on its way to the sum over pieces
SLAB_TILES = 4  # tiles of the vocabulary one program of the forward goes through
# Row tiles whose programs run side by side, and share W in the second-level cache.
GROUP = 8
ROW_BLOCK = 8192  # logits of a row whose statistics are taken at a time
GRADIENT_BLOCK = 4096
SUM_BLOCK = 1024  # log-probs of a response added at a time
ADD_BLOCK = 1024  # values of dW added at a time


class Tiles(NamedTuple):
    """The forward's product tiles: rows, vocabulary entries, widths, and how a program runs."""

    rows: int
    vocabulary: int
    width: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, capability: tuple[int, int] | None) -> Tiles:
    """Returns the tiles for this dtype and GPU."""
    if capability is None:  # the interpreter: small, so that small shapes have several
        return Tiles(16, 128, 32, 1, 1)
    if dtype == torch.float32:  # no tensor cores: they would cut float32 to 10 bits of mantissa
        return Tiles(64, 64, 32, 4, 3)
    if capability < (9, 0):
        return Tiles(128, 128, 64, 8, 3)
    return Tiles(128, 256, 64, 8, 4)  # two warp groups, a 64 x 256 accumulator each


# ------------------------------------------------------------------------------- forward: log-probs


# Not specialised on numbers that only count rows: a new batch size must not mean a compilation.
@triton.jit(do_not_specialize=["N", "row_tiles", "slabs"])
def _logprob_slab_kernel(
    hidden,
    weight,
    target,
    largest,
    total,
    picked,
    N,
    V,
    D,
    hidden_stride,
    weight_stride,
    row_tiles,
    slabs,
    EVEN: tl.constexpr,
    SLAB: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // (GROUP * slabs)
    members = tl.minimum(GROUP, row_tiles - group * GROUP)
    tile = group * GROUP + program % (GROUP * slabs) % members
    slab = program % (GROUP * slabs) // members

    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_D)
    # Rows and columns beyond the end read the last one again: cheaper than a mask, and never used.
    h_rows = hidden + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * hidden_stride + k[None, :]
    goal = tl.load(target + rows, mask=rows < N, other=-1)
    goal = tl.where((goal >= 0) & (goal < V), goal, -1).to(tl.int32)

    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s = tl.full((BLOCK_N,), 0.0, tl.float32)
    z_goal = tl.full((BLOCK_N,), 0.0, tl.float32)
    for start in range(slab * SLAB, tl.minimum(slab * SLAB + SLAB, V), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        w_rows = weight + tl.minimum(cols, V - 1).to(tl.int64)[:, None] * weight_stride + k[None, :]
        z = tl.full((BLOCK_N, BLOCK_V), 0.0, tl.float32)
        for at in range(0, D, BLOCK_D):
            if EVEN:
                h = tl.load(h_rows + at)
                w = tl.load(w_rows + at)
            else:
                h = tl.load(h_rows + at, mask=(k < D - at)[None, :], other=0.0)
                w = tl.load(w_rows + at, mask=(k < D - at)[None, :], other=0.0)
            # The interpreter's dot takes bfloat16 for the integers it is stored as; the products
            # are exact either way.
            if INTERPRETED:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
        z = tl.where((cols < V)[None, :], z, float("-inf"))
        z_goal += tl.sum(tl.where(cols[None, :] == goal[:, None], z, 0.0), 1)
        # tl.max passes over NaN, but the sum of exponentials does not: a NaN logit makes a NaN row.
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m = m_new
    out = slab.to(tl.int64) * N + rows
    tl.store(largest + out, m, mask=rows < N)
    tl.store(total + out, s, mask=rows < N)
    tl.store(
        picked + rows, z_goal, mask=(rows < N) & (goal >= slab * SLAB) & (goal < slab * SLAB + SLAB)
    )


@triton.jit(do_not_specialize=["N", "slabs", "ignore_index"])
def _merge_slabs_kernel(
    largest, total, picked, target, logp, lse, N, V, slabs, ignore_index, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    s = tl.full((BLOCK,), 0.0, tl.float32)
    for _ in range(slabs):
        m_slab = tl.load(largest + rows, mask=mask, other=0.0)
        m_new = tl.maximum(m, m_slab)
        s = s * tl.exp(m - m_new) + tl.load(total + rows, mask=mask, other=1.0) * tl.exp(
            m_slab - m_new
        )
        m = m_new
        largest += N
        total += N
    goal = tl.load(target + rows, mask=mask, other=0)
    z_goal = tl.load(picked + rows, mask=mask & (goal >= 0) & (goal < V), other=float("nan"))
    value = m + tl.log(s)
    tl.store(lse + rows, value, mask=mask)
    tl.store(logp + rows, tl.where(goal == ignore_index, 0.0, z_goal - value), mask=mask)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Returns logp (N,) and lse (N,) float32; logp is 0 where the target is ignored."""
    hidden, weight, target = unit_stride(hidden), unit_stride(weight), target.contiguous()
    (N, D), V = hidden.shape, len(weight)
    t = tiles(hidden.dtype, capability(hidden.device))
    row_tiles, slabs = triton.cdiv(N, t.rows), triton.cdiv(V, SLAB_TILES * t.vocabulary)
    largest, total = torch.empty((2, slabs, N), dtype=torch.float32, device=hidden.device)
    picked, logp, lse = torch.empty((3, N), dtype=torch.float32, device=hidden.device)
    launch(
        _logprob_slab_kernel,
        (row_tiles * slabs,),
        hidden,
        hidden,
        weight,
        target,
        largest,
        total,
        picked,
        N,
        V,
        D,
        hidden.stride(0),
        weight.stride(0),
        row_tiles,
        slabs,
        EVEN=D % t.width == 0,
        SLAB=SLAB_TILES * t.vocabulary,
        GROUP=GROUP,
        BLOCK_N=t.rows,
        BLOCK_V=t.vocabulary,
        BLOCK_D=t.width,
        num_warps=t.warps,
        num_stages=t.stages,
    )
    launch(
        _merge_slabs_kernel,
        (triton.cdiv(N, 128),),
        hidden,
        largest,
        total,
        picked,
        target,
        logp,
        lse,
        N,
        V,
        slabs,
        ignore_index,
        BLOCK=128,
        num_warps=4,
    )
    return logp, lse


# ------------------------------------------------------ losses: logits in memory, a piece at a time


@triton.jit(do_not_specialize_on_alignment=["target", "lse", "logp"])
def _row_statistics_kernel(logits, target, lse, logp, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full((1,), float("-inf"), tl.float32)
    s = tl.full((1,), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # Up to stride, a multiple of 16, the loads stay whole vectors; beyond V lie no logits.
        z = tl.load(logits + row * stride + cols, mask=cols < stride, other=0.0).to(tl.float32)
        z = tl.where(cols < V, z, float("-inf"))[None, :]
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m = m_new
    goal = tl.load(target + row)
    z_goal = tl.load(
        logits + row * stride + goal, mask=(goal >= 0) & (goal < V), other=float("nan")
    ).to(tl.float32)
    value = m + tl.log(s)
    one = tl.arange(0, 1)
    tl.store(lse + row + one, value)
    tl.store(logp + row + one, z_goal - value)


@triton.jit(do_not_specialize_on_alignment=["target", "lse", "coefficient"])
def _logit_gradient_kernel(logits, target, lse, coefficient, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    goal = tl.load(target + row)
    c = tl.load(coefficient + row)
    at = logits + row * stride + cols
    z = tl.load(at, mask=cols < stride, other=0.0).to(tl.float32)
    gradient = c * (tl.where(cols == goal, 1.0, 0.0) - tl.exp(z - tl.load(lse + row)))
    gradient = tl.where((cols < V) & (goal >= 0) & (goal < V), gradient, 0.0)
    tl.store(at, narrow(gradient, logits.dtype.element_ty), mask=cols < stride)


@triton.jit
def _run_sum(values, first, last, BLOCK: tl.constexpr):
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _fill_run(out, value, first, last, BLOCK: tl.constexpr):
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, tl.full((BLOCK,), 0.0, tl.float32) + value, mask=at < last)


@triton.jit(do_not_specialize=["first_pair"])
def _pair_coefficient_kernel(
    logp,
    starts,
    reference,
    weight,
    sums,
    coefficient,
    first_pair,
    beta,
    scale,
    nll,
    smoothing,
    IPO: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums a pair's two runs of log-probs, and writes d loss / d logp for each of its rows."""
    pair = first_pair + tl.program_id(0)
    start = tl.load(starts + 2 * pair)
    middle = tl.load(starts + 2 * pair + 1)
    end = tl.load(starts + 2 * pair + 2)
    real = _run_sum(logp, start, middle, BLOCK)
    generated = _run_sum(logp, middle, end, BLOCK)
    tl.store(sums + 2 * pair, real)
    tl.store(sums + 2 * pair + 1, generated)
    chosen = beta * (real - tl.load(reference + 2 * pair))
    rejected = beta * (generated - tl.load(reference + 2 * pair + 1))
    real_tokens = tl.maximum(middle - start, 1).to(tl.float32)
    generated_tokens = tl.maximum(end - middle, 1).to(tl.float32)
    if LENGTH_NORMALISED:
        chosen /= real_tokens
        rejected /= generated_tokens
    of_generated = (
        scale * beta * tl.load(weight + pair) * pull(chosen - rejected, beta, smoothing, IPO)
    )
    of_real = -of_generated
    if LENGTH_NORMALISED:
        of_real /= real_tokens
        of_generated /= generated_tokens
    _fill_run(coefficient, of_real - scale * nll / real_tokens, start, middle, BLOCK)
    _fill_run(coefficient, of_generated, middle, end, BLOCK)


@triton.jit
def _accumulate_kernel(
    product, high, low, out, size, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds a product to a sum kept as the upper 24 bits of a float32.

    16 of them are in `high`, 8 in `low`. The last one rounds.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    value = tl.load(product + at, mask=mask)
    if not FIRST:
        bits = (tl.load(high + at, mask=mask).to(tl.int32) << 16) | (
            tl.load(low + at, mask=mask).to(tl.int32) << 8
        )
        value += bits.to(tl.float32, bitcast=True)
    if LAST:
        # `out` is the memory of `high`.
        tl.store(out + at, narrow(value, out.dtype.element_ty), mask=mask)
    else:
        bits = value.to(tl.int32, bitcast=True)
        # Rounded to nearest; a NaN must not carry into its sign.
        bits = tl.where(value == value, bits + 0x80, bits)
        tl.store(high + at, (bits >> 16).to(tl.int16), mask=mask)
        tl.store(low + at, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Returns dh and dw under grad (N,).

    A target outside [0, V), such as an ignored one, adds nothing. lse is not read: the logits made
    again here are rounded to the model's dtype, those of the forward were not, and only with a
    log-sum-exp of the very same logits do the probabilities add up to one.
    """
    head = _Head(hidden, weight, target, need_hidden, need_weight)
    grad = grad.float().contiguous()
    head.run(([rows] for rows in row_pieces(len(target), head.most)), lambda i: grad)
    return head.dh, head.dw


def sft_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns logp (N,) float32, dh and dw, the gradients of scale * sum_i -logp_i."""
    head = _Head(hidden, weight, target, need_hidden, need_weight)
    coefficient = torch.full_like(head.logp, -scale)
    head.run(([rows] for rows in row_pieces(len(target), head.most)), lambda i: coefficient)
    return head.logp, head.dh, head.dw


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lengths: Sequence[int],
    reference: Tensor,
    pair_weight: Tensor,
    beta: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    options: LossOptions = DPO,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns sums (S,) float32, dh and dw, the gradients of the loss.

    The loss is scale * `reference.pair_loss`.
    """
    head = _Head(hidden, weight, target, need_hidden, need_weight)
    sums = torch.zeros(len(lengths), dtype=torch.float32, device=hidden.device)
    coefficient = torch.empty_like(head.logp)
    starts = _offsets(lengths, hidden.device)
    reference, pair_weight = reference.float().contiguous(), pair_weight.float().contiguous()
    pieces = list(whole_pairs(lengths, head.most))

    def coefficients(i: int) -> Tensor:
        pairs = pieces[i].pairs
        launch(
            _pair_coefficient_kernel,
            (pairs.stop - pairs.start,),
            hidden,
            head.logp,
            starts,
            reference,
            pair_weight,
            sums,
            coefficient,
            pairs.start,
            beta,
            scale,
            options.nll,
            options.label_smoothing,
            IPO=options.kind == "ipo",
            LENGTH_NORMALISED=options.length_normalised,
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
        return coefficient

    head.run((list(piece.rows(head.most)) for piece in pieces), coefficients)
    return sums, head.dh, head.dw


class _Head:
    """Hidden states through the head and back, a group of rows at a time.

    All groups use one workspace for their logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, target: Tensor, need_hidden: bool, need_weight: bool
    ) -> None:
        self.hidden, self.weight, self.target = (
            hidden.contiguous(),
            weight.contiguous(),
            target.contiguous(),
        )
        self.logp, self.lse = torch.empty(
            (2, len(target)), dtype=torch.float32, device=hidden.device
        )
        self.dh = torch.empty_like(self.hidden) if need_hidden else None
        self.dw = torch.empty_like(self.weight) if need_weight else None
        # A row starts at a multiple of 128 bytes or more, whatever V: so loads are whole vectors,
        # and products run at full speed.
        self.stride = triton.cdiv(len(weight), 64) * 64
        most = max(1, WORKSPACE_BYTES // (self.stride * hidden.element_size()))
        self.most = most // 128 * 128 or most  # rows of a piece: whole tiles of a product

    def run(self, groups: Iterable[list[slice]], coefficients: Callable[[int], Tensor]) -> None:
        """Visits each group's pieces for log-probs and again for gradients.

        coefficients(i), called between the two, gives d loss / d logp (N,), valid for group i. A
        group of one piece keeps its logits and is visited once.
        """
        groups = list(groups)
        pieces = [piece for group in groups for piece in group]
        longest = max((piece.stop - piece.start for piece in pieces), default=0)
        workspace = self.hidden.new_empty((longest, self.stride))
        weight_gradient = None if self.dw is None else _WeightGradient(self.dw, len(pieces))
        for i, group in enumerate(groups):
            for rows in group:
                logits = self.statistics(rows, workspace)
            c = coefficients(i)
            if self.dh is None and weight_gradient is None:
                continue
            for rows in group:
                if len(group) > 1:
                    logits = self.product(rows, workspace)
                self.turn_into_gradient(rows, workspace, c)
                if self.dh is not None:
                    torch.mm(logits, self.weight, out=self.dh[rows])
                if weight_gradient is not None:
                    weight_gradient.add(logits, self.hidden[rows])

    def product(self, rows: slice, workspace: Tensor) -> Tensor:
        """The logits of these rows, in the workspace."""
        logits = workspace[: rows.stop - rows.start, : len(self.weight)]
        return torch.mm(self.hidden[rows], self.weight.T, out=logits)

    def statistics(self, rows: slice, workspace: Tensor) -> Tensor:
        logits = self.product(rows, workspace)
        V = len(self.weight)
        launch(
            _row_statistics_kernel,
            (len(logits),),
            logits,
            logits,
            self.target[rows],
            self.lse[rows],
            self.logp[rows],
            V,
            self.stride,
            BLOCK=_block(self.stride, ROW_BLOCK),
            num_warps=8,
        )
        return logits

    def turn_into_gradient(self, rows: slice, workspace: Tensor, coefficient: Tensor) -> None:
        block = _block(self.stride, GRADIENT_BLOCK)
        launch(
            _logit_gradient_kernel,
            (rows.stop - rows.start, triton.cdiv(self.stride, block)),
            workspace,
            workspace,
            self.target[rows],
            self.lse[rows],
            coefficient[rows],
            len(self.weight),
            self.stride,
            BLOCK=block,
            num_warps=8,
        )


class _WeightGradient:
    """dW = sum over pieces of dZ^T H, written into `out`, rounded once.

    A sum kept in bfloat16 would be rounded at every piece, one in float32 takes 2 GiB at V =
    128,256 and D = 4,096. So between pieces it is the upper 24 bits of a float32: 16 of them in
    out's own memory, 8 beside it. Each addition then costs 2^-17, against 2^-9 of the last rounding
    (2^-12 in float16). A product of one piece arrives in float32 a slab of the vocabulary at a
    time, small enough to be added from the second-level cache. Beside the workspace this takes V D
    bytes and SLAB_BYTES: at that shape, in all, 501 + 501 + 16 MiB.
    """

    def __init__(self, out: Tensor, pieces: int) -> None:
        self.out, self.left, self.first = out, pieces, True
        if pieces == 0:
            out.zero_()
        V, D = out.shape
        self.slab = 0  # rows of a slab; 0: the library's product can add to `out` by itself
        if pieces > 1 and out.dtype != torch.float32:
            most = max(1, SLAB_BYTES // (4 * max(1, D)))
            self.slab = min(V, most // 128 * 128 or most)
            self.low = torch.empty((V, D), dtype=torch.uint8, device=out.device)
            self.product = torch.empty((self.slab, D), dtype=torch.float32, device=out.device)

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        self.left -= 1
        if self.slab:
            for rows in row_pieces(len(self.out), self.slab):
                self._add_slab(rows, dz, hidden)
        elif self.first:
            torch.mm(dz.T, hidden, out=self.out)
        else:
            self.out.addmm_(dz.T, hidden)
        self.first = False

    def _add_slab(self, rows: slice, dz: Tensor, hidden: Tensor) -> None:
        product = _wide_product(dz[:, rows].T, hidden, self.product[: rows.stop - rows.start])
        out = self.out[rows]
        launch(
            _accumulate_kernel,
            (triton.cdiv(out.numel(), ADD_BLOCK),),
            out,
            product,
            out.view(torch.int16),
            self.low[rows],
            out,
            out.numel(),
            FIRST=self.first,
            LAST=self.left == 0,
            BLOCK=ADD_BLOCK,
            num_warps=4,
        )


def _wide_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b in float32, of half-precision factors."""
    if a.device.type == "cpu":  # the interpreter's; torch has no such product there
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each run starts, and where the last one ends, (S + 1,) int64 on the device.

    The host does not wait.
    """
    starts = torch.tensor([0, *accumulate(lengths)], pin_memory=device.type == "cuda")
    return starts.to(device, non_blocking=True)


def _block(size: int, most: int) -> int:
    return int(min(most, triton.next_power_of_2(size)))
