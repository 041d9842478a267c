"""The options of the loss: the plain equations, the fused loss held to them, and TRL's formulas."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldalign import ops
from ldalign.kernels import cpp, eager, reference
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.objective import (
    dpo_coefficient,
    dpo_loss,
    ipo_loss,
    optional_loss,
    preference_loss,
    smoothed_dpo_loss,
    winner_nll,
)

D, V = 5, 23
# Every combination there is of options on and off.
COMBINATIONS = [
    LossOptions(kind, nll, smoothing, normalised)
    for kind, nll, smoothing, normalised in product(
        ("sigmoid", "ipo"), (0.0, 0.7), (0.0, 0.15), (False, True)
    )
    if not (kind == "ipo" and smoothing)
]


@pytest.fixture(params=["eager", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU's backends, a few rows of logits at a time: pairs in pieces, and longer than one."""
    if request.param == "cpp" and not cpp.available():
        pytest.skip(f"no C++ backend: {cpp.why_not()}")
    module = {"eager": eager, "cpp": cpp}[request.param]
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 6 * V * 8)
    monkeypatch.setenv("LDALIGN_BACKEND", request.param)
    return module


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equations(
    sums: Tensor,
    references: Tensor,
    lengths: list[int],
    weights: Tensor,
    beta: float,
    options: LossOptions,
) -> Tensor:
    """`objective.optional_loss` (P,) of responses in turn; an empty one has one token."""
    tokens = torch.tensor(lengths, dtype=sums.dtype).clamp(min=1)
    logps, near, n = ((x[0::2], x[1::2]) for x in (sums, references, tokens))
    return optional_loss(logps, near, n, weights, beta, options)


# ---------------------------------------------------------------------------------- the equations


def test_by_hand() -> None:
    delta, s = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    assert ipo_loss(delta, s, 0.25).tolist() == [2.0, 4.5]  # 2 (3 - 2)^2, 0.5 (-1 - 2)^2
    right, wrong = math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(0.75))
    smoothed = smoothed_dpo_loss(delta, s, 0.25, 0.1)[0].item()
    assert smoothed == pytest.approx(2 * (0.9 * right + 0.1 * wrong))
    assert winner_nll(torch.tensor([-6.0]), torch.tensor([4.0])).item() == 1.5
    assert torch.equal(preference_loss(delta, s, 0.25), dpo_loss(delta, s, 0.25))


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_the_coefficients_are_the_gradients(options: LossOptions) -> None:
    """-beta s (sigmoid(-beta Delta) - e), or 2 s (Delta - 1/(2 beta)), over the response's tokens
    where the margin is of log-probs a token; and - nll / |y| of the winner. docs/kernels.md.
    """
    lengths, beta, s = [2, 5, 7, 3], 0.7, numbers(2, seed=5).abs()
    sums, near, n = numbers(4).requires_grad_(), numbers(4, seed=1), torch.tensor(lengths)
    loss = equations(sums, near, lengths, s, beta, options)
    (gradient,) = torch.autograd.grad(loss.sum(), sums)
    per = n if options.length_normalised else torch.ones(4)
    gap = ((sums - near) / per).detach()
    delta = gap[0::2] - gap[1::2]
    if options.kind == "ipo":
        pull = 2 * s * (delta - 1 / (2 * beta))
    else:
        pull = dpo_coefficient(delta, s, beta) + beta * s * options.label_smoothing
    assert torch.allclose(gradient[0::2], pull / per[0::2] - options.nll / n[0::2])
    assert torch.allclose(gradient[1::2], -pull / per[1::2])


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_the_reference_is_these_equations(options: LossOptions) -> None:
    lengths, s = [2, 5, 0, 3, 4, 4], torch.tensor([0.0, 0.4, 2.6], dtype=torch.float64)
    sums, near = numbers(6), numbers(6, seed=1)
    loss, metrics = reference.pair_loss(sums, near, torch.tensor(lengths), s, 0.7, options)
    assert torch.allclose(loss, equations(sums, near, lengths, s, 0.7, options).sum())
    alone = options._replace(nll=0.0)
    unweighted = equations(sums, near, lengths, torch.ones_like(s), 0.7, alone)
    assert torch.allclose(metrics["loss"], unweighted)


# -------------------------------------------------------------------------------- the fused loss

SHAPES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)
OPTIONS = st.builds(
    LossOptions,
    st.just("sigmoid"),
    st.just(0.0) | st.floats(0.01, 3),
    st.just(0.0) | st.floats(0.01, 0.49),
    st.booleans(),
) | st.builds(
    LossOptions,
    st.just("ipo"),
    st.just(0.0) | st.floats(0.01, 3),
    st.just(0.0),
    st.booleans(),
)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=SHAPES,
    options=OPTIONS,
    beta=st.floats(0.02, 5),
    scale=st.floats(0.01, 2),
    seed=st.integers(0, 999),
)
def test_the_fused_loss_is_these_equations(
    backend: Any,
    shapes: list[tuple[int, int]],
    options: LossOptions,
    beta: float,
    scale: float,
    seed: int,
) -> None:
    """Loss, sums and both gradients, from hidden states, against autograd of the equations in
    float64: lengths, weights (of 0 too), beta and options drawn.
    """
    lengths = [n for pair in shapes for n in pair]
    N, P = sum(lengths), len(shapes)
    hidden = numbers(N, D, seed=seed).requires_grad_()
    weight = numbers(V, D, seed=seed + 1).requires_grad_()
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    s = numbers(P, seed=seed + 2).clamp(min=0)
    logp = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), target]
    plain = torch.stack([run.sum() for run in logp.split(lengths)])
    near = plain.detach() + 2 * numbers(2 * P, seed=seed + 3)

    loss, sums, metrics = ops.pair_loss(
        hidden, weight, target, lengths, near, s, beta, scale, options
    )
    expected = scale * equations(plain, near, lengths, s, beta, options).sum()
    close = {"rtol": 1e-9, "atol": 1e-9 * (1 + 1 / beta**2)}  # ipo has sizes of 1 / beta^2
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(sums, plain.detach(), **close)
    fused = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(fused, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, **close)
    unweighted = equations(plain, near, lengths, torch.ones(P), beta, options._replace(nll=0.0))
    torch.testing.assert_close(metrics["loss"], unweighted.detach(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_is_dpo_to_the_bit(
    dtype: torch.dtype, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of log-probs whose upstream is -+ scale beta s sigmoid(-beta Delta),
    worked out here as it was before there were options, and the loss -s log sigmoid(beta Delta).
    """
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 2**20)
    lengths, N, beta, scale = [3, 5, 1, 4, 6, 2], 21, 0.3, 0.7
    hidden = numbers(N, D).to(dtype).requires_grad_()
    weight = numbers(V, D, seed=1).to(dtype).requires_grad_()
    target = torch.arange(N) % V
    near, s = (numbers(6, seed=2) - 10).float(), numbers(3, seed=3).abs().float()
    given = hidden, weight, target, lengths, near, s, beta, scale
    loss, sums, metrics = ops.pair_loss(*given)
    fused = torch.autograd.grad(loss, [hidden, weight])

    if backend is cpp:  # which works the coefficient out in float64
        gap = sums.double() - near.double()
        delta = gap[0::2] - gap[1::2]
        c = -scale * beta * s.double() * torch.sigmoid(-beta * delta)
    else:
        gap = beta * (sums - near)
        c = -beta * s * torch.sigmoid(gap[1::2] - gap[0::2]) * scale
    rows = torch.stack((c, -c), 1).flatten().float().repeat_interleave(torch.tensor(lengths))
    lse = backend.linear_logprob(hidden.detach(), weight.detach(), target)[1]
    plain = backend.linear_logprob_backward(
        rows, hidden.detach(), weight.detach(), target, lse, True, True
    )
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    torch.testing.assert_close(metrics["loss"], -F.logsigmoid(metrics["rewards/margins"]))
    torch.testing.assert_close(loss.detach(), scale * (s * metrics["loss"]).sum())
    again = ops.pair_loss(*given, options=LossOptions("sigmoid", 0.0, 0.0, False))[0]
    assert torch.equal(again, loss)


# ----------------------------------------------------------------------------------------- TRL's


def trl(
    logp: Tensor, near: Tensor, lengths: list[int], beta: float, loss: str, smoothing: float = 0.0
) -> Tensor:
    """The loss () of TRL's `DPOTrainer` by the formulas of its version 1.16 (label smoothing of
    `sigmoid` as in older ones), from log-probs a token (N,) in turn, padded to (2P, T) with a mask.
    """
    order = [*range(0, len(lengths), 2), *range(1, len(lengths), 2)]  # all chosen, then rejected
    runs = logp.split(lengths)
    per_token = torch.nn.utils.rnn.pad_sequence([runs[i] for i in order], batch_first=True)
    mask = torch.zeros_like(per_token)
    for row, i in enumerate(order):
        mask[row, : lengths[i]] = 1
    chosen, rejected = ((per_token * mask).sum(1) - near[order]).chunk(2)
    chosen_tokens, rejected_tokens = mask.sum(1).chunk(2)
    if loss == "sft":
        return -per_token.chunk(2)[0][mask.chunk(2)[0].bool()].mean()
    if loss in ("ipo", "sigmoid_norm"):
        delta = chosen / chosen_tokens.clamp(min=1) - rejected / rejected_tokens.clamp(min=1)
    else:
        delta = chosen - rejected
    if loss == "ipo":
        return ((delta - 1 / (2 * beta)) ** 2).mean()
    right, wrong = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
    return (-right * (1 - smoothing) - wrong * smoothing).mean()


def test_trls_losses_are_these(backend: Any) -> None:
    """`ipo` and `sigmoid_norm` are of log-probs a token; `rpo_alpha`, now the loss `sft` beside
    `sigmoid`, is a mean over the batch's tokens, ours over its winners: equal where the winners are
    of one length.
    """
    lengths, beta, near = [4, 3, 4, 6, 4, 1], 0.4, numbers(6, seed=2) - 12
    hidden, weight = numbers(22, D), numbers(V, D, seed=1)
    target = torch.arange(22) % V
    logp = reference.linear_logprob(hidden, weight, target)

    def ours(options: LossOptions) -> Tensor:
        ones = torch.ones(3, dtype=torch.float64)
        return ops.pair_loss(hidden, weight, target, lengths, near, ones, beta, 1 / 3, options)[0]

    def theirs(loss: str, smoothing: float = 0.0) -> Tensor:
        return trl(logp, near, lengths, beta, loss, smoothing)

    for options, expected in {
        DPO: theirs("sigmoid"),
        LossOptions(label_smoothing=0.1): theirs("sigmoid", 0.1),
        LossOptions("ipo", length_normalised=True): theirs("ipo"),
        LossOptions(length_normalised=True): theirs("sigmoid_norm"),
        LossOptions(nll=0.8): theirs("sigmoid") + 0.8 * theirs("sft"),
    }.items():
        torch.testing.assert_close(ours(options), expected)
