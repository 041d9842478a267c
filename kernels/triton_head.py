# mypy: disable-error-code="no-untyped-def"
"""Triton: the head. Log-probs, and losses with their gradients in one pass, from one product.

    z = h W^T,  lse = log sum_v exp z[v],
    logp = z[target] - lse,  d logp / d z[v] = [v = target] - exp(z[v] - lse).

hidden (N, D) and weight (V, D) in one of float32, bfloat16, float16; target (N,) int64; logits,
sums and log-probs float32.

Rows go in pieces of at most `piece_rows`, whose logits lie in one workspace. The three products, Z
= H W^T, dH = dZ W and dW = dZ^T H, are the vendor library's; between them two passes over Z take
its row statistics and turn it, in place, into c (onehot - softmax), rounded to the inputs' dtype. c
is one number a row: the upstream gradient, or for pairs -+ scale beta w sigmoid(-beta Delta) (or
what the loss's options make of it), known once both responses of a pair are summed. So a piece
holds whole pairs; a pair longer than the workspace is visited twice. Nothing is read back to the
host.

`linear_logprob`, `sft_loss` and `pair_loss` share product and statistics: the same rows in the same
piece have the same log-probs to the bit, and a response's sum is `ops.segment_sum`'s.

A target outside [0, V) that is not ignored gives NaN, and no gradient: to look on the host would
mean to wait for the GPU. Repeatable bit for bit: no atomics, and every sum has one order. Oracle:
`ldalign.kernels.reference`.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.kernels.pieces import piece_rows, row_pieces, whole_pairs
from ldalign.kernels.triton_common import launch, narrow
from ldalign.kernels.triton_elementwise import pull
from ldalign.system.memory import available_bytes
from ldalign.system.transfer import to_device

PLAIN_PIECES = 8  # of so many dW is added up as it is, of more in 24 bits
SLAB_BYTES = 16 * 2**20  # of dW in float32 on its way to the sum over more pieces
ROW_BLOCK = 8192  # logits of a row whose statistics are taken at a time
GRADIENT_BLOCK = 4096
SUM_BLOCK = 1024  # log-probs of a response added at a time
ADD_BLOCK = 1024  # values of dW added at a time


@triton.jit(do_not_specialize_on_alignment=["target", "lse", "logp"])
def _row_statistics_kernel(logits, target, lse, logp, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full((1,), float("-inf"), tl.float32)
    s = tl.full((1,), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        # Up to stride, a multiple of 16, the loads stay whole vectors; beyond V lie no logits.
        z = tl.load(logits + row * stride + cols, mask=cols < stride, other=0.0)
        z = tl.where(cols < V, z, float("-inf"))[None, :]
        m_new = tl.maximum(m, tl.max(z, 1))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new[:, None]), 1)
        m = m_new
    goal = tl.load(target + row)
    z_goal = tl.load(
        logits + row * stride + goal, mask=(goal >= 0) & (goal < V), other=float("nan")
    )
    one = tl.arange(0, 1)
    tl.store(lse + row + one, m + tl.log(s))
    # In this order: of logits of 1e4 the difference comes first, and is exact.
    tl.store(logp + row + one, (z_goal - m) - tl.log(s))


@triton.jit(do_not_specialize_on_alignment=["target", "lse", "coefficient"])
def _logit_gradient_kernel(
    logits, gradient, target, lse, coefficient, V, stride, gradient_stride, BLOCK: tl.constexpr
):
    """Writes a row's gradient into the memory of its logits, of which it may take the front half.

    So one program goes through the row in order: a block is written where all has been read.
    """
    row = tl.program_id(0).to(tl.int64)
    goal = tl.load(target + row)
    inside = (goal >= 0) & (goal < V)
    c = tl.load(coefficient + row)
    normaliser = tl.load(lse + row)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + cols, mask=cols < stride, other=0.0)
        tl.debug_barrier()  # the first block of the gradient lies on its own logits
        dz = c * (tl.where(cols == goal, 1.0, 0.0) - tl.exp(z - normaliser))
        dz = tl.where(inside, dz, 0.0)
        at = gradient + row * gradient_stride + cols
        tl.store(at, narrow(dz, gradient.dtype.element_ty), mask=cols < stride)


@triton.jit
def _run_sum(values, first, last, BLOCK: tl.constexpr):
    """In float64, rounded once, as `ops.segment_sum`: so both have the same bits."""
    total = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < last, other=0.0).to(tl.float64)
    return tl.sum(total, 0).to(tl.float32)


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


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Returns logp (N,) and lse (N,) float32; logp is 0 where the target is ignored."""
    head = _Head(hidden, weight, target)
    head.run(head.single_pieces())
    return head.logp.masked_fill_(head.target == ignore_index, 0.0), head.lse


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

    lse (N,) is the forward's. A target outside [0, V), such as an ignored one, adds nothing.
    """
    head = _Head(hidden, weight, target, need_hidden, need_weight)
    head.lse, coefficient = lse.contiguous(), grad.float().contiguous()
    pieces = list(row_pieces(len(target), head.most))
    head.reserve(pieces)
    for rows in pieces:
        head.product(rows)
        head.add_gradients(rows, coefficient)
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
    head.run(head.single_pieces(), lambda i: coefficient)
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

    head.run([list(piece.rows(head.most)) for piece in pieces], coefficients)
    return sums, head.dh, head.dw


class _Head:
    """Hidden states through the head and back, a group of rows at a time.

    All groups use one workspace for their logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        need_hidden: bool = False,
        need_weight: bool = False,
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
        # A row starts at a multiple of 256 bytes, whatever V: so loads are whole vectors, and
        # products run at full speed.
        self.stride = triton.cdiv(len(weight), 64) * 64
        free = available_bytes(hidden.device) if hidden.is_cuda else None
        self.most = piece_rows(4 * self.stride, free)

    def single_pieces(self) -> list[list[slice]]:
        """All rows, each piece a group of its own."""
        return [[rows] for rows in row_pieces(len(self.target), self.most)]

    def reserve(self, pieces: Sequence[slice]) -> None:
        """Makes the workspace for the longest of the pieces, and the sum over them."""
        longest = max((rows.stop - rows.start for rows in pieces), default=0)
        self.workspace = torch.empty(
            (longest, self.stride), dtype=torch.float32, device=self.hidden.device
        )
        self.weight_gradient = None if self.dw is None else _WeightGradient(self.dw, len(pieces))

    def run(
        self,
        groups: Sequence[Sequence[slice]],
        coefficients: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Visits each group's pieces for log-probs and, with coefficients, again for gradients.

        coefficients(i), called between the two, gives d loss / d logp (N,), valid for group i. A
        group of one piece keeps its logits and is multiplied once.
        """
        self.reserve([rows for group in groups for rows in group])
        for i, group in enumerate(groups):
            for rows in group:
                self.product(rows)
                self.statistics(rows)
            if coefficients is None:
                continue
            coefficient = coefficients(i)
            if self.dh is None and self.dw is None:
                continue
            for rows in group:
                if len(group) > 1:
                    self.product(rows)
                self.add_gradients(rows, coefficient)

    def product(self, rows: slice) -> None:
        """Puts the logits of these rows into the workspace, float32."""
        logits = self.workspace[: rows.stop - rows.start, : len(self.weight)]
        _wide_product(self.hidden[rows], self.weight.T, logits)

    def statistics(self, rows: slice) -> None:
        launch(
            _row_statistics_kernel,
            (rows.stop - rows.start,),
            self.workspace,
            self.workspace,
            self.target[rows],
            self.lse[rows],
            self.logp[rows],
            len(self.weight),
            self.stride,
            BLOCK=_block(self.stride, ROW_BLOCK),
            num_warps=8,
        )

    def add_gradients(self, rows: slice, coefficient: Tensor) -> None:
        """Turns the workspace's logits into their gradient, for the two products."""
        gradient = self.workspace.view(self.hidden.dtype)
        launch(
            _logit_gradient_kernel,
            (rows.stop - rows.start,),
            self.workspace,
            self.workspace,
            gradient,
            self.target[rows],
            self.lse[rows],
            coefficient[rows],
            len(self.weight),
            self.stride,
            gradient.stride(0),
            BLOCK=_block(self.stride, GRADIENT_BLOCK),
            num_warps=8,
        )
        dz = gradient[: rows.stop - rows.start, : len(self.weight)]
        if self.dh is not None:
            torch.mm(dz, self.weight, out=self.dh[rows])
        if self.weight_gradient is not None:
            self.weight_gradient.add(dz, self.hidden[rows])


class _WeightGradient:
    """dW = sum over pieces of dZ^T H, written into `out`.

    Up to PLAIN_PIECES are added as they are, each addition rounded. A float32 sum of more would
    take 2 GiB at V = 128,256 and D = 4,096, so it is kept in the upper 24 bits: 16 of them in out's
    own memory, 8 beside it. Each addition then costs 2^-17, against 2^-9 of the last rounding
    (2^-12 in float16). A product of one piece arrives in float32 a slab of the vocabulary at a
    time, small enough to be added from the second-level cache. Beside the workspace this takes V D
    bytes and SLAB_BYTES: at that shape 501 + 16 MiB.
    """

    def __init__(self, out: Tensor, pieces: int) -> None:
        self.out, self.left, self.first = out, pieces, True
        if pieces == 0:
            out.zero_()
        V, D = out.shape
        self.slab = 0  # rows of a slab; 0: the library's product can add to `out` by itself
        if pieces > PLAIN_PIECES and out.dtype != torch.float32:
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
    """Returns a b (n, m) in float32, written into `out`."""
    if a.device.type == "cpu":  # the interpreter's; torch has no such product there
        return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each run starts, and where the last one ends, (S + 1,) int64 on the device."""
    return to_device(device, torch.tensor([0, *accumulate(lengths)]))[0]


def _block(size: int, most: int) -> int:
    return int(min(most, triton.next_power_of_2(size)))
