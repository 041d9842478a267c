"""The map to the latent that is fitted in closed form: what it is, and where it comes from."""

from pathlib import Path

import pytest
import torch
from tiny_guides import pairs, policy_guide, text_guide

from ldalign.data.pairs import Pair
from ldalign.models.toy import write_toy_model
from ldalign.objective import latent_distance
from ldalign.system.errors import NumericsError
from ldalign.training import latent_map
from ldalign.training.guide import keep_states
from ldalign.training.latent_map import SHRINKAGE, discriminant_map, fit, scatter, standardise


def drawn(
    responses: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Means (R, D), token states (M, D) and lengths of responses whose places vary unequally."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (responses,), generator=draw).tolist()
    sizes = torch.logspace(-1, 1, width, dtype=torch.float64)
    centres = torch.randn(responses, width, generator=draw, dtype=torch.float64) + 3
    states = torch.cat(
        [
            centre + sizes * torch.randn(n, width, generator=draw, dtype=torch.float64)
            for centre, n in zip(centres, lengths, strict=True)
        ]
    )
    means = torch.stack([part.mean(0) for part in states.split(lengths)])
    return means, states, lengths


def test_scatter_is_that_of_tokens_about_their_own_response() -> None:
    means, states, lengths = drawn(12, 5)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    of_token = [r for r, n in enumerate(lengths) for _ in range(n)]
    for state, r in zip(states, of_token, strict=True):
        expected += torch.outer(state - means[r], state - means[r])
    torch.testing.assert_close(scatter(states, lengths), expected)
    torch.testing.assert_close(scatter(states.bfloat16(), lengths), expected, rtol=0.03, atol=0.5)


@pytest.mark.parametrize("width", [1, 3, 8, 11])
def test_the_map_makes_tokens_vary_alike_and_responses_most_first(width: int) -> None:
    """What defines it: W C W' is a multiple of the identity, W B W' is diagonal and falls, where B
    is the scatter of responses, and no other direction in these units has more of B; mean 0,
    deviation 1. The largest coordinate of a direction is positive.
    """
    means, states, lengths = drawn(60, 8)
    within = scatter(states, lengths) / len(states)
    weight, bias = discriminant_map(means, within, width)
    z = means @ weight.T + bias
    assert z.shape == (60, width) and z.mean(0).abs().max() < 1e-9
    assert float(z.square().mean().sqrt()) == pytest.approx(1.0)
    some = min(width, 8)
    assert bool((weight[some:] == 0).all()) and bool((bias[some:] == 0).all())
    weight, z = weight[:some], z[:, :some]
    shrunk = within + SHRINKAGE * within.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    inside = weight @ shrunk @ weight.T
    torch.testing.assert_close(inside, inside[0, 0] * torch.eye(some, dtype=torch.float64))
    between = z.T @ z
    ratios = between.diagonal()
    torch.testing.assert_close(between, torch.diag(ratios))
    assert bool((ratios.diff() <= 1e-9).all())
    apart = means - means.mean(0)
    best = torch.linalg.eigvals(torch.linalg.solve(shrunk, apart.T @ apart)).real
    expected = best.sort(descending=True).values[:some] * inside[0, 0]
    torch.testing.assert_close(ratios, expected)
    directions = weight @ torch.linalg.cholesky(shrunk)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_rows_that_were_fitted_to_are_no_farther_apart() -> None:
    """Than rows that were not, of the same kind: or the former would weigh more for nothing."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randn(400, 1, 60, generator=draw, dtype=torch.float64)
    means = prompts + 0.5 * torch.randn(400, 2, 60, generator=draw, dtype=torch.float64)
    fitted, other = means[:80].flatten(0, 1), means[80:].flatten(0, 1)
    weight, bias = discriminant_map(fitted, torch.eye(60, dtype=torch.float64), 20)

    def mean_distance(of: torch.Tensor) -> float:
        z = of @ weight.T + bias
        return float(latent_distance(z[0::2], z[1::2]).mean())

    # by the directions of a prompt's two responses it would be 0.71
    assert mean_distance(other) > 0.9 * mean_distance(fitted)


def test_what_tokens_say_by_chance_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of response differ in one place; another, in which tokens scatter widely, hides it
    from the distance of means, and not from that of latents.
    """
    draw = torch.Generator().manual_seed(0)
    kinds = torch.arange(200) % 2
    states = torch.randn(200, 6, 2, generator=draw, dtype=torch.float64)
    states[..., 0] *= 20
    states[..., 1] = 0.3 * states[..., 1] + kinds[:, None]
    means = states.mean(1)
    within = scatter(states.flatten(0, 1), [6] * 200) / 1200
    # of two places, the mean variance is the larger's half
    monkeypatch.setattr(latent_map, "SHRINKAGE", 1e-4)
    weight, bias = discriminant_map(means, within, 2)

    def order(values: torch.Tensor) -> float:
        """How often a pair of two kinds is farther apart than a pair of one."""
        same = latent_distance(values[0:198:2], values[2:200:2])
        other = latent_distance(values[0:200:2], values[1:200:2])[:99]
        return float((other[:, None] > same[None]).double().mean())

    assert order(means) < 0.6
    assert order(means @ weight.T + bias) > 0.85


def test_states_that_do_not_vary_give_latents() -> None:
    """Responses of one token each have no scatter, and equal ones no difference."""
    means = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = discriminant_map(means, torch.zeros(4, 4, dtype=torch.float64), 3)
    assert float((means @ weight.T + bias).square().mean()) == pytest.approx(1.0)
    for within in (torch.zeros(4, 4), torch.eye(4)):
        weight, bias = discriminant_map(means[:1].repeat(6, 1), within.double(), 3)
        assert bool((weight == 0).all()) and bool((bias == 0).all())
    weight, bias = discriminant_map(means[:4], torch.eye(4).double(), 4)
    assert (weight != 0).any(1).tolist() == [True, True, True, False]


def test_a_guide_is_fitted_to_its_first_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it reads of both responses, whether the states are kept or made; no other tensor."""
    policy = write_toy_model(tmp_path / "model", seed=3)
    monkeypatch.setattr(latent_map, "FIT_PAIRS", 6)
    monkeypatch.setattr(latent_map, "READ_TOKENS", 100)
    one, other, few = (policy_guide(policy, latent_tokens=1, latent_width=8) for _ in range(3))
    before = {n: p.detach().clone() for n, p in one.named_parameters()}
    chosen = pairs(one, 9)
    fit(one, chosen)
    fit(other, chosen, keep_states(other, chosen, 4000))
    fit(few, chosen[:6])
    for n, p in one.named_parameters():
        assert torch.equal(p, before[n]) != n.startswith("latent.to_latent"), n
    for guide in (other, few):
        torch.testing.assert_close(
            guide.pair_distances(chosen), one.pair_distances(chosen), rtol=1e-2, atol=1e-3
        )
    with torch.no_grad():
        states = [one.states([pair]) for pair in chosen[:6]]
    lengths = [len(y) for pair in chosen[:6] for y in pair.responses]
    tokens = torch.cat([own.before for own in states])
    weight, bias = discriminant_map(
        torch.cat([own.read for own in states]), scatter(tokens, lengths) / len(tokens), 8
    )
    z = torch.cat([own.read for own in states]).double()
    expected = z @ weight.T + bias
    with torch.no_grad():
        found = one.latent.to_latent(z.float()).double()
    torch.testing.assert_close(
        torch.cdist(found, found), torch.cdist(expected, expected), rtol=1e-2, atol=1e-3
    )


def test_known_states_are_those_of_the_pairs() -> None:
    """Each pair's lengths go with its states: fitted to them or to what is read is the same."""
    one, other = text_guide(), text_guide()
    chosen = [
        Pair("a", [5, 6], [7, 8, 9], [10]),
        Pair("b", [5], [11, 12], [13, 14, 15, 16]),
        Pair("c", [5, 9], [17, 12], [13]),
    ]
    with torch.no_grad():
        states = [one.states([pair]) for pair in chosen]
    fit(one, chosen, states)
    fit(other, chosen)
    kept = [3, 1, 2, 4, 2, 1]
    tokens = torch.cat([own.before for own in states])
    within = sum(
        torch.cov(part.double().T, correction=0) * len(part)
        for part in tokens.split(kept)
        if len(part) > 1
    )
    weight, _ = discriminant_map(
        torch.cat([own.read for own in states]),
        within / len(tokens),
        one.latent.to_latent.out_features,
    )
    for guide in (one, other):
        torch.testing.assert_close(
            guide.latent.to_latent.weight.detach().double(), weight, rtol=1e-3, atol=1e-3
        )
    standardise(one, [])
    torch.testing.assert_close(
        one.latent.to_latent.weight.detach().double(), weight, rtol=1e-3, atol=1e-3
    )


def test_states_that_are_not_finite_are_named() -> None:
    guide = text_guide()
    with torch.no_grad():
        guide.encoder.embedding.weight[7] = torch.nan
    chosen = [Pair("well", [5], [8, 9], [10]), Pair("ill", [5], [7, 9], [10])]
    with pytest.raises(NumericsError, match="row ill: the guide's states are not finite"):
        fit(guide, chosen, budget=1)
