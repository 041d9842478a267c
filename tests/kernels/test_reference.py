"""The reference maths against independent oracles: loops, complex numbers, hand-worked numbers.

All in float64 unless the dtype is the point. Upstream gradients are random and
uneven, weights are never ones.
"""

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldalign.kernels import reference
from ldalign.kernels.loss_options import LossOptions
from ldalign.models.layout import Packed


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    values = torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64
    )
    return (values * scale).to(dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """assert_close, which fails on NaN in either."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------- linear_logprob

# (N, D, V): aligned, ragged, one row, vocabulary
HEAD_SHAPES = [(8, 16, 32), (7, 13, 101), (1, 5, 3), (3, 4, 49_152)]


@pytest.mark.parametrize("shape", HEAD_SHAPES)
def test_linear_logprob_is_the_log_of_a_share(shape: tuple[int, int, int]) -> None:
    N, D, V = shape
    hidden, weight = normal(N, D), normal(V, D, seed=1)
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    logp = reference.linear_logprob(hidden, weight, target)
    for n in range(N):
        scores = [math.exp(z) for z in (weight @ hidden[n]).tolist()]
        assert logp[n].item() == pytest.approx(
            math.log(scores[target[n]] / math.fsum(scores)), abs=1e-11
        )


def test_linear_logprob_gradient_is_onehot_minus_softmax() -> None:
    hidden, weight = normal(5, 4).requires_grad_(), normal(9, 4, seed=1).requires_grad_()
    target, upstream = torch.tensor([0, 8, 3, 3, 1]), normal(5, seed=3)
    reference.linear_logprob(hidden, weight, target).backward(upstream)
    z = (hidden @ weight.T).detach()
    dz = upstream[:, None] * (
        torch.eye(9, dtype=torch.float64)[target] - z.exp() / z.exp().sum(1, keepdim=True)
    )
    close(hidden.grad, dz @ weight.detach())
    close(weight.grad, dz.T @ hidden.detach())
    assert torch.autograd.gradcheck(
        lambda h, w: reference.linear_logprob(h, w, target), (hidden, weight)
    )


def test_linear_logprob_of_huge_logits() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logp = reference.linear_logprob(hidden, weight, torch.tensor([0, 0]))
    close(logp, torch.tensor([0.0, -2e4]))
    logp.sum().backward()
    close(hidden.grad, torch.tensor([[0.0], [2.0]]))  # d(z_0 - z_1) / dh = 1 - (-1)


def test_linear_logprob_of_bf16_is_summed_in_float32() -> None:
    """Over 4,096 tokens the log-sum-exp's own error is far below one bf16
    rounding of the logits.
    """
    hidden, weight = (
        normal(6, 16, dtype=torch.bfloat16),
        normal(4096, 16, seed=1, dtype=torch.bfloat16),
    )
    target = torch.arange(6)
    logp = reference.linear_logprob(hidden, weight, target)
    assert logp.dtype == torch.float32
    rounded = (hidden @ weight.T).double()  # the product itself is rounded to bf16, by definition
    expected = rounded.gather(1, target[:, None])[:, 0] - rounded.logsumexp(1)
    close(logp.double(), expected, 1e-5)


# -------------------------------------------------------------------------------- weighted_dpo_loss


def test_dpo_worked_by_hand() -> None:
    """beta 0.5. Pair 1: chosen 0.5 (-1 + 3) = 1, rejected 0.5 (-4 + 2) = -1, margin 2. Pair 2: 0
    and 0.5, margin -0.5.

    Loss: 3 ln(1 + e^-2) + 0.25 ln(1 + e^0.5) = 3 x 0.126928 + 0.25 x 0.974077 = 0.624303.
    """
    real, generated = torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -6.0])
    ref_real, ref_generated = torch.tensor([-3.0, -5.0]), torch.tensor([-2.0, -7.0])
    loss, metrics = reference.weighted_dpo_loss(
        real, generated, ref_real, ref_generated, torch.tensor([3.0, 0.25]), 0.5
    )
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.624303, abs=2e-6)
    expected = {
        "loss": [0.126928, 0.974077],
        "rewards/chosen": [1.0, 0.0],
        "rewards/rejected": [-1.0, 0.5],
        "rewards/margins": [2.0, -0.5],
        "rewards/accuracies": [1.0, 0.0],
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name].tolist() == pytest.approx(values, abs=1e-6), name


def test_dpo_gradient_formula() -> None:
    inputs = [normal(6, seed=i).requires_grad_(i < 2) for i in range(4)]
    weight, beta = normal(6, seed=9).abs(), 0.3
    weight[2] = 0
    loss, metrics = reference.weighted_dpo_loss(*inputs, weight, beta)
    loss.backward()
    real, generated, ref_real, ref_generated = (x.detach() for x in inputs)
    delta = (real - ref_real) - (generated - ref_generated)
    expected = -beta * weight / (1 + (beta * delta).exp())  # -beta s sigmoid(-beta Delta)
    close(inputs[0].grad, expected)
    close(inputs[1].grad, -expected)
    assert not any(value.requires_grad for value in metrics.values())
    check = [x.detach().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: reference.weighted_dpo_loss(*x, weight, beta)[0], check
    )


def test_dpo_at_the_start_and_at_the_ends() -> None:
    """Policy = reference: loss ln 2, accuracy one half. Margins of +-1e4: loss 0
    and 1e4, finite gradients.
    """
    logp = torch.tensor([-7.0, -7.0])
    loss, metrics = reference.weighted_dpo_loss(logp, logp, logp, logp, torch.ones(2), 0.1)
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert metrics["rewards/accuracies"].tolist() == [0.5, 0.5]
    real, zero = torch.tensor([1e4, -1e4], requires_grad=True), torch.zeros(2)
    loss, metrics = reference.weighted_dpo_loss(real, zero, zero, zero, torch.ones(2), 1.0)
    loss.backward()
    assert metrics["loss"].tolist() == [0.0, 1e4]
    assert real.grad.tolist() == [0.0, -1.0]


def test_other_losses_worked_by_hand() -> None:
    """beta 0.5, one pair of weight 3: sums -6 and -8 over 2 and 4 tokens, the reference's -8 and
    -4. Delta = 2 - (-4) = 6, a token 1 - (-1) = 2, so x = 3 and 1. l is 3 x

    ipo (6 - 1)^2 = 25, smoothed ln(1 + e^-3) + 0.2 x 3 = 0.648587, a token ln(1 + e^-1) = 0.313262,
    ipo a token (2 - 1)^2 = 1; the NLL is 6 / 2 = 3 nats a token whatever the weight.
    """
    sums, near = torch.tensor([-6.0, -8.0]), torch.tensor([-8.0, -4.0])
    tokens, weight = torch.tensor([2, 4]), torch.tensor([3.0])
    for options, expected in {
        LossOptions("ipo"): 25.0,
        LossOptions(label_smoothing=0.2): 0.648587,
        LossOptions(length_normalised=True): 0.313262,
        LossOptions("ipo", length_normalised=True): 1.0,
    }.items():
        for nll in (0.0, 0.5):
            given = options._replace(nll=nll)
            loss, metrics = reference.pair_loss(sums, near, tokens, weight, 0.5, given)
            assert loss.item() == pytest.approx(3 * expected + 3 * nll, rel=1e-6)
            assert metrics["loss"].item() == pytest.approx(expected, rel=1e-6)
            assert metrics["rewards/chosen"].item() == 1.0
            assert metrics["rewards/rejected"].item() == -2.0


def test_an_empty_response_counts_as_one_of_one_token() -> None:
    sums, near = torch.tensor([0.0, -3.0]), torch.tensor([-2.0, -3.0])
    options = LossOptions("ipo", nll=1.0, length_normalised=True)
    loss, _ = reference.pair_loss(sums, near, torch.tensor([0, 3]), torch.ones(1), 0.5, options)
    assert loss.item() == 1.0  # (2 - 0 - 1)^2, and an NLL of 0


# --------------------------------------------------------------------------- rms_norm, rope, swiglu


@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 7), (1, 1)])
def test_rms_norm_against_a_loop(shape: tuple[int, ...]) -> None:
    x, weight, eps = normal(*shape), normal(shape[-1], seed=1), 0.1
    y = reference.rms_norm(x, weight, eps).flatten(0, -2)
    for row, out in zip(x.flatten(0, -2).tolist(), y.tolist(), strict=True):
        rms = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        assert out == pytest.approx(
            [v / rms * w for v, w in zip(row, weight.tolist(), strict=True)], abs=1e-12
        )
    assert torch.autograd.gradcheck(
        lambda a, b: reference.rms_norm(a, b, eps), (x.requires_grad_(), weight.requires_grad_())
    )


def test_rms_norm_of_extremes() -> None:
    weight = torch.tensor([0.5, -2.0])
    assert reference.rms_norm(torch.zeros(1, 2), weight, 1e-6).tolist() == [[0.0, 0.0]]
    big = torch.full((1, 2), 1e4, dtype=torch.float16)  # its square is beyond float16
    close(
        reference.rms_norm(big, weight.half(), 1e-6),
        torch.tensor([[0.5, -2.0]], dtype=torch.float16),
        1e-3,
    )


def test_rope_is_a_product_of_complex_numbers() -> None:
    N, H, E = 5, 3, 6
    x, angles = normal(N, H, E), normal(N, E // 2, seed=1, scale=3)
    y = reference.rope(x, angles.cos(), angles.sin())
    for n in range(N):
        for h in range(H):
            for e in range(E // 2):
                turned = complex(x[n, h, e], x[n, h, e + E // 2]) * cmath.exp(
                    1j * angles[n, e].item()
                )
                assert (y[n, h, e].item(), y[n, h, e + E // 2].item()) == pytest.approx(
                    (turned.real, turned.imag), abs=1e-12
                )
    assert torch.autograd.gradcheck(
        lambda a: reference.rope(a, angles.cos(), angles.sin()), (x.requires_grad_(),)
    )


def test_rope_products_depend_on_distance_alone() -> None:
    q, k = normal(1, 1, 8), normal(1, 1, 8, seed=1)
    theta = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)

    def score(i: int, j: int) -> float:
        a, b = (
            reference.rope(x, (p * theta)[None].cos(), (p * theta)[None].sin())
            for x, p in ((q, i), (k, j))
        )
        return (a * b).sum().item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-10)
    assert score(7, 3) != pytest.approx(score(3, 7), abs=1e-3)


def test_rope_keeps_the_wider_dtype() -> None:
    """float64 states are not rounded to the float32 tables; bf16 states are turned in
    float32 and rounded once.
    """
    angles = normal(4, 3, scale=3).float()
    cos, sin = angles.cos(), angles.sin()
    x = normal(4, 2, 6)
    y = reference.rope(x, cos, sin)
    assert y.dtype == torch.float64
    close(y, reference.rope(x, cos.double(), sin.double()))
    half = x.bfloat16()
    assert torch.equal(
        reference.rope(half, cos, sin), reference.rope(half.float(), cos, sin).bfloat16()
    )


def test_swiglu() -> None:
    gate, up = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    y = reference.swiglu(gate, up)
    for g, u, out in zip(
        gate.flatten().tolist(), up.flatten().tolist(), y.flatten().tolist(), strict=True
    ):
        assert out == pytest.approx(g / (1 + math.exp(-g)) * u, abs=1e-12)
    assert torch.autograd.gradcheck(reference.swiglu, (gate, up))
    ends = torch.tensor([1e4, -1e4], requires_grad=True)
    out = reference.swiglu(ends, torch.tensor([2.0, 3.0]))
    out.sum().backward()
    assert out.tolist() == [2e4, 0.0]
    assert ends.grad.tolist() == [2.0, 0.0]
    assert reference.swiglu(ends.bfloat16(), ends.bfloat16()).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------- attention


PARTS = [(4, 3, 2), 5, (1, 1, 6, 2)]  # prompt and responses of each sequence


def qkv_of(tokens: int, H: int, K: int) -> Tensor:
    return torch.cat([normal(tokens, H, 4, scale=2), normal(tokens, 2 * K, 4, seed=1)], 1)


def attention_by_hand(qkv: Tensor, H: int, parts: list[Any], window: int | None) -> Tensor:
    """Response by response, one query, one head at a time."""
    K = (qkv.shape[1] - H) // 2
    out = torch.zeros(len(qkv), H, qkv.shape[2], dtype=qkv.dtype)
    start = 0
    for sequence in parts:
        prompt, *responses = (sequence,) if isinstance(sequence, int) else sequence
        after = start + prompt
        for length in responses or [0]:
            tokens = [*range(start, start + prompt), *range(after, after + length)]
            after += length
            for position, token in enumerate(tokens):
                seen = tokens[max(0, position - window + 1) if window else 0 : position + 1]
                for h in range(H):
                    shared = H + h // (H // K)  # query heads 0 .. H/K - 1 share key head 0
                    shares = [
                        math.exp(torch.dot(qkv[token, h], qkv[j, shared]).item() / 2) for j in seen
                    ]  # sqrt(4)
                    out[token, h] = sum(
                        share / math.fsum(shares) * qkv[j, shared + K]
                        for share, j in zip(shares, seen, strict=True)
                    )
        start = after
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_attention_against_a_loop(heads: tuple[int, int], window: int | None) -> None:
    layout = Packed(PARTS)
    qkv = qkv_of(sum(layout.lengths), *heads)
    ours = reference.pair_attention(qkv, heads[0], layout.segments, window)
    close(ours, attention_by_hand(qkv, heads[0], PARTS, window))


@pytest.mark.parametrize("window", [None, 2])
def test_attention_gradient(window: int | None) -> None:
    layout = Packed([(2, 2, 1), 3])
    inputs = qkv_of(8, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reference.pair_attention(x, 4, layout.segments, window), inputs
    )


def test_attention_of_one_token_and_of_huge_scores() -> None:
    one = qkv_of(1, 2, 1)
    close(reference.pair_attention(one, 2, Packed([1]).segments), one[:, 3:].expand(1, 2, 4))
    q = torch.full((3, 1, 4), 100.0)
    k = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 1, 4) * 100  # scores +-2e4
    v = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1).expand(3, 1, 4)
    out = reference.pair_attention(torch.cat([q, k, v], 1), 1, Packed([3]).segments)
    assert out[:, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert reference.pair_attention(q[:0].expand(0, 3, 4), 1, Packed([]).segments).shape == (
        0,
        1,
        4,
    )


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_the_optimizers_are_torchs(name: str) -> None:
    """Five steps with decay, in float64, of gradients that come times a factor."""
    p, factor = normal(7, 3), torch.tensor(0.3, dtype=torch.float64)
    weight, averages = torch.nn.Parameter(p.clone()), [torch.zeros_like(p)] * 2
    peer: torch.optim.Optimizer
    if name == "adamw":
        peer = torch.optim.AdamW([weight], 0.1, (0.8, 0.97), 1e-3, 0.2)
    else:
        peer = torch.optim.RMSprop([weight], 0.1, 0.97, 1e-3, 0.2)
    for step in range(1, 6):
        grad = normal(7, 3, seed=step)
        weight.grad = grad * factor
        peer.step()
        if name == "adamw":
            p, *averages = reference.adamw(
                p, grad, *averages, factor, 0.1, 0.2, 0.8, 0.97, 1e-3, step
            )
        else:
            p, *averages = reference.rmsprop(p, grad, averages[0], factor, 0.1, 0.2, 0.97, 1e-3)
    close(p, weight.detach())


def test_inputs_are_left_as_they_were_and_results_repeat() -> None:
    q, k, v = normal(2, 5, 4, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    hidden, weight, target = normal(5, 4), normal(9, 4, seed=1), torch.tensor([0, 8, 3, 3, 1])
    angles = normal(5, 2)
    calls = [
        (
            lambda x: reference.pair_attention(x, 4, Packed([(2, 2, 1)]).segments),
            (torch.cat([q[0], k[0], v[0]], 1),),
        ),
        (reference.linear_logprob, (hidden, weight, target)),
        (reference.rope, (q[0], angles.cos(), angles.sin())),
        (reference.swiglu, (q, q + 1)),
    ]
    for function, arguments in calls:
        before = [a.clone() for a in arguments]
        first = function(*arguments)
        assert torch.equal(first, function(*arguments)), function
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), function
        # the same numbers, every stride doubled
        spread = [torch.stack([a, a], -1)[..., 0] for a in arguments]
        torch.testing.assert_close(function(*spread), first, rtol=1e-12, atol=1e-12)
