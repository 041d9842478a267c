"""The objective's page: each equation by hand, and the fused losses of training held to it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldalign import ops
from ldalign.kernels import reference
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import GuideConfig
from ldalign.models.guide_folder import new_guide
from ldalign.objective import (
    distance_weights,
    dpo_coefficient,
    dpo_loss,
    latent_distance,
    margin,
    reconstruction_loss,
)
from ldalign.system.seeds import uniforms
from ldalign.training.guide import accumulate_gradients

LENGTHS = [3, 5, 1, 4, 6, 2]  # of three pairs: real, generated, real, ...
WEIGHTS = [0.0, 0.4, 2.6]  # uneven, one of them none


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    assert reconstruction_loss(torch.tensor([-1.0, -2.0, -6.0])) == 3.0
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert latent_distance(a, b).tolist() == [5.0, 0.0]
    assert latent_distance(a, b, "cosine").tolist() == [1.0, 0.0]
    # The third pair is not kept: it has no weight and no part in the mean, which is 2.
    weights = distance_weights(torch.tensor([1.0, 3.0, 5.0]), [True, True, False])
    assert weights.tolist() == [0.5, 1.5, 0.0]
    one = [torch.tensor([value]) for value in (-10.0, -12.0, -11.0, -11.5)]
    assert margin(*one).tolist() == [1.5]
    delta, s = torch.tensor([1.5]), torch.tensor([2.0])
    assert dpo_loss(delta, s, 0.2).item() == pytest.approx(2 * math.log(1 + math.exp(-0.3)))
    slope = dpo_coefficient(delta, s, 0.2).item()
    assert slope == pytest.approx(-0.4 / (1 + math.exp(0.3)))


def test_a_step_begins_at_ln_2_a_unit_of_weight() -> None:
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    loss = dpo_loss(torch.zeros(3, dtype=torch.float64), weights, 0.3)
    assert torch.allclose(loss, weights * math.log(2))


def test_coefficient_is_the_gradient() -> None:
    logps = [numbers(3, seed=i).requires_grad_() for i in range(2)]
    references = [numbers(3, seed=i) for i in (2, 3)]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    delta = margin(*logps, *references)
    real, generated = torch.autograd.grad(dpo_loss(delta, weights, 0.7).sum(), logps)
    assert torch.allclose(real, dpo_coefficient(delta, weights, 0.7))
    assert torch.equal(generated, -real)


@pytest.mark.parametrize("op", [reference.weighted_dpo_loss, ops.weighted_dpo_loss])
def test_weighted_dpo_is_this_loss(op) -> None:
    given = [numbers(3, seed=i) for i in range(4)]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    loss, metrics = op(*given, weights, 0.7)
    assert torch.allclose(loss, dpo_loss(margin(*given), weights, 0.7).sum())
    assert torch.allclose(metrics["rewards/margins"], 0.7 * margin(*given))


def test_pair_loss_is_this_loss() -> None:
    """The fused head: loss and both gradients, from hidden states to log-probs to the equations."""
    N, D, V = sum(LENGTHS), 8, 11
    hidden, weight = numbers(N, D).requires_grad_(), numbers(V, D, seed=1).requires_grad_()
    target = torch.arange(N) % V
    references, weights = numbers(6, seed=2), torch.tensor(WEIGHTS, dtype=torch.float64)
    loss, sums, _ = ops.pair_loss(
        hidden, weight, target, LENGTHS, references, weights, 0.7, scale=1 / 3
    )
    fused = torch.autograd.grad(loss, [hidden, weight])

    logps = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), target]
    plain = torch.stack([part.sum() for part in logps.split(LENGTHS)])
    delta = margin(plain[0::2], plain[1::2], references[0::2], references[1::2])
    expected = dpo_loss(delta, weights, 0.7).sum() / 3
    assert torch.allclose(sums, plain) and torch.allclose(loss, expected)
    for a, b in zip(fused, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert torch.allclose(a, b)


def test_guide_training_is_this_loss() -> None:
    """The guide's training step: loss and gradient, with the dropout that its keys draw."""
    config = GuideConfig(2, 4, token_dropout=0.3, latent_dropout=0.4, max_tokens=64)
    texts = [("one two", "three four five", "six"), ("two", "one", "three three one two")]
    size = GPT2Config(300, 96, 16, 1, 2)
    guide = new_guide(config, 3, None, [t for row in texts for t in row], size).double()
    rows = [(guide.example(x, y), guide.example(x, z)) for x, y, z in texts]
    keyed = [(row, f"guide/0/{i}") for i, row in enumerate(rows)]
    loss = accumulate_gradients(guide, keyed, 1000, 5, torch.device("cpu"))
    gradients = {name: p.grad for name, p in guide.named_parameters()}
    guide.zero_grad()

    examples = [example for row in rows for example in row]
    draws = [
        uniforms(5, f"{key}/{side}", 1 + len(example.response))
        for row, key in keyed
        for side, example in enumerate(row)
    ]
    kept = torch.tensor([draw[0] >= 0.4 for draw in draws])
    hidden = torch.from_numpy(np.concatenate([draw[1:] < 0.3 for draw in draws]))
    assert kept.any() and not kept.all() and hidden.any() and not hidden.all()
    latents = guide.encode(examples) * kept[:, None]
    expected = reconstruction_loss(guide.decode(examples, latents, hidden))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for name, p in guide.named_parameters():
        assert (gradients[name] is None) == (p.grad is None), name
        if p.grad is not None:
            assert torch.allclose(gradients[name], p.grad, rtol=1e-6, atol=1e-12), name
