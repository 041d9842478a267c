"""The ops against the reference, through autograd, on every CPU backend; packing, one by one.

float64 must agree to rounding. Otherwise float64 judges: on the same rounded inputs the error is at
most twice that of eager PyTorch running the reference in that dtype, three times for gradients.
Upstream gradients are random and uneven.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_cases import OPTIONS
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from ldalign import ops
from ldalign.kernels import cpp, eager, reference
from ldalign.kernels.loss_options import DPO, Kind, LossOptions
from ldalign.models.layout import Packed
from ldalign.system.errors import EnvironmentProblem

Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (
        torch.randn(
            shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
        )
        * scale
    )


def targets(N: int, V: int) -> Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(N + V))


def head_case(N: int, D: int, V: int) -> Case:
    target = targets(N, V)
    inputs = [normal(N, D, scale=2), normal(V, D, seed=1, scale=D**-0.5)]
    return (
        lambda h, w: ops.linear_logprob(h, w, target),
        lambda h, w: reference.linear_logprob(h, w, target),
        inputs,
    )


def pair_case(lengths: list[int], D: int, V: int, options: LossOptions = DPO) -> Case:
    """Makes weights of 0 to 2 and references near the log-probs: coefficients differ by pair."""
    N, P = sum(lengths), len(lengths) // 2
    target, weight = targets(N, V), normal(P, seed=2).abs()
    near = normal(2 * P, seed=3, scale=2) - torch.tensor(lengths) * math.log(V)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return ops.pair_loss(h, w, target, lengths, near, weight, 0.3, 0.5, options)[0]

    def plain(h: Tensor, w: Tensor) -> Tensor:
        logp = reference.linear_logprob(h, w, target)
        sums, tokens = ops.segment_sum(logp, lengths), torch.tensor(lengths)
        given = near.to(logp.dtype), tokens, weight.to(logp.dtype)
        return 0.5 * reference.pair_loss(sums, *given, 0.3, options)[0]

    return ours, plain, [normal(N, D, scale=2), normal(V, D, seed=1, scale=D**-0.5)]


def sft_case(N: int, D: int, V: int) -> Case:
    target = targets(N, V)
    inputs = [normal(N, D, scale=2), normal(V, D, seed=1, scale=D**-0.5)]
    return (
        lambda h, w: ops.sft_loss(h, w, target, 0.1)[0],
        lambda h, w: -0.1 * reference.linear_logprob(h, w, target).sum(),
        inputs,
    )


def dpo_case(P: int, kind: Kind = "sigmoid", label_smoothing: float = 0.0) -> Case:
    inputs = [*(normal(P, seed=i, scale=3) for i in range(4)), normal(P, seed=5).abs()]

    def plain(*columns: Tensor) -> Tensor:  # the loss is wide whatever the columns are
        wide = reference.accumulate_dtype(columns[0].dtype)
        columns = tuple(c.to(wide) for c in columns)
        return reference.weighted_dpo_loss(*columns, 0.2, kind, label_smoothing)[0]

    return lambda *x: ops.weighted_dpo_loss(*x, 0.2, kind, label_smoothing)[0], plain, inputs


def add_norm_case(*shape: int) -> Case:
    """Both results reach the loss, unevenly."""
    inputs = [normal(*shape), normal(*shape, seed=2), normal(shape[-1], seed=1)]

    def plain(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rms_norm(x + residual, w, 1e-3), x + residual

    return (
        lambda *x: torch.cat(ops.add_rms_norm(*x, 1e-3)),
        lambda *x: torch.cat(plain(*x)),
        inputs,
    )


def norm_case(*shape: int) -> Case:
    inputs = [normal(*shape), normal(shape[-1], seed=1)]
    return (
        lambda x, w: ops.rms_norm(x, w, 1e-3),
        lambda x, w: reference.rms_norm(x, w, 1e-3),
        inputs,
    )


def swiglu_case(*shape: int) -> Case:
    inputs = [normal(*shape, scale=2), normal(*shape, seed=1)]
    return lambda gate, up: ops.swiglu(torch.cat((gate, up), -1)), reference.swiglu, inputs


Parts = list[int | tuple[int, ...]]  # sequences: a length, or prompt and response lengths


def attention_case(
    parts: Parts, H: int, K: int, E: int, window: int | None, turned: bool = False
) -> Case:
    """turned: by a rotary embedding, which overwrites what it is given."""
    layout = Packed(parts)
    N = sum(layout.lengths)
    inputs = [torch.cat([normal(N, H, E, scale=2), normal(N, 2 * K, E, seed=1)], 1)]
    angles = normal(N, E // 2, seed=3, scale=5).float()
    rotary = angles.cos(), angles.sin()

    def plain(x: Tensor) -> Tensor:
        if turned:
            x = torch.cat((reference.rope(x[:, : H + K], *rotary), x[:, H + K :]), 1)
        return reference.pair_attention(x, H, layout.segments, window)

    return (
        lambda x: (
            ops.pair_attention(x.clone(), H, layout.segments, window, rotary)
            if turned
            else ops.pair_attention(x, H, layout.segments, window)
        ),
        plain,
        inputs,
    )


CASES = {
    "head, aligned": head_case(64, 32, 128),
    "head, ragged": head_case(37, 13, 101),
    "head, one row": head_case(1, 8, 33),
    "head, vocabulary": head_case(3, 8, 50_257),
    "pairs": pair_case([5, 3, 1, 6, 4, 4, 9, 2], 16, 101),
    "pairs, one": pair_case([1, 2], 8, 33),
    "pairs, vocabulary": pair_case([2, 1], 8, 49_152),
    **{
        f"pairs, {name}": pair_case([5, 3, 1, 6, 4, 4, 9, 2], 16, 101, options)
        for name, options in OPTIONS.items()
    },
    "sft": sft_case(35, 13, 101),
    "sft, one row": sft_case(1, 8, 33),
    "dpo": dpo_case(7),
    "dpo, one pair": dpo_case(1),
    "dpo, ipo": dpo_case(7, "ipo"),
    "dpo, smoothed": dpo_case(7, "sigmoid", 0.2),
    "add_rms_norm": add_norm_case(16, 64),
    "add_rms_norm, ragged": add_norm_case(3, 5, 33),
    "rms_norm": norm_case(16, 64),
    "rms_norm, ragged": norm_case(3, 5, 33),
    "rms_norm, one value": norm_case(1, 1),
    "swiglu": swiglu_case(16, 64),
    "swiglu, ragged": swiglu_case(3, 1, 77),
    "attention": attention_case([(16, 8, 8), (8, 16, 8)], 4, 4, 8, None),
    "rotary attention": attention_case([(16, 8, 8), (8, 16, 8)], 4, 2, 8, None, True),
    "rotary attention, ragged": attention_case([(7, 3, 9), 1], 6, 2, 10, 5, True),
    "attention, grouped": attention_case([(7, 3, 9), 19], 6, 2, 10, None),
    "attention, window": attention_case([19, (9, 6, 3), (3, 9, 8)], 4, 2, 8, 5),
    "attention, window of one": attention_case([(3, 2, 2), 1], 2, 1, 4, 1),
    "attention, window longer than the text": attention_case([7, (2, 3, 1)], 2, 1, 4, 8),
    "attention, one token": attention_case([1, (1, 1, 1)], 4, 2, 8, 3),
    "attention, many responses": attention_case([(8, 1, 2, 5, 12), 5], 4, 2, 8, 10),
    "attention, several tiles": attention_case([(210, 5, 401)], 3, 1, 8, 150),
}


@pytest.fixture(autouse=True, params=["eager", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of this file runs on both."""
    if request.param == "cpp" and not cpp.available():
        pytest.skip(f"no C++ backend: {cpp.why_not()}")
    monkeypatch.setenv("LDALIGN_BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head works through five rows of a vocabulary of 101 at a time."""
    monkeypatch.setattr(eager, "WORKSPACE_BYTES", 5 * 4 * 101 + 3)
    monkeypatch.setattr(cpp, "WORKSPACE_BYTES", 5 * 4 * 101 + 3)


def run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> list[Tensor]:
    """Returns the value and all inputs' gradients, under a random upstream one unless given."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    if upstream is None:
        upstream = normal(*out.shape, seed=9) * torch.linspace(
            0.1, 2, out.numel(), dtype=torch.float64
        ).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(
    function: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
) -> None:
    inputs = [x.to(dtype) for x in inputs]
    exact = run(eager, [x.double() for x in inputs])
    ours, theirs = run(function, inputs), run(eager, inputs)
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        what = f"gradient {i - 1}" if i else "value"
        assert a.shape == e.shape and a.dtype == b.dtype, what
        error, allowed = (a.double() - e).norm(), (b.double() - e).norm()
        if dtype == torch.float64:
            assert error <= 1e-12 * (1 + e.norm()), f"{what}: {error:.1e}"
        else:
            # Eager may happen to be exact, as with a window of one, where q and k have no gradient
            # at all.
            floor = (
                (4 if dtype == torch.float32 else 1)
                * torch.finfo(a.dtype).eps
                * max(x.norm() for x in exact)
            )
            assert error <= max((3 if i else 2) * allowed, floor), (
                f"{what}: {error:.1e} against {allowed:.1e}"
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_op_against_reference(name: str, dtype: torch.dtype) -> None:
    check(*CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_in_pieces_against_reference(dtype: torch.dtype, small_pieces: None) -> None:
    check(*CASES["head, ragged"], dtype)
    check(*head_case(120, 13, 101), dtype)  # 24 pieces
    check(*CASES["head, vocabulary"], dtype)  # one row is more than a piece may hold
    for name in OPTIONS:
        check(*CASES[f"pairs, {name}"], dtype)
    check(*CASES["pairs"], dtype)  # two pairs a piece, and pairs that are longer than a piece
    check(*CASES["sft"], dtype)


@pytest.mark.parametrize(
    "name", [n for n in CASES if "vocabulary" not in n and "aligned" not in n and "tiles" not in n]
)
def test_gradcheck(name: str) -> None:
    function, _, inputs = CASES[name]
    inputs = [
        x[:6].clone().requires_grad_() if x.shape[0] == 37 else x.clone().requires_grad_()
        for x in inputs
    ]
    if name == "head, ragged":
        target = targets(37, 101)[:6]
        function = lambda h, w: ops.linear_logprob(h, w, target)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


# the options of the loss change nothing but a number a response
PLAIN = [name for name in CASES if name.removeprefix("pairs, ") not in OPTIONS]


@pytest.mark.parametrize("name", [name for name in PLAIN if "vocabulary" not in name])
def test_strides_repeats_and_inputs(name: str, small_pieces: None) -> None:
    """Any strides, an expanded upstream gradient, the same bits each time, and
    nothing written to an input.
    """
    function, _, inputs = CASES[name]
    inputs = [x.float() for x in inputs]
    kept = [x.clone() for x in inputs]
    expanded = torch.tensor(0.7).expand(function(*inputs).shape)
    first = run(function, inputs, expanded)
    spread = [torch.stack([x, x + 1], -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in spread if x.numel() > 1)
    leaves = [x.requires_grad_() for x in spread]
    out = function(*leaves)
    others = [out.detach(), *torch.autograd.grad(out, leaves, expanded.contiguous())]
    for a, b, c in zip(first, others, run(function, inputs, expanded), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert torch.equal(a, c), "not the same bits twice"
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))
    with torch.no_grad():
        assert torch.equal(function(*inputs), first[0])


# ----------------------------------------------------------------------------------- linear_logprob


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation makes; a view of one that it was given is not made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_head_makes_no_logits_of_all_rows(small_pieces: None) -> None:
    N, D, V = 200, 4, 101
    with Largest() as seen:
        run(
            lambda h, w: ops.linear_logprob(h, w, targets(N, V)),
            [normal(N, D).float(), normal(V, D).float()],
        )
    assert seen.elements <= max(N * D, V * D, 5 * V)
    with Largest() as seen:
        reference.linear_logprob(normal(N, D), normal(V, D), targets(N, V))
    assert seen.elements == N * V, "the watch itself works"


@pytest.mark.parametrize("name", ["pairs", "sft"])
def test_backward_of_a_fused_loss_makes_nothing(name: str) -> None:
    """Both gradients are there after the forward: not even zeros of their size
    are made in the backward.
    """
    function, _, inputs = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    with Largest() as seen:
        torch.autograd.grad(loss, leaves)
    assert seen.elements <= 1


@pytest.mark.parametrize("which", [0, 1])
def test_head_with_one_side_frozen(which: int, small_pieces: None) -> None:
    function, _, inputs = CASES["head, ragged"]
    upstream = normal(37, seed=4)
    both = run(function, inputs, upstream)
    leaves = [x.clone().requires_grad_(i == which) for i, x in enumerate(inputs)]
    function(*leaves).backward(upstream)
    assert leaves[1 - which].grad is None
    assert torch.equal(leaves[which].grad, both[1 + which])


def test_head_of_huge_logits(small_pieces: None) -> None:
    """Logits of +-1e4: exact values, finite gradients, and a target with no
    chance is -2e4, not -inf.
    """
    hidden = torch.tensor([[1e4], [-1e4]] * 6, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], *[[0.5]] * 99], requires_grad=True)
    logp = ops.linear_logprob(hidden, weight, torch.zeros(12, dtype=torch.int64))
    assert logp.tolist() == [0.0, -2e4] * 6
    logp.sum().backward()
    assert hidden.grad.flatten().tolist() == [0.0, 2.0] * 6
    assert weight.grad.isfinite().all()


def test_head_refuses_shapes_that_do_not_fit() -> None:
    h, w, t = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    for arguments in ((h, torch.ones(5, 2), t), (h, w, t[:3]), (h, w, t[:, None])):
        with pytest.raises(ValueError, match=r"expected \(N, D\), \(V, D\) and \(N,\)"):
            ops.linear_logprob(*arguments)


def test_segment_sum() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = ops.segment_sum(values, [2, 1, 2])
    assert sums.tolist() == [3.0, 4.0, 24.0]
    sums.backward(torch.tensor([1.0, -2.0, 0.5]))
    assert values.grad.tolist() == [1.0, 1.0, -2.0, 0.5, 0.5]
    assert ops.segment_sum(values[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="add up to 4, but there are 5"):
        ops.segment_sum(values, [2, 2])


# --------------------------------------------------------------------------------- the fused losses


def test_dpo_metrics_are_the_references() -> None:
    arguments = [normal(7, seed=i) for i in range(4)]
    arguments[0][2:4] = arguments[1][2:4] = arguments[2][2:4] = arguments[3][2:4] = 0  # ties
    loss, metrics = ops.weighted_dpo_loss(*arguments, normal(7, seed=5).abs(), 0.2)
    expected, expected_metrics = reference.weighted_dpo_loss(
        *arguments, normal(7, seed=5).abs(), 0.2
    )
    torch.testing.assert_close((loss, metrics), (expected, expected_metrics))
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("options", [DPO, *OPTIONS.values()], ids=str)
def test_pair_loss_gives_sums_and_metrics(options: LossOptions, small_pieces: None) -> None:
    """The rewards are those of whole responses with every option."""
    lengths, D, V = [5, 3, 1, 6, 4, 4], 8, 101
    hidden, weight, target = normal(23, D), normal(V, D, seed=1), targets(23, V)
    near, s = normal(6, seed=2) - 20, normal(3, seed=3).abs()
    hidden.requires_grad_()
    loss, sums, metrics = ops.pair_loss(
        hidden, weight, target, lengths, near, s, 0.3, 0.25, options
    )
    expected = ops.segment_sum(reference.linear_logprob(hidden, weight, target), lengths)
    torch.testing.assert_close(sums, expected.detach())
    plain, expected_metrics = reference.pair_loss(
        sums, near, torch.tensor(lengths), s, 0.3, options
    )
    torch.testing.assert_close(loss.detach(), 0.25 * plain)
    gaps = 0.3 * (sums - near)
    torch.testing.assert_close(metrics["rewards/margins"], gaps[0::2] - gaps[1::2])
    torch.testing.assert_close(metrics, expected_metrics)
    assert (
        loss.requires_grad
        and not sums.requires_grad
        and not any(v.requires_grad for v in metrics.values())
    )


def test_sft_loss_gives_log_probs() -> None:
    hidden, weight, target = normal(9, 4), normal(33, 4), targets(9, 33)
    loss, logp = ops.sft_loss(hidden, weight, target, 0.5)
    torch.testing.assert_close(logp, reference.linear_logprob(hidden, weight, target))
    torch.testing.assert_close(loss, -0.5 * logp.sum())


@pytest.mark.parametrize("name", ["pairs", "sft"])
@pytest.mark.parametrize("which", [0, 1])
def test_fused_loss_with_one_side_frozen(name: str, which: int) -> None:
    function, _, inputs = CASES[name]
    both = run(function, inputs, torch.tensor(1.5))
    leaves = [x.clone().requires_grad_(i == which) for i, x in enumerate(inputs)]
    function(*leaves).backward(torch.tensor(1.5, dtype=torch.float64))
    assert leaves[1 - which].grad is None
    assert torch.equal(leaves[which].grad, both[1 + which])


def test_no_gradient_no_second_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without grad mode the fused losses make log-probs and nothing else."""
    function, _, inputs = CASES["pairs"]
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        quiet = function(*leaves)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, function(*leaves).detach())


def test_ignored_targets_count_for_nothing(small_pieces: None) -> None:
    hidden, weight, target = normal(12, 4), normal(101, 4), targets(12, 101)
    for ignored in ([3, 7], list(range(12))):
        given = target.clone()
        given[ignored] = -100
        kept = torch.ones(12, dtype=torch.float64)
        kept[ignored] = 0
        upstream = normal(12, seed=4)
        ours = run(lambda h, w, t=given: ops.linear_logprob(h, w, t), [hidden, weight], upstream)
        plain = run(
            lambda h, w, k=kept: reference.linear_logprob(h, w, target) * k,
            [hidden, weight],
            upstream,
        )
        torch.testing.assert_close(ours, plain)
    inside = ops.linear_logprob(hidden, weight, target, ignore_index=int(target[0]))
    assert all((inside == 0) == (target == target[0]))


def test_nothing_at_all() -> None:
    hidden, weight = torch.ones(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0)
    for loss in (
        ops.linear_logprob(hidden, weight, none).sum(),
        ops.sft_loss(hidden, weight, none)[0],
        ops.pair_loss(hidden, weight, none, [], empty, empty, 0.1)[0],
    ):
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and gradients[0].shape == (0, 4) and not gradients[1].any()
    for out in (
        ops.rms_norm(hidden, weight[0], 1e-5),
        ops.swiglu(hidden),
        ops.pair_attention(hidden.view(0, 4, 1), 2, Packed([]).segments),
        ops.weighted_dpo_loss(*[empty] * 5, 1)[0],
    ):
        assert out.sum() == 0


@pytest.mark.parametrize("bad", [-1, 33, 10**12])
def test_targets_out_of_range_are_named(bad: int) -> None:
    hidden, weight, target = torch.ones(4, 3), torch.ones(33, 3), torch.tensor([1, 2, bad, bad])
    for call in (
        lambda: ops.linear_logprob(hidden, weight, target),
        lambda: ops.sft_loss(hidden, weight, target),
        lambda: ops.pair_loss(hidden, weight, target, [2, 2], torch.ones(2), torch.ones(1), 0.1),
    ):
        with pytest.raises(ValueError, match=rf"target {bad} of row 2 is not in \[0, 33\)"):
            call()


def test_mixed_dtypes_and_shapes_are_refused() -> None:
    h, w, t = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
    half = w.to(torch.bfloat16)
    ones = torch.ones(2)
    past_its_prompt = torch.tensor([[0, 2, 0, 0], [2, 4, 1, 3]])
    for match, call in {
        "hidden is torch.float32, weight torch.bfloat16": lambda: ops.linear_logprob(h, half, t),
        "target torch.int32": lambda: ops.sft_loss(h, w, t.int()),
        "3 lengths with sum 4": lambda: ops.pair_loss(
            h, w, t, [1, 1, 2], torch.ones(3), torch.ones(1), 0.1
        ),
        "2 lengths with sum 3": lambda: ops.pair_loss(
            h, w, t, [1, 2], torch.ones(2), torch.ones(1), 0.1
        ),
        r"pair_weight \(2,\)": lambda: ops.pair_loss(
            h, w, t, [2, 2], torch.ones(2), torch.ones(2), 0.1
        ),
        "pair_loss: kind='hinge' is neither sigmoid nor ipo": lambda: ops.pair_loss(
            h,
            w,
            t,
            [2, 2],
            ones,
            ones[:1],
            0.1,
            options=LossOptions("hinge"),  # type: ignore[arg-type]
        ),
        "pair_loss: nll=-1 must be 0 or more": lambda: ops.pair_loss(
            h, w, t, [2, 2], ones, ones[:1], 0.1, options=LossOptions(nll=-1)
        ),
        "label_smoothing=0.5 must be 0 or more, below 0.5": lambda: ops.weighted_dpo_loss(
            *[ones] * 5, 0.1, "sigmoid", 0.5
        ),
        "label_smoothing=0.1 is of kind=sigmoid, not of ipo": lambda: ops.weighted_dpo_loss(
            *[ones] * 5, 0.1, "ipo", 0.1
        ),
        "rms_norm: x": lambda: ops.rms_norm(h, half[0], 1e-5),
        "add_rms_norm: x": lambda: ops.add_rms_norm(h, h[:2], w[0], 1e-5),
        "swiglu: gate_up": lambda: ops.swiglu(h),
        "pair_attention: qkv": lambda: ops.pair_attention(
            torch.ones(4, 5, 2), 2, Packed([4]).segments
        ),
        "window 0": lambda: ops.pair_attention(torch.ones(4, 3, 2), 1, Packed([4]).segments, 0),
        "segments end at 4": lambda: ops.pair_attention(
            torch.ones(5, 3, 2), 1, Packed([4]).segments
        ),
        r"segment 1 is \(2, 4, 1, "
        r"3\)": lambda: ops.pair_attention(torch.ones(4, 3, 2), 1, past_its_prompt),
        "rope_: x": lambda: ops.rope_(torch.ones(2, 1, 6), torch.ones(2, 2), torch.ones(2, 2), 1),
        "rope_: x .*heads 2": lambda: ops.rope_(
            torch.ones(2, 1, 4), torch.ones(2, 2), torch.ones(2, 2), 2
        ),
        "expected five of": lambda: ops.weighted_dpo_loss(*[torch.ones(2)] * 4, torch.ones(3), 0.1),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_nan_comes_out_as_nan(name: str) -> None:
    function, _, inputs = CASES[name]
    for poisoned in range(len(inputs)):
        given = [x.float().clone() for x in inputs]
        given[poisoned].view(-1)[-1] = math.nan
        assert function(*given).isnan().any()


# ------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("name", [n for n in CASES if "," not in n or n == "pairs, ipo"])
def test_opcheck(name: str) -> None:
    """Schema and fake of the operators a case calls; the compiled block below
    covers autograd and tracing.
    """
    function, _, inputs = CASES[name]
    with Operators() as seen:
        run(function, [x.float() for x in inputs])
    assert seen.calls
    for operator, arguments in seen.calls:
        library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


class Operators(TorchDispatchMode):
    """Notes each call of an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ldalign":
            self.calls.append(
                (func, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args))
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_compiled_block_is_the_plain_one() -> None:
    """One graph, no break, same values and gradients."""
    cos, sin = normal(5, 2, seed=3).float().cos(), normal(5, 2, seed=3).float().sin()
    target, segments = targets(5, 33), Packed([(2, 2, 1)]).segments

    def block(x: Tensor, w: Tensor, table: Tensor) -> Tensor:
        normed, total = ops.add_rms_norm(x, x * 0.5, w, 1e-5)
        qkv = torch.cat((normed, normed), 1).view(5, 4, 4)
        seen = ops.pair_attention(qkv, 2, segments, None, (cos, sin)).flatten(1)
        return ops.pair_loss(
            ops.swiglu(torch.cat((seen, total), -1)),
            table,
            target,
            [3, 2],
            torch.ones(2),
            torch.ones(1),
            0.1,
        )[0]

    inputs = [normal(5, 8).float(), normal(8, seed=1).float(), normal(33, 8, seed=2).float()]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(run(compiled, inputs), run(block, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_rotary_attention_copies_nothing() -> None:
    """Queries and keys are turned where they stand, values stay, and so does the gradient."""
    (qkv,), angles = CASES["rotary attention"][2], normal(64, 4, seed=3)
    given, rotary = qkv.clone(), (angles.cos(), angles.sin())
    turned = torch.cat((reference.rope(qkv[:, :6], *rotary), qkv[:, 6:]), 1)
    leaf = qkv.clone().requires_grad_()
    segments = Packed([(16, 8, 8), (8, 16, 8)]).segments
    with Operators() as seen:
        out = ops.pair_attention(leaf, 4, segments, None, rotary)
        torch.autograd.grad(out, leaf, torch.ones_like(out))
    torch.testing.assert_close(leaf.detach(), turned)
    assert torch.equal(leaf[:, 6:], given[:, 6:])
    names = [operator.name() for operator, _ in seen.calls]
    assert names == [
        "ldalign::rope_",
        "ldalign::pair_attention",
        "ldalign::pair_attention_backward",
    ]


# ------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("window", [None, 1, 4])
def test_shared_prompts_are_separate_sequences(window: int | None) -> None:
    """[prompt | a | b] is [prompt | a] and [prompt | b], and the gradient of the
    prompt is the sum of both.
    """
    parts: list[int | tuple[int, ...]] = [(6, 3, 9), 5, (1, 4, 4), (2, 7), (8, 1, 2, 5)]
    packed = Packed(parts)
    shared: list[Tensor] = []  # for every separate sequence, where its tokens lie in the flat batch
    start = 0
    for sequence in parts:
        prompt, *responses = (sequence,) if isinstance(sequence, int) else sequence
        at = start + prompt
        for n in responses or [0]:
            shared.append(
                torch.cat([torch.arange(start, start + prompt), torch.arange(at, at + n)])
            )
            at += n
        start = at
    first = [i for i, rows in enumerate(shared) if i == 0 or shared[i - 1][0] != rows[0]]
    assert [packed.positions[rows].tolist() for rows in shared] == [
        list(range(len(rows))) for rows in shared
    ]

    def alone(qkv: Tensor) -> Tensor:
        out = torch.zeros_like(qkv[:, :4])
        for i, rows in enumerate(shared):
            one = reference.pair_attention(qkv[rows], 4, Packed([len(rows)]).segments, window)
            keep = torch.ones(len(rows), dtype=torch.bool)
            if i not in first:  # the prompt's own output counts once
                keep = ~torch.isin(rows, shared[i - 1])
            out = out.index_copy(0, rows[keep], one[keep])
        return out

    inputs = [normal(start, 8, 6, scale=1.5)]
    ours, theirs = run(lambda x: packed.attend(0, x, 4, window, None), inputs), run(alone, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_packed_positions_and_refusals() -> None:
    assert Packed([3, 1, 2]).positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert Packed([(2, 3, 1), 2]).positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    for lengths in ([3, 0], [(2, 0)], [-1]):
        with pytest.raises(ValueError, match="needs at least one token"):
            Packed(lengths)


# ----------------------------------------------------------------------------------------- backends


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDALIGN_BACKEND", "cuda-fast")
    with pytest.raises(
        EnvironmentProblem, match="'cuda-fast' is unknown; choose auto or cpp, triton, cuda, eager"
    ):
        ops.swiglu(torch.ones(2))


def test_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "available", lambda: False)
    monkeypatch.setattr(cpp, "why_not", lambda: "the extension is not built")
    monkeypatch.setenv("LDALIGN_BACKEND", "cpp")
    ops._choose.cache_clear()
    with pytest.raises(
        EnvironmentProblem,
        match="LDALIGN_BACKEND=cpp: not available here: the extension is not built",
    ):
        ops.swiglu(torch.ones(2))
    monkeypatch.setenv("LDALIGN_BACKEND", "auto")
    assert ops.choose("swiglu", "cpu") == "eager"
    ops._choose.cache_clear()


def test_choice_is_logged_once(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ops._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="ldalign.ops"):
        for _ in range(2):
            ops.swiglu(torch.ones(2))
    assert [r.getMessage() for r in caplog.records] == [
        f"ops: swiglu on cpu: {backend} (LDALIGN_BACKEND={backend})"
    ]
