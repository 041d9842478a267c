"""The Triton kernels against the reference: interpreted here, native where a CUDA device is.

float64 judges: on the same rounded inputs the error is at most twice that of eager PyTorch running
the reference in that dtype, three times for gradients. The same comparison must fail for results
zeroed, rolled by a row, or made without their weights. The compiler's side is in
test_triton_compile.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import triton_backend
from op_cases import OPTIONS, Case, Cases, check, head_inputs, normal, targets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_backend import NATIVE, gpu

from ldalign import ops
from ldalign.kernels import pieces, reference, triton_common, triton_head, triton_norm
from ldalign.system import distributed
from ldalign.system.metrics import Mean
from ldalign.training.policy import TrainSettings, accumulate_gradients, global_batch
from ldalign.training.scoring import response_logps

device, interpret = triton_backend.device, triton_backend.interpret
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes blocks, pieces and runs so small (13 rows of 601 logits) that a case has several."""
    monkeypatch.setattr(triton_head, "piece_rows", lambda *_: 13)
    monkeypatch.setattr(triton_head, "PLAIN_PIECES", 1)
    monkeypatch.setattr(triton_head, "SLAB_BYTES", 250 * 4 * 45)
    monkeypatch.setattr(triton_head, "ROW_BLOCK", 256)
    monkeypatch.setattr(triton_head, "GRADIENT_BLOCK", 256)
    monkeypatch.setattr(triton_head, "SUM_BLOCK", 4)
    monkeypatch.setattr(triton_norm, "PROGRAMS", 3)
    monkeypatch.setattr(triton_norm, "TILE", 256)


# ----------------------------------------------------------------------- ops, and what they compute


OPS = Cases(gpu)


CASES = {
    "forward": lambda: OPS.forward(32, 64, 256),
    "forward, ragged": lambda: OPS.forward(37, 45, 601),
    "forward, one row": lambda: OPS.forward(1, 8, 33),
    "backward": lambda: OPS.backward(16, 32, 128),
    "backward, ragged": lambda: OPS.backward(37, 45, 601),
    "backward, one row": lambda: OPS.backward(1, 8, 33),
    "sft": lambda: OPS.sft(16, 32, 128),
    "sft, ragged": lambda: OPS.sft(37, 45, 601),
    "sft, one row": lambda: OPS.sft(1, 8, 33),
    "pair": lambda: OPS.pair([4, 4, 4, 4], 32, 128),
    # two pairs in a piece, an empty response, a pair of 30 rows for which a piece is too short, and
    # one after it
    "pair, ragged": lambda: OPS.pair([2, 5, 1, 4, 3, 0, 17, 13, 6, 4], 45, 601),
    "pair, one row": lambda: OPS.pair([0, 1], 8, 33),
    **{
        f"pair, ragged, {name}": lambda name=name: OPS.pair(
            [2, 5, 1, 4, 3, 0, 17, 13, 6, 4], 45, 601, OPTIONS[name]
        )
        for name in ("ipo, nll, per token", "smoothed, nll, per token")
    },
    # an empty response has one token
    "pair, one row, options": lambda: OPS.pair([0, 1], 8, 33, OPTIONS["ipo, nll, per token"]),
    "dpo": lambda: OPS.dpo(8),
    "dpo, ipo": lambda: OPS.dpo(8, "ipo"),
    "dpo, smoothed": lambda: OPS.dpo(8, "sigmoid", 0.2),
    "dpo, ragged": lambda: OPS.dpo(1031),
    "dpo, one pair": lambda: OPS.dpo(1),
    "norm": lambda: OPS.norm(16, 64),
    "norm, ragged": lambda: OPS.norm(37, 45),
    "norm, one row": lambda: OPS.norm(1, 5),
    "add and norm": lambda: OPS.add_norm(16, 64),
    "add and norm, ragged": lambda: OPS.add_norm(37, 45),
    "rope": lambda: OPS.rope(16, 4, 16),
    "rope, ragged": lambda: OPS.rope(37, 7, 10, 5),
    "rope, one token": lambda: OPS.rope(1, 1, 2),
    "swiglu": lambda: OPS.swiglu(16, 64),
    "swiglu, ragged": lambda: OPS.swiglu(37, 77),
    "swiglu, one value": lambda: OPS.swiglu(1, 1),
}
RAGGED = [name for name in CASES if "ragged" in name]


def placed(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [x.to(device) for x in case.rounded(dtype)]


# ---------------------------------------------------------------------------------------- the tests


def test_backend_runs_here() -> None:
    assert gpu.available() and gpu.why_not() == "" and gpu.interpreted() is not NATIVE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_op_against_reference(name: str, dtype: torch.dtype, device: str, small: None) -> None:
    case = CASES[name]()
    inputs = placed(case, dtype, device)
    check(case, list(case.ours(*inputs)), inputs)


@pytest.mark.parametrize("name", RAGGED)
def test_comparison_can_fail(name: str, device: str, small: None) -> None:
    """Zeros, results a row off, and results without the weight: the
    comparison must see each of them.
    """
    case = CASES[name]()
    inputs = placed(case, torch.bfloat16, device)
    right = list(case.ours(*inputs))
    check(case, right, inputs)
    for i, result in enumerate(right):
        mutants = {"zeros": torch.zeros_like(result)}
        if result.ndim:
            mutants["rolled"] = result.roll(1, 0)
        for mutant, wrong in mutants.items():
            with pytest.raises(AssertionError, match=f"result {i}"):
                check(case, [*right[:i], wrong, *right[i + 1 :]], inputs)
                pytest.fail(f"{mutant} pass for result {i}")
    if case.weight is not None:
        unweighted = [torch.ones_like(x) if i == case.weight else x for i, x in enumerate(inputs)]
        with pytest.raises(AssertionError):
            check(case, list(case.ours(*unweighted)), inputs)


@pytest.mark.parametrize("name", RAGGED)
def test_strides_repeats_and_inputs(name: str, device: str, small: None) -> None:
    """Any strides, an expanded upstream gradient, the same bits each time, and
    nothing written to an input.
    """
    case = CASES[name]()
    inputs = placed(case, torch.float32, device)
    inputs[-1] = inputs[-1].flatten()[:1].expand_as(inputs[-1])  # often the upstream gradient
    kept = [x.clone() for x in inputs]
    first, again = list(case.ours(*inputs)), list(case.ours(*inputs))
    spread = list(case.ours(*(torch.stack([x, x + 1], -1)[..., 0] for x in inputs)))
    rows_apart = list(case.ours(*(torch.stack([x, x + 1], 1)[:, 0] for x in inputs)))
    for a, b, c, d in zip(first, again, spread, rows_apart, strict=True):
        assert torch.equal(a, b), "not the same bits twice"
        assert torch.equal(a, c) and torch.equal(a, d), "strides change the result"
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("name", RAGGED)
def test_nan_in_gives_nan_out(name: str, device: str, small: None) -> None:
    case = CASES[name]()
    for i in range(len(case.inputs)):
        inputs = placed(case, torch.float32, device)
        inputs[i].view(-1)[-1] = float("nan")
        assert any(result.isnan().any() for result in case.ours(*inputs)), f"input {i}"


def test_a_row_of_nan_stays_one_row(device: str) -> None:
    h, w = (x.float().to(device) for x in head_inputs(5, 8, 33))
    h[2] = float("nan")
    for result in gpu.linear_logprob(h, w, targets(5, 33).to(device)):
        assert result.isnan().tolist() == [False, False, True, False, False]


EMPTY: dict[str, Callable[[], Case]] = {
    "forward": lambda: OPS.forward(0, 8, 33),
    "backward": lambda: OPS.backward(0, 8, 33),
    "sft": lambda: OPS.sft(0, 8, 33),
    "pair": lambda: OPS.pair([0, 0], 8, 33),
    "dpo": lambda: OPS.dpo(0),
    "norm": lambda: OPS.norm(0, 8),
    "add and norm": lambda: OPS.add_norm(0, 8),
    "rope": lambda: OPS.rope(0, 2, 4),
    "swiglu": lambda: OPS.swiglu(0, 8),
}


@pytest.mark.parametrize("name", EMPTY)
def test_no_rows(name: str, device: str) -> None:
    case = EMPTY[name]()
    inputs = placed(case, torch.bfloat16, device)
    check(case, list(case.ours(*inputs)), inputs)


# ----------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("V", [32_000, 49_152, 50_257, 128_256])
def test_head_of_a_whole_vocabulary(V: int, device: str) -> None:
    """A few rows in bfloat16: many blocks, and rows of an odd length in the workspace."""
    for case in (OPS.forward(2, 16, V), OPS.pair([1, 2], 16, V)):
        inputs = placed(case, torch.bfloat16, device)
        check(case, list(case.ours(*inputs)), inputs)


@pytest.mark.parametrize("ignored", ["none", "some", "all", "in the vocabulary"])
def test_ignored_rows(ignored: str, device: str, small: None) -> None:
    h, w = (x.float().to(device) for x in head_inputs(37, 45, 601))
    target = targets(37, 601).to(device)
    out = torch.zeros(37, dtype=torch.bool)
    if ignored != "none":
        out[:: 1 if ignored == "all" else 3] = True
    index = 7 if ignored == "in the vocabulary" else -100
    full, lse = gpu.linear_logprob(h, w, target)
    target[out] = index
    out |= target.cpu() == index
    logp, _ = gpu.linear_logprob(h, w, target, index)
    assert torch.equal(logp, full.masked_fill(out.to(device), 0))
    if index < 0:
        grad = normal(37).float().to(device)
        kept = targets(37, 601).to(device)
        without = gpu.linear_logprob_backward(
            grad.masked_fill(out.to(device), 0), h, w, kept, lse, True, True
        )
        for a, b in zip(
            gpu.linear_logprob_backward(grad, h, w, target, lse, True, True), without, strict=True
        ):
            assert torch.equal(a, b)


def test_a_target_outside_the_vocabulary_gives_nan(device: str) -> None:
    h, w = (x.float().to(device) for x in head_inputs(4, 8, 33))
    for bad in (-1, 33, 2**40):
        target = torch.tensor([3, bad, 5, 32], device=device)
        for logp in (
            gpu.linear_logprob(h, w, target)[0],
            gpu.sft_loss(h, w, target, 1.0, True, True)[0],
        ):
            assert logp.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_of_huge_logits(dtype: torch.dtype, device: str) -> None:
    """Logits of +-1e4: a target with no chance is -2e4, not -inf, and its gradient is whole."""
    big = float(torch.tensor(1e4, dtype=dtype))
    h = torch.tensor([[big], [-big]] * 6, dtype=dtype, device=device)
    w = torch.tensor([[1.0], [-1.0], *[[0.5]] * 99], dtype=dtype, device=device)
    target = torch.zeros(12, dtype=torch.int64, device=device)
    logp, lse = gpu.linear_logprob(h, w, target)
    assert logp.tolist() == [0.0, -2 * big] * 6
    dh, dw = gpu.linear_logprob_backward(torch.ones_like(logp), h, w, target, lse, True, True)
    assert dh.flatten().tolist() == [0.0, 2.0] * 6 and dw.isfinite().all()
    assert gpu.sft_loss(h, w, target, 1.0, False, False)[0].tolist() == logp.tolist()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scoring_equals_training(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in the same piece: log-probs and sums to the bit; other pieces: to float32's
    rounding. Both are that near the truth, which logits in 16 bits are not.
    """
    lengths, D, V = [8, 5, 1, 12, 6, 0, 3, 5], 45, 601
    h, w, ref, weight = placed(OPS.pair(lengths, D, V), dtype, device)
    target = targets(40, V).to(device)

    def scores(rows: int) -> list[Tensor]:
        monkeypatch.setattr(triton_head, "piece_rows", lambda *_: rows)
        return [
            gpu.linear_logprob(h, w, target)[0],
            gpu.sft_loss(h, w, target, 0.7, False, False)[0],
            gpu.pair_loss(h, w, target, lengths, ref, weight, 0.3, 0.7, False, False)[0],
        ]

    exact = reference.linear_logprob(h.double(), w.double(), target)
    exact_sums = ops.segment_sum(exact, lengths)
    for rows in (40, 13, 3):  # pieces of whole pairs end elsewhere than those of rows
        scored, trained, sums = scores(rows)
        assert torch.equal(scored, trained)
        assert rows < 40 or torch.equal(sums, ops.segment_sum(scored, lengths))
        torch.testing.assert_close(scored.double(), exact, rtol=0, atol=1e-5)
        torch.testing.assert_close(sums.double(), exact_sums, rtol=0, atol=5e-5)
    rounded = reference.linear_logprob(h.bfloat16(), w.bfloat16(), target).double()
    assert (rounded - exact).abs().max() > 1e-2  # the bound would see them


def test_step_0_starts_at_ln_2(
    device: str, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model in bfloat16: the reference pass, then the loss of the same micro-batch."""
    distributed.start(device)
    chosen, on = ops._raw, torch.device(device)

    def raw(op: str, x: Tensor) -> Callable[..., Any]:
        head = op in ("linear_logprob", "pair_loss")
        return getattr(gpu, op) if head else chosen(op, x)

    monkeypatch.setattr(ops, "_raw", raw)
    model = tiny.mistral().to(on, torch.bfloat16)
    pairs, settings = tiny.pairs(6), TrainSettings(1, 6, 10_000, 1e-3)
    table = response_logps(model, pairs, settings.micro_tokens, on).tolist()
    pairs = [
        replace(p, ref_real=real, ref_generated=generated)
        for p, (real, generated) in zip(pairs, table, strict=True)
    ]
    mean = Mean()
    accumulate_gradients(model, global_batch(model, pairs, settings, on), settings, mean, on)
    means = mean.means(mean.totals(on).tolist())
    assert abs(means["loss/unweighted"] - math.log(2)) < 1e-6
    assert means["rewards/margins"] == 0.0
    assert means["rewards/chosen"] == 0.0


@pytest.mark.parametrize("name", ["backward", "sft", "pair"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_change_nothing_but_rounding(
    name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece, a few, one row at a time: of more than PLAIN_PIECES dW stays within one rounding
    to its dtype.
    """
    D, V = 20, 150
    makers = {
        "backward": lambda: OPS.backward(13, D, V),
        "sft": lambda: OPS.sft(13, D, V),
        "pair": lambda: OPS.pair([2, 1, 3, 4, 0, 3], D, V),
    }
    case = makers[name]()
    inputs = placed(case, dtype, device)
    monkeypatch.setattr(triton_head, "SLAB_BYTES", 70 * 4 * D)  # three slabs, the last a short one
    results = {}
    for rows in (100, 4, 2, 1):
        monkeypatch.setattr(triton_head, "piece_rows", lambda *_, rows=rows: rows)
        results[rows] = list(case.ours(*inputs))
        check(case, results[rows], inputs)
    for a, b in zip(results[100], results[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(a.dtype).eps, atol=2e-5)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("op", ["pair_loss", "sft_loss", "linear_logprob_backward"])
def test_only_what_is_needed(
    op: str, which: tuple[bool, bool], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_head, "piece_rows", lambda *_: 5)
    lengths, N, D, V = [2, 1, 7, 4], 14, 20, 150
    h, w, ref, weight = placed(OPS.pair(lengths, D, V), torch.float32, device)
    t = targets(N, V).to(device)
    arguments: dict[str, tuple[Any, ...]] = {
        "pair_loss": (h, w, t, lengths, ref, weight, 0.3, 0.7),
        "sft_loss": (h, w, t, 0.7),
        "linear_logprob_backward": (
            normal(N).float().to(device),
            h,
            w,
            t,
            gpu.linear_logprob(h, w, t)[1],
        ),
    }
    both = getattr(gpu, op)(*arguments[op], True, True)
    some = getattr(gpu, op)(*arguments[op], *which)
    expected = [
        *both[:-2],
        *(x if need else None for x, need in zip(both[-2:], which, strict=True)),
    ]
    for a, b in zip(some, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


# ------------------------------------------------------------------------------ memory and the host


class HostCode(TorchDispatchMode):
    """Bytes of all tensors made inside, as if none were ever freed, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if any(maker in name for maker in ("empty", "full", "zeros", "clone", "_to_copy")):
            self.bytes += out.numel() * out.element_size()
        self.products += "mm" in name
        return out


def on_meta(op: str, N: int, D: int, V: int, dtype: torch.dtype) -> HostCode:
    """What the host code of an op does at a shape, seen without computing anything."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    head = empty(N, D, dtype=dtype), empty(V, D, dtype=dtype), empty(N, dtype=torch.int64)
    with triton_common.recording((9, 0), lambda *launch: None), HostCode() as done:
        if op == "pair_loss":
            gpu.pair_loss(*head, [N // 32] * 32, empty(32), empty(16), 0.1, 1.0, True, True)
        elif op == "linear_logprob_backward":
            gpu.linear_logprob_backward(empty(N), *head, empty(N), True, True)
        else:
            gpu.linear_logprob(*head)
    return done


@pytest.mark.parametrize(
    ("D", "V", "count"),
    [(4096, 151_936, 2), (4096, 128_256, 2), (4096, 32_000, 1), (576, 49_152, 1)],
)
def test_products_and_memory_at_production_shapes(D: int, V: int, count: int) -> None:
    """Three products a piece, and one workspace beside the gradients and a few numbers a row."""
    N = 8192
    pair = on_meta("pair_loss", N, D, V, torch.bfloat16)
    backward = on_meta("linear_logprob_backward", N, D, V, torch.bfloat16)
    scoring = on_meta("linear_logprob", N, D, V, torch.bfloat16)
    assert pair.products == backward.products == 3 * count and scoring.products == count
    gradients, workspace = 2 * (N * D + V * D), 4 * V * N // count
    assert workspace < scoring.bytes <= pieces.WORKSPACE_BYTES
    assert gradients + workspace < pair.bytes <= gradients + workspace + 2**20


def test_products_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 pieces of 512 rows at 1 GB, dW of each in 149 slabs of the vocabulary."""
    monkeypatch.setattr(triton_head, "piece_rows", lambda row, _: pieces.piece_rows(row, 10**9))
    done = on_meta("pair_loss", 8192, 4096, 151_936, torch.bfloat16)
    assert done.products == 16 * (1 + 1 + 149)


@pytest.mark.gpu
def test_host_never_waits() -> None:
    """Where the host would wait for the GPU, in a copy or a read, torch raises instead."""
    if not NATIVE:
        pytest.skip("needs a CUDA device")
    lengths = [2, 5, 1, 4, 3, 0, 17, 13]
    target = targets(45, 601).cuda()
    h, w, ref, weight = placed(OPS.pair(lengths, 45, 601), torch.bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.pair_loss(h, w, target, lengths, ref, weight, 0.3, 0.7, True, True)
        gpu.sft_loss(h, w, target, 0.7, True, True)
        gpu.linear_logprob(h, w, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
