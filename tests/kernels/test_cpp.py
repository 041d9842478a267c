"""The C++ kernels against the reference, on every instruction set that was built and runs here.

float64 must agree to rounding. Otherwise float64 judges: on the same rounded inputs the error is at
most twice that of eager PyTorch running the reference in that dtype, three times for gradients. The
same comparison must fail for results zeroed, rolled by a row, or made without their weights.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import (
    OPTIONS,
    Case,
    Cases,
    check,
    gradients,
    head_inputs,
    leaf,
    normal,
    targets,
    uneven,
)
from torch import Tensor

from ldalign.kernels import cpp, eager, reference
from ldalign.models.layout import Packed

if not cpp.available():
    pytest.skip(f"no C++ backend: {cpp.why_not()}", allow_module_level=True)

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
VOCABULARIES = [32_000, 49_152, 50_257, 128_256]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pieces of 13 rows of 601 float32 logits (6 float64, 26 of 16 bits): several a case."""
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", 13 * 601 * 4)


# ----------------------------------------------------------------------- ops, and what they compute


OPS = Cases(cpp)


def attention_case(parts: list[Any], H: int, K: int, E: int, window: int | None) -> Case:
    """lse, then the result: in a bf16 case the first is float32."""
    layout = Packed(parts)
    N, segments = sum(layout.lengths), layout.segments

    def ours(qkv: Tensor, dy: Tensor) -> list[Tensor]:
        out, lse = cpp.pair_attention(qkv, H, segments, window)
        return [out, lse, cpp.pair_attention_backward(dy, qkv, out, lse, H, segments, window)]

    def eager_(qkv: Tensor, dy: Tensor) -> list[Tensor]:
        (qkv,) = leaf(qkv)
        out = reference.pair_attention(qkv, H, segments, window)
        return [
            out.detach(),
            eager.pair_attention(qkv.detach(), H, segments, window)[1],
            *gradients(out, dy, qkv),
        ]

    qkv = torch.cat([normal(N, H, E, scale=2), normal(N, 2 * K, E, seed=1)], 1)
    return Case(ours, eager_, [qkv, uneven(N, H, E, seed=2)], 2)


CASES = {
    "forward": lambda: OPS.forward(32, 64, 256),
    "forward, ragged": lambda: OPS.forward(37, 45, 601),
    "forward, one row": lambda: OPS.forward(1, 8, 33),
    "backward": lambda: OPS.backward(16, 32, 128),
    "backward, ragged": lambda: OPS.backward(37, 45, 601),
    "backward, one row": lambda: OPS.backward(1, 8, 33),
    "sft": lambda: OPS.sft(16, 32, 128),
    "sft, ragged": lambda: OPS.sft(37, 45, 601),
    "sft, 24 pieces": lambda: OPS.sft(620, 13, 601),  # 48 in float32
    "sft, one row": lambda: OPS.sft(1, 8, 33),
    "pair": lambda: OPS.pair([4, 4, 4, 4], 32, 128),
    # several pairs in a piece, an empty response, a pair of 30 rows that no piece holds, and one
    # after it
    "pair, ragged": lambda: OPS.pair([2, 5, 1, 4, 3, 0, 17, 13, 6, 4], 45, 601),
    "pair, one row": lambda: OPS.pair([0, 1], 8, 33),
    **{
        f"pair, ragged, {name}": lambda options=options: OPS.pair(
            [2, 5, 1, 4, 3, 0, 17, 13, 6, 4], 45, 601, options
        )
        for name, options in OPTIONS.items()
    },
    "dpo": lambda: OPS.dpo(8),
    "dpo, ragged, ipo": lambda: OPS.dpo(1031, "ipo"),
    "dpo, ragged, smoothed": lambda: OPS.dpo(1031, "sigmoid", 0.2),
    "dpo, ragged": lambda: OPS.dpo(1031),
    "dpo, one pair": lambda: OPS.dpo(1),
    "norm": lambda: OPS.norm(16, 64),
    "norm, ragged": lambda: OPS.norm(137, 45),  # five blocks of rows for the weight's gradient
    "norm, one value": lambda: OPS.norm(1, 1),
    "add and norm": lambda: OPS.add_norm(16, 64),
    "add and norm, ragged": lambda: OPS.add_norm(37, 45),
    "rope": lambda: OPS.rope(16, 4, 64),
    "rope, ragged": lambda: OPS.rope(37, 7, 10, 5),
    "rope, one token": lambda: OPS.rope(1, 1, 2),
    "swiglu": lambda: OPS.swiglu(16, 64),
    "swiglu, ragged": lambda: OPS.swiglu(37, 77),
    "swiglu, one value": lambda: OPS.swiglu(1, 1),
    "attention": lambda: attention_case([(16, 16, 16), 32], 6, 2, 16, None),
    "attention, ragged": lambda: attention_case([(7, 5, 1), 9, (1, 3, 2, 4)], 6, 2, 10, 6),
    "attention, tiles": lambda: attention_case([(250, 3, 201), (1, 400)], 3, 1, 8, 230),
    "attention, one token": lambda: attention_case([1], 1, 1, 2, None),
}
RAGGED = [name for name in CASES if "ragged" in name]


# ---------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_op_against_reference(name: str, dtype: torch.dtype, isa: None, small: None) -> None:
    case = CASES[name]()
    inputs = case.rounded(dtype)
    check(case, case.run(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_pieces(dtype: torch.dtype, isa: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 75 and 149 rows are multiplied as 80 and 152, and the padding
    counts for nothing.
    """
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", 80 * 601 * dtype.itemsize)
    for case in (
        OPS.sft(150, 13, 601),
        OPS.backward(79, 13, 601),
        OPS.pair([40, 35, 30, 44], 13, 601),
    ):
        inputs = case.rounded(dtype)
        check(case, case.run(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabularies(V: int, dtype: torch.dtype, isa: None) -> None:
    for case in (OPS.forward(3, 8, V), OPS.backward(3, 8, V), OPS.pair([2, 1], 8, V)):
        inputs = case.rounded(dtype)
        check(case, case.run(inputs), inputs)


@pytest.mark.parametrize("name", RAGGED)
def test_comparison_can_fail(name: str, small: None) -> None:
    """Zeros, results a row off, two rows swapped, results without the weight: the
    comparison sees each of them.
    """
    case = CASES[name]()
    inputs = case.rounded(torch.bfloat16)
    right = case.run(inputs)
    check(case, right, inputs)
    for i, result in enumerate(right):
        mutants = {"zeros": torch.zeros_like(result)}
        if result.ndim:
            mutants["rolled"] = result.roll(1, 0)
            sizes = result.double().flatten(1).norm(dim=1) if result.ndim > 1 else result
            most, least = int(sizes.argmax()), int(sizes.argmin())
            mutants["swapped"] = result.clone()
            mutants["swapped"][[most, least]] = result[[least, most]]
        for mutant, wrong in mutants.items():
            try:
                check(case, [*right[:i], wrong, *right[i + 1 :]], inputs)
            except AssertionError as error:
                assert f"result {i} of" in str(error)
            else:
                pytest.fail(f"{mutant} pass for result {i}")
    if case.weight is not None:
        unweighted = [torch.ones_like(x) if i == case.weight else x for i, x in enumerate(inputs)]
        with pytest.raises(AssertionError, match="result"):
            check(case, case.run(unweighted), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_strides_repeats_and_inputs(name: str, dtype: torch.dtype, small: None) -> None:
    """Any strides, an expanded upstream gradient, the same bits each time, and
    nothing written to an input.
    """
    case = CASES[name]()
    inputs = case.rounded(dtype)
    inputs[-1] = inputs[-1].flatten()[:1].expand_as(inputs[-1])  # often the upstream gradient
    kept = [x.clone() for x in inputs]
    first, again = case.run(inputs), case.run(inputs)
    spread = case.run([torch.stack([x, x + 1], -1)[..., 0] for x in inputs])
    rows_apart = case.run([torch.stack([x, x + 1], 1)[:, 0] for x in inputs])
    turned = case.run([x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs])
    for a, b, c, d, e in zip(first, again, spread, rows_apart, turned, strict=True):
        assert torch.equal(a, b), "not the same bits twice"
        # A transposed matrix goes to the product as it is, which may add in another order.
        rtol = 1e-5 if dtype == torch.float32 else 2e-2
        for other in (c, d, e):
            torch.testing.assert_close(other, a, rtol=rtol, atol=rtol)
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


@pytest.mark.parametrize(
    "name",
    ["norm, ragged", "add and norm, ragged", "rope, ragged", "swiglu, ragged", "attention, tiles"],
)
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    case = CASES[name]()
    inputs = [
        x.repeat(30, *(1,) * (x.ndim - 1)) if len(x) in (37, 137) else x
        for x in case.rounded(torch.bfloat16)
    ]
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        results.append(case.run(inputs))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", RAGGED)
def test_nan_stays(name: str, isa: None, small: None) -> None:
    """NaN in row 2 of the first input: its row of every result of N rows has
    NaN, and no later row has.
    """
    for dtype in (torch.float64, torch.float32, *HALVES):
        case = CASES[name]()
        inputs = case.rounded(dtype)
        inputs[0][2] = torch.nan
        results = case.run(inputs)
        # row 2 is of the first pair's prompt, of 13 tokens with its responses
        if name.startswith("attention"):
            assert all(x[2].isnan().any() and x[13:].isfinite().all() for x in results)
        elif name.startswith("pair"):  # rows 2 to 6 are response 1
            assert results[0].isnan().tolist() == [False, True, *[False] * 8]
            assert results[1][:7].isnan().all() and results[1][7:].isfinite().all()
        else:
            per_row = [x for x in results if len(x.shape) and len(x) == len(inputs[0])]
            # the other results are of other inputs
            reached = {"rope": 1, "dpo": 2}.get(name.split(",")[0])
            assert per_row and all(
                x[2].isnan().any() and x[3:].isfinite().all() for x in per_row[:reached]
            )
        if name.split(",")[0] in ("backward", "sft", "pair", "norm", "add and norm"):
            assert results[-1].isnan().any(), "the weight's gradient"


# ----------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("share", [0, 0.4, 1], ids=["none", "some", "all"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7], ids=str)
def test_ignored_rows(share: float, ignore_index: int, isa: None, small: None) -> None:
    """They have log-prob 0 and no gradient, and the others are as if alone."""
    N, D, V = 37, 12, 601
    h, w = (x.float() for x in head_inputs(N, D, V))
    target = targets(N, V).clamp(min=8)
    ignored = torch.rand(N, generator=torch.Generator().manual_seed(1)) < share
    target[ignored] = ignore_index
    grad = uneven(N).float().masked_fill(ignored, 0)
    logp, lse = cpp.linear_logprob(h, w, target, ignore_index)
    dh, dw = cpp.linear_logprob_backward(grad, h, w, target, lse, True, True)
    assert dh is not None and dw is not None
    assert (logp[ignored] == 0).all() and (dh[ignored] == 0).all() and lse.isfinite().all()
    leaves = leaf(h[~ignored].double(), w.double())
    expected = reference.linear_logprob(*leaves, target[~ignored])
    dh_expected, dw_expected = gradients(expected, grad[~ignored], *leaves)
    torch.testing.assert_close(logp[~ignored].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dh[~ignored].double(), dh_expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dw.double(), dw_expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype: torch.dtype, isa: None, small: None) -> None:
    """Logits of +-1e4: exact values, finite gradients, and a target with no
    chance is -2e4, not -inf.
    """
    h = torch.tensor([[1e4], [-1e4]] * 60).to(dtype)
    w = torch.tensor([[1.0], [-1.0], *[[0.5]] * 599]).to(dtype)
    size = float(h[0, 0])  # 1e4 in that dtype
    logp, dh, dw = cpp.sft_loss(h, w, torch.zeros(120, dtype=torch.int64), 0.0625, True, True)
    assert logp.tolist() == [0.0, -2 * size] * 60
    assert dh is not None and dh.flatten().tolist() == [0.0, -0.125] * 60
    assert dw is not None and (dw[2:] == 0).all()
    assert dw[:2].flatten().tolist() == pytest.approx(
        [3.75 * size, -3.75 * size], rel=torch.finfo(dtype).eps
    )


def test_infinite_logits(isa: None) -> None:
    """A logit of -inf is a word with no chance; where all are, or one is +inf, there is no
    log-softmax: NaN.
    """
    for logits, expected in (
        ([0.0, -torch.inf, 0.0], -0.6931472),
        ([-torch.inf] * 3, torch.nan),
        ([0.0, torch.inf, 0.0], torch.nan),
    ):
        w = torch.tensor(logits)[:, None].nan_to_num(posinf=1e9, neginf=-1e9)
        logp, _ = cpp.linear_logprob(torch.tensor([[2e38]]), w, torch.tensor([0]))
        assert logp.item() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_one_side_frozen(small: None) -> None:
    for name in ("backward, ragged", "sft, ragged", "pair, ragged"):
        case = CASES[name]()
        inputs = case.rounded(torch.bfloat16)
        *_, dh, dw = case.run(inputs)
        N = len(inputs[0])
        target = targets(N, 601)
        if name.startswith("backward"):
            lse = cpp.linear_logprob(inputs[0], inputs[1], target)[1]
            given = (inputs[2], *inputs[:2], target, lse)
            run = functools.partial(cpp.linear_logprob_backward, *given)
        elif name.startswith("sft"):
            run = functools.partial(cpp.sft_loss, *inputs, target, 0.7)
        else:
            lengths = [2, 5, 1, 4, 3, 0, 17, 13, 6, 4]
            given = (*inputs[:2], target, lengths, *inputs[2:], 0.3, 0.7)
            run = functools.partial(cpp.pair_loss, *given)
        only_hidden, only_weight, neither = (
            run(*needs)[-2:] for needs in ((True, False), (False, True), (False, False))
        )
        assert torch.equal(only_hidden[0], dh) and only_hidden[1] is None
        assert torch.equal(only_weight[1], dw) and only_weight[0] is None
        assert neither == (None, None)


def test_no_rows(small: None) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    h, w, wide = torch.zeros(0, 3).bfloat16(), torch.ones(5, 3).bfloat16(), torch.zeros(0)
    assert [x.shape for x in cpp.linear_logprob(h, w, none)] == [(0,), (0,)]
    for gradients_of in (
        cpp.linear_logprob_backward(wide, h, w, none, wide, True, True),
        cpp.sft_loss(h, w, none, 1.0, True, True)[1:],
        cpp.pair_loss(h, w, none, [], wide, wide, 0.1, 1.0, True, True)[1:],
        cpp.pair_loss(h, w, none, [0, 0], torch.zeros(2), torch.ones(1), 0.1, 1.0, True, True)[1:],
        cpp.rms_norm_backward(h, h, w[0], wide),
        cpp.add_rms_norm_backward(h, h, h, w[0], wide),
    ):
        dh, dw = gradients_of
        assert dh is not None and dh.shape == (0, 3)
        assert dw is not None and dw.shape[-1] == 3 and not dw.any()
    sums = cpp.pair_loss(h, w, none, [0, 0], torch.zeros(2), torch.ones(1), 0.1, 1.0, False, False)[
        0
    ]
    assert sums.tolist() == [0, 0]
    assert cpp.weighted_dpo(*[wide] * 5, 0.1)[0].item() == 0
    assert cpp.rms_norm(h, w[0], 1e-3)[0].shape == (0, 3)
    cpp.rope_(h.view(0, 3, 2), torch.zeros(0, 1), torch.zeros(0, 1), False, 3)
    both = h.new_zeros(0, 6)
    assert cpp.swiglu(both).shape == (0, 3) and cpp.swiglu_backward(h, both).shape == (0, 6)
    assert cpp.pair_attention(h.view(0, 3, 2), 1, torch.zeros(0, 4, dtype=torch.int64), None)[
        0
    ].shape == (0, 1, 2)


# ------------------------------------------------------------------------ arithmetic of the vectors


def test_exponential(isa: None) -> None:
    """Over its whole range, through silu: 4 units in the last place; 0 and infinity where they
    belong; NaN stays.
    """
    x = torch.cat([torch.linspace(-100, 100, 200_003), torch.linspace(-1, 1, 10_001)])
    silu = cpp.swiglu(torch.stack([x, torch.ones_like(x)]).flatten()).double()
    exact = x.double() * torch.sigmoid(x.double())
    seen = exact.abs() > 1e-35  # below it e^-x overflows in float32
    assert (
        (silu - exact).abs()[seen] <= 4 * torch.finfo(torch.float32).eps * exact.abs()[seen]
    ).all()
    assert (silu[~seen].abs() <= 1e-34).all()
    ends = torch.tensor([1e4, -1e4, torch.inf, torch.nan])
    silu = cpp.swiglu(torch.cat([ends, torch.ones(4)]))
    assert silu.tolist()[:3] == [1e4, 0.0, torch.inf] and silu[3].isnan()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_conversions(dtype: torch.dtype, isa: None) -> None:
    """Every 16-bit pattern is read exactly, and sums are rounded as torch rounds
    them, from tiny to infinite.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    weight = torch.ones(2**16)

    def added(x: Tensor, y: Tensor) -> Tensor:
        return cpp.add_rms_norm(x, y, weight, 1.0)[1]

    torch.testing.assert_close(
        added(every, torch.zeros_like(every)), every, rtol=0, atol=0, equal_nan=True
    )
    for seed in range(4):
        other = every[:, torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))]
        expected = (every.float() + other.float()).to(dtype)
        torch.testing.assert_close(added(every, other), expected, rtol=0, atol=0, equal_nan=True)
    # close in size, so that the sum needs rounding
    near = every * torch.tensor(1.0078125, dtype=dtype)
    expected = (every.float() + near.float()).to(dtype)
    torch.testing.assert_close(added(every, near), expected, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------- refusals

H, W, T, F = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
QKV, SEGMENTS = torch.ones(4, 3, 3), torch.tensor([[0, 4, 0, 0]])
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: cpp.linear_logprob(H[0], W, T), r"hidden has shape \[3\], expected \(N, D\)"),
    (lambda: cpp.linear_logprob(H.int(), W, T), "hidden is Int, expected float32"),
    (lambda: cpp.linear_logprob(H.bfloat16(), W, T), "weight is Float, expected BFloat16"),
    (
        lambda: cpp.linear_logprob(H, W[:, :2], T),
        r"weight has shape \[5, 2\], expected \(V, D\) = "
        r"\[5, 3\]",
    ),
    (lambda: cpp.linear_logprob(H, W, T[:3]), r"target has shape \[3\], expected \(N,\) = \[4\]"),
    (lambda: cpp.linear_logprob(H, W, T.int()), "target is Int, expected Long"),
    (
        lambda: cpp.linear_logprob(H, W, T + torch.tensor([0, 0, 5, 9])),
        r"target\[2\] is 5, "
        r"expected 0 to 4",
    ),
    (
        lambda: cpp.linear_logprob(H, W, T - torch.tensor([0, 1, 0, 0])),
        r"target\[1\] is -1, "
        r"expected 0 to 4",
    ),
    (lambda: cpp.sft_loss(H, W, T - 100, 1.0, True, True), r"target\[0\] is -100, expected 0 to 4"),
    (
        lambda: cpp.linear_logprob_backward(F[:3], H, W, T, F, True, True),
        r"grad has shape \[3\], "
        r"expected \(N,\)",
    ),
    (
        lambda: cpp.linear_logprob_backward(F, H, W, T, F.double(), True, True),
        "lse is Double, expected Float",
    ),
    (lambda: cpp.linear_logprob_backward(F + 1, H, W, T - 1, F, True, True), r"target\[0\] is -1"),
    (
        lambda: cpp.pair_loss(H, W, T, [1, 2, 1], F, F, 0.1, 1.0, True, True),
        "lengths has 3 entries",
    ),
    (
        lambda: cpp.pair_loss(H, W, T, [1, 2], F, F, 0.1, 1.0, True, True),
        "lengths add up to 3, but hidden has 4 rows",
    ),
    (
        lambda: cpp.pair_loss(H, W, T, [5, -1], F, F, 0.1, 1.0, True, True),
        "lengths has -1, expected 0 or more",
    ),
    (
        lambda: cpp.pair_loss(H, W, T, [1, 3], F, F[:1], 0.1, 1.0, True, True),
        r"reference has "
        r"shape \[4\], "
        r"expected",
    ),
    (
        lambda: cpp.pair_loss(H, W, T, [1, 3], F[:2], F, 0.1, 1.0, True, True),
        r"pair_weight has "
        r"shape \[4\], "
        r"expected",
    ),
    (
        lambda: cpp.weighted_dpo(F, F, F[:2], F, F, 0.1),
        "ref_real is Float of shape .2., expected Float of shape .4.",
    ),
    (lambda: cpp.weighted_dpo(*[F.bfloat16()] * 5, 0.1), "sums_real is BFloat16, expected Float"),
    (lambda: cpp.rms_norm(H, W, 1e-3), r"weight has shape \[5, 3\], expected \(D,\)"),
    (lambda: cpp.rms_norm(H, F, 1e-3), r"weight has shape \[4\], expected \(D,\) = \[3\]"),
    (
        lambda: cpp.rms_norm_backward(H[:2], H, W[0], F),
        "dy is Float of shape .2, 3., expected .* like x",
    ),
    (
        lambda: cpp.rms_norm_backward(H, H, W[0], F[:2]),
        r"rstd has shape \[2\], expected \(N,\) = "
        r"\[4\]",
    ),
    (
        lambda: cpp.add_rms_norm(H, H.double(), W[0], 1e-3),
        "residual is Double .*, expected Float .* like x",
    ),
    (
        lambda: cpp.add_rms_norm_backward(H, W, H, W[0], F),
        "dtotal is Float of shape .5, 3., expected .* like total",
    ),
    (lambda: cpp.rope_(H, F, F, False, 1), r"x has shape \[4, 3\], expected \(N, H, E\)"),
    (lambda: cpp.rope_(H[:, None], F, F, False, 1), "x has head width 3, expected an even one"),
    (
        lambda: cpp.rope_(torch.ones(4, 1, 2), H, H, False, 1),
        r"cos has shape \[4, 3\], expected "
        r"\(N, E/2\) = \[4, 1\]",
    ),
    (
        lambda: cpp.rope_(torch.ones(4, 1, 2), F[:, None], F[:, None], False, 2),
        "heads is 2, expected 0 to 1",
    ),
    (lambda: cpp.swiglu(H), "gate_up has width 3, expected an even one"),
    (lambda: cpp.swiglu_backward(H.half(), torch.cat([H, H], 1)), "dy is Half, expected Float"),
    (
        lambda: cpp.swiglu_backward(H[:2], torch.cat([H, H], 1)),
        r"dy has shape \[2, 3\], expected "
        r"half of gate_up's",
    ),
    (
        lambda: cpp.pair_attention(H[:, None], 1, SEGMENTS, None),
        "qkv has 1 heads and heads is 1, expected heads",
    ),
    (lambda: cpp.pair_attention(QKV, 1, SEGMENTS, 0), "window is 0, expected 1 or more"),
    (
        lambda: cpp.pair_attention(QKV, 1, SEGMENTS[:, :3], None),
        r"segments has shape \[1, 3\], "
        r"expected \(S, 4\)",
    ),
    (
        lambda: cpp.pair_attention(QKV, 1, SEGMENTS - 1, None),
        "segment 0 is .* expected to begin at 0",
    ),
    (
        lambda: cpp.pair_attention(QKV[:2], 1, SEGMENTS, None),
        "segments end at 4, but qkv has 2 rows",
    ),
    (
        lambda: cpp.pair_attention_backward(H, QKV, QKV[:, :1], H, 1, SEGMENTS, None),
        "grad is Float of shape .4, 3., ",
    ),
    (lambda: cpp.set_isa("avx9"), "'avx9' does not run here; choose one of default"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("wanted", ["default", "avx9"])
def test_instruction_set_from_the_environment(wanted: str) -> None:
    code = "from ldalign.kernels import cpp; print(cpp.why_not() or cpp.build_info()['isa'])"
    environment = {**os.environ, "LDALIGN_ISA": wanted}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "default" if wanted == "default" else "LDALIGN_ISA='avx9' does not run here"
    )
