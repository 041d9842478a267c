"""The objective's page: each equation by hand, and the fused losses of training held to it."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_guides import CPU, policy_guide, settings_of, stir, text_guide
from torch import Tensor

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.kernels import reference
from ldalign.models.guide import NO_LATENT, Guide, Reading
from ldalign.models.toy import write_toy_model
from ldalign.objective import (
    contrast_loss,
    distance_weights,
    dpo_coefficient,
    dpo_loss,
    effective_size,
    latent_distance,
    length_distance,
    margin,
    oracle_distance,
    pair_weights,
    reconstruction_loss,
)
from ldalign.system.seeds import normals, permutation, uniforms
from ldalign.training.guide import accumulate_gradients, global_batch

LENGTHS = [3, 5, 1, 4, 6, 2]  # of three pairs: real, generated, real, ...
WEIGHTS = [0.0, 0.4, 3.1]  # uneven, one of them none, and their sum not their number


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand() -> None:
    real, generated = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([-4.0])
    assert reconstruction_loss(real, generated) == 7.0  # two means, whatever their numbers
    gaps = contrast_loss(torch.tensor([-5.0, -5.0, -9.0]), torch.tensor([-5.0, -8.0, -5.0]))
    expected = [math.log(2), math.log(1 + math.exp(-3)), math.log(1 + math.exp(4))]
    assert gaps.tolist() == pytest.approx(expected)
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


# Every part of the loss alone, and all at once.
LOSSES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("text", {}, {"contrast": 0.0, "latent_dropout": 0.0}),
    ("text", {}, {"contrast": 0.7, "latent_dropout": 0.4}),
    ("text", {"injection": "both"}, {"contrast": 0.0, "bag_of_words": 0.5, "tokens": 3}),
    (
        "text",
        {"injection": "both", "readout": "queries", "latent_norm": "rms"},
        {
            "contrast": 1.5,
            "bag_of_words": 0.5,
            "token_dropout": 1.0,
            "latent_dropout": 0.4,
            "latent_noise": 0.3,
            "tokens": 4,
        },
    ),
    ("policy", {}, {"contrast": 0.7, "latent_dropout": 0.4, "tokens": 3}),
    ("policy", {}, {"contrast": 0.7, "token_dropout": 0.9, "latent_noise": 0.3}),
]


@pytest.mark.parametrize(("kind", "more", "loss"), LOSSES)
def test_guide_training_is_this_loss(
    kind: str, more: dict[str, Any], loss: dict[str, Any], tmp_path: Path
) -> None:
    """The guide's training step: loss and gradient, with the draws of its keys.

    Real and generated responses are two means, as in the paper: it used to be one mean over all
    tokens, in which the side with the longer responses counted for more.
    """
    if kind == "text":
        guide = stir(text_guide(**more))
    else:
        guide = stir(policy_guide(write_toy_model(tmp_path / "model"), **more))
    pairs = [
        guide.pair("a", "one two", "three four five", "six"),
        guide.pair("b", "two", "one", "three three one two"),
        guide.pair("c", "same", "again", "again"),
        guide.pair("d", "five", "two and six", "no"),
        guide.pair("e", "six", "and two", "two"),
    ]
    keys = [f"guide/0/{pair.id}" for pair in pairs]
    settings = settings_of(**loss)
    got = float(
        accumulate_gradients(guide, global_batch(guide, pairs, keys, settings, 5), settings, CPU)
    )
    gradients = {name: p.grad for name, p in guide.named_parameters()}
    guide.zero_grad()
    expected = plain_loss(guide, pairs, keys, **loss)
    expected.backward()
    assert got == pytest.approx(expected.item(), rel=1e-6)
    for name, p in guide.named_parameters():
        assert (gradients[name] is None) == (p.grad is None), name
        if p.grad is not None:
            gap = (gradients[name] - p.grad).norm()  # type: ignore[operator]
            assert gap <= 1e-4 * p.grad.norm() + 1e-6, name
    assert any(p.grad is not None and p.grad.norm() > 1e-3 for p in guide.latent.parameters())


def plain_loss(
    guide: Guide,
    pairs: list[Pair],
    keys: list[str],
    contrast: float,
    latent_dropout: float = 0.1,
    bag_of_words: float = 0.0,
    token_dropout: float = 0.0,
    latent_noise: float = 0.0,
    tokens: int | None = None,
) -> Tensor:
    """The loss of a global batch () float64 by the equations, from log-probs of `Guide.decode`."""
    responses = [y for pair in pairs for y in pair.responses]
    named = [f"{key}/{side}" for key in keys for side in (0, 1)]
    draws = [uniforms(5, key, 2 + len(y)) for key, y in zip(named, responses, strict=True)]
    kept = [draw[0] >= latent_dropout for draw in draws]
    hidden = torch.tensor([bool(u < token_dropout * draw[1]) for draw in draws for u in draw[2:]])
    assert bool(hidden.any()) == bool(token_dropout) and not hidden.all()
    assert all(kept) == (latent_dropout in (0.0, 0.1)) and any(kept)
    z = guide.encode(pairs)
    if latent_noise:
        size = z.detach().square().mean(1, keepdim=True).sqrt()
        z = z + latent_noise * size * torch.stack(
            [normals(5, f"{key}/noise", z.shape[1]) for key in named]
        )
    counted = [list(range(len(y))) for y in responses]
    if tokens is not None:
        counted = [
            sorted(permutation(5, f"{key}/tokens", len(y))[:tokens].tolist())
            for key, y in zip(named, responses, strict=True)
        ]
        assert any(len(chosen) < len(y) for chosen, y in zip(counted, responses, strict=True))

    def read(latents: list[int]) -> list[Tensor]:
        readings = [Reading(i, whose) for i, whose in enumerate(latents)]
        logps = guide.decode(pairs, z, readings, hidden if token_dropout else None)
        parts = logps.double().split([len(y) for y in responses])
        return [part[chosen] for part, chosen in zip(parts, counted, strict=True)]

    n = len(responses)
    own = read([i if kept[i] else NO_LATENT for i in range(n)])
    sibling = read([i ^ 1 for i in range(n)])
    loss = reconstruction_loss(torch.cat(own[0::2]), torch.cat(own[1::2]))
    told = [i for i in range(n) if kept[i] and responses[i] != responses[i ^ 1]]
    assert 0 < len(told) < n
    gaps = [contrast_loss(own[i].sum(), sibling[i].sum()) for i in told]
    loss = loss + contrast * torch.stack(gaps).sum() / sum(len(counted[i]) for i in told)
    if bag_of_words:
        table = (guide.latent.shift(z) @ guide.decoder.output_weight.T).double().log_softmax(1)
        bags = [
            table[i, [y[place] for place in chosen]]
            for i, (y, chosen) in enumerate(zip(responses, counted, strict=True))
        ]
        loss = loss + bag_of_words * reconstruction_loss(
            torch.cat(bags[0::2]), torch.cat(bags[1::2])
        )
    return loss


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_guide_loss_does_not_depend_on_micro_batches(noise: float) -> None:
    """One pair at a time or all at once; another epoch's keys draw anew."""
    loss = {"token_dropout": 1.0, "latent_dropout": 0.5, "latent_noise": noise, "tokens": 4}

    def step(micro: int, epoch: int) -> tuple[float, list[Tensor]]:
        guide = stir(text_guide(injection="both"))
        pairs = [guide.pair(str(i), f"row {i}", "a " * (1 + i), "b " * (6 - i)) for i in range(6)]
        keys = [f"guide/{epoch}/{pair.id}" for pair in pairs]
        settings = settings_of(micro_tokens=micro, **loss)
        value = float(
            accumulate_gradients(
                guide, global_batch(guide, pairs, keys, settings, 0), settings, CPU
            )
        )
        return value, [p.grad for p in guide.latent.parameters() if p.grad is not None]

    whole, gradients = step(10_000, 0)
    for micro in (1, 60):
        value, others = step(micro, 0)
        assert value == pytest.approx(whole, rel=1e-6)
        for one, other in zip(gradients, others, strict=True):
            assert (other - one).norm() <= 1e-4 * one.norm()
    assert abs(step(10_000, 1)[0] - whole) > 1e-4


# ------------------------------------------------------------------------------ weights, by hand

DISTANCES = torch.tensor([1.0, 2.0, 0.0, 4.0, 3.0])
KEPT = [True, True, True, False, True]  # the mean over these is 1.5
BY_HAND = [2 / 3, 4 / 3, 0.0, 0.0, 2.0]


def weighted(kind: str, seed: int = 0, clip: float | None = None) -> tuple[list[float], int]:
    weights, lowered = pair_weights(kind, DISTANCES, KEPT, seed, clip)
    assert weights.dtype == torch.float64
    return weights.tolist(), lowered


def test_weights_are_distances_over_their_mean() -> None:
    assert weighted("latent") == (pytest.approx(BY_HAND), 0)
    # Of weights below 0.1 the inverse is 10: here of the third, which is 0. Their mean is 3.1875.
    inverse = [1.5, 0.75, 10.0, 0.0, 0.5]
    assert weighted("inverse") == (pytest.approx([w / 3.1875 for w in inverse]), 0)
    assert distance_weights(torch.tensor([3.0]), [True]).tolist() == [1.0]
    assert distance_weights(torch.tensor([0.2, 0.6]), [True, True]).tolist() == [
        pytest.approx(0.5),
        pytest.approx(1.5),
    ]


def test_shuffled_weights_are_dealt_out_among_the_kept() -> None:
    dealt = set()
    for seed in range(8):
        weights, _ = weighted("shuffled", seed)
        assert weights[3] == 0.0 and sorted(weights) == pytest.approx(sorted(BY_HAND))
        order = [[0, 1, 2, 4][i] for i in permutation(seed, "weights/shuffled", 4)]
        assert [weights[i] for i in (0, 1, 2, 4)] == pytest.approx([BY_HAND[i] for i in order])
        dealt.add(tuple(weights))
    assert len(dealt) > 1


def test_a_clip_lowers_what_exceeds_it() -> None:
    assert weighted("latent", clip=1.5) == (pytest.approx([2 / 3, 4 / 3, 0.0, 0.0, 1.5]), 1)
    assert weighted("latent", clip=2.0) == weighted("latent")  # as large is not beyond


def test_distances_of_zero_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ldalign"):
        weights = distance_weights(torch.zeros(3), [True, False, True])
    assert weights.dtype == torch.float64 and weights.tolist() == [1.0, 0.0, 1.0]
    assert [record.message for record in caplog.records] == [
        "all distances are zero: every pair has weight 1"
    ]
    assert distance_weights(torch.ones(2), [False, False]).tolist() == [0.0, 0.0]


def test_distances_of_those_who_know_lengths_or_answers() -> None:
    pairs = [Pair("a", [1], [1, 2, 3], [4]), Pair("b", [1], [1], [4, 5, 6, 7])]
    lengths = length_distance(pairs)
    assert lengths.dtype == torch.float64 and lengths.tolist() == [2.0, 3.0]
    oracle = oracle_distance([True, False], 0.9)
    assert oracle.dtype == torch.float64 and oracle.tolist() == pytest.approx([0.1, 1.9])


def test_effective_size_is_a_share_of_the_number() -> None:
    assert effective_size(torch.ones(4)) == 1.0
    assert effective_size(torch.tensor([2.0, 0.0])) == 0.5
    assert effective_size(torch.tensor([3.0, 1.0])) == pytest.approx(0.8)
    assert effective_size(torch.tensor([])) == 0.0
