"""Pairs: their losers, their columns, what a distance weighs."""

import logging
import typing
from dataclasses import replace

import pytest
import torch

from ldalign.data.pairs import Chosen, Pair, Pairs, joined_pairs, ranked_pairs, with_losers
from ldalign.objective import (
    WEIGHTS,
    distance_weights,
    effective_size,
    length_distance,
    oracle_distance,
    pair_weights,
)
from ldalign.run.settings import RunConfig


def test_with_losers_and_usable() -> None:
    pairs = [Pair("a", [1, 2], [3, 4]), Pair("b", [1], [3, 4, 5])]
    full = with_losers(pairs, [[3, 4], [3, 4, 5, 6, 7]], max_length=4)
    assert full.usable.tolist() == [False, False]
    assert [p.generated for p in full] == [[3, 4], [3, 4, 5]]
    # equal, also only after the cut; empty; different; no loser at all
    assert [p.usable for p in full] == [False, False]
    assert not Pair("c", [1], [2], []).usable
    assert Pair("d", [1], [2], [3]).usable and Pair("e", [1], [2]).usable


def test_distance_weights_have_mean_one_over_the_kept() -> None:
    weights = distance_weights(torch.tensor([1.0, 3.0, 100.0, 0.0]), [True, True, False, True])
    assert (
        weights.tolist() == pytest.approx([0.75, 2.25, 0.0, 0.0]) and weights.dtype == torch.float64
    )
    assert weights.sum() == pytest.approx(3)


def test_zero_distances_weigh_one_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        weights = distance_weights(torch.zeros(4), [True, False, True, True])
    assert weights.tolist() == [1, 0, 1, 1] and "zero" in caplog.text
    assert distance_weights(torch.ones(2), [False, False]).tolist() == [0, 0]


def test_equal_distances_weigh_one() -> None:
    assert distance_weights(torch.full((5,), 0.37), [True] * 5).tolist() == pytest.approx([1.0] * 5)


def test_effective_size() -> None:
    assert effective_size(torch.ones(7)) == 1.0
    assert effective_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_size(torch.tensor([])) == 0.0


# -------------------------------------------------------------------------- controls of the weights

PAIRS = [
    Pair(f"row{i}", [1], [2] * n, [3] * m)
    for i, (n, m) in enumerate([(4, 1), (2, 2), (5, 6), (1, 1), (3, 9)])
]
KEPT = [True, True, True, False, True]
DISTANCES = torch.tensor([1.0, 4.0, 0.01, 7.0, 2.99])


def weigh(kind: str, seed: int = 0, distances: torch.Tensor = DISTANCES) -> list[float]:
    return pair_weights(kind, distances, KEPT, seed)[0].tolist()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_kind_of_weight_has_mean_one_over_the_kept(kind: str) -> None:
    weights = weigh(kind)
    assert weights[3] == 0 and sum(weights) == pytest.approx(4) and min(weights) >= 0


def test_the_kinds_of_weights_by_hand() -> None:
    """Kept distances 1, 4, 0.01, 2.99 have mean 2; length differences are
    3, 0, 1, 6, with mean 2.5.
    """
    assert weigh("latent") == pytest.approx([0.5, 2.0, 0.005, 0, 1.495])
    assert weigh("uniform", 0, torch.ones(5)) == [1, 1, 1, 0, 1]
    assert weigh("length", 0, length_distance(PAIRS)) == pytest.approx([1.2, 0, 0.4, 0, 2.4])
    inverse = [2, 0.5, 10, 1 / 1.495]  # 0.005 is nearer than a tenth of the mean
    assert weigh("inverse") == pytest.approx(
        [*(4 * x / sum(inverse) for x in inverse[:3]), 0, 4 * inverse[3] / sum(inverse)]
    )


def test_the_oracle_weighs_wrong_losers_more_than_right_ones() -> None:
    """Of the kept, the first two losers are wrong, c = 0.9: distances 1.9, 1.9, 0.1, 0.1, mean 1;
    with one wrong loser the mean is 0.55. c = 1 leaves right losers out, and where every kept
    loser is right, or wrong, there is nothing to tell apart.
    """
    distances = oracle_distance([False, False, True, False, True], 0.9)
    assert distances.tolist() == pytest.approx([1.9, 1.9, 0.1, 1.9, 0.1])
    assert weigh("oracle", 0, distances) == pytest.approx([1.9, 1.9, 0.1, 0, 0.1])
    few = weigh("oracle", 0, oracle_distance([True, True, False, False, True], 0.9))
    assert few == pytest.approx([0.1 / 0.55, 0.1 / 0.55, 1.9 / 0.55, 0, 0.1 / 0.55])
    assert weigh("oracle", 0, oracle_distance([False, True, False, True, True], 1.0)) == [
        2,
        0,
        2,
        0,
        0,
    ]
    for alike in (True, False):
        assert weigh("oracle", 0, oracle_distance([alike] * 5, 1.0)) == [1, 1, 1, 0, 1]


def test_shuffled_weights_are_the_latent_ones_elsewhere() -> None:
    orders = {tuple(weigh("shuffled", seed)) for seed in range(8)}
    assert (
        all(sorted(order) == sorted(weigh("latent")) and order[3] == 0 for order in orders)
        and len(orders) > 3
    )
    assert weigh("shuffled", 3) == weigh("shuffled", 3)


def test_a_clip_lowers_the_largest_and_leaves_the_rest() -> None:
    weights, clipped = pair_weights("latent", DISTANCES, KEPT, 0, 1.5)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 0.005, 0, 1.495]) and clipped == 1


def test_the_key_offers_all_kinds() -> None:
    assert typing.get_args(typing.get_type_hints(RunConfig)["weights"]) == WEIGHTS


# ------------------------------------------------------------------------- preference data, samples


def test_samples_are_ranked_and_ties_are_left_out() -> None:
    """Preference for the first: 0.9 yes, 0.2 no, 0.5 and NaN say nothing; both
    sides are cut to max_length.
    """
    pairs = [Pair(f"row{i}", [1], [2]) for i in range(5)]
    samples = [[5, 5, 5]] * 5, [[6, 6]] * 5
    ranked = ranked_pairs(pairs, samples, [0.9, 0.5, 0.2, float("nan"), 1.0], max_length=3)
    better = [Pair(f"row{i}", [1], [5, 5], [6, 6]) for i in (0, 4)]
    assert list(ranked) == [better[0], Pair("row2", [1], [6, 6], [5, 5]), better[1]]


# --------------------------------------------------------------------------------- many, in columns

MANY = [
    Pair(f"row{i}", [1] * (i + 1), [2] * i, [3] * (i % 3), 0.5 * i, -1.0 * i, -2.0 * i)
    for i in range(7)
]


def test_columns_hold_the_pairs_they_were_made_of() -> None:
    pairs = Pairs.of(MANY)
    assert list(pairs) == MANY and Pairs.of(pairs) is pairs
    assert pairs.tokens.tolist() == [pair.tokens for pair in MANY]
    assert pairs.usable.tolist() == [pair.usable for pair in MANY]
    assert list(pairs[2:5]) == MANY[2:5] and pairs[-1] == MANY[-1]
    assert list(pairs.take([4, 0, 4])) == [MANY[4], MANY[0], MANY[4]]
    assert list(pairs.take(pairs.usable)) == [pair for pair in MANY if pair.usable]
    assert list(joined_pairs([pairs[:3], pairs[5:]])) == MANY[:3] + MANY[5:]


def test_columns_without_losers() -> None:
    pairs = Pairs.of([Pair("a", [1], [2]), Pair("b", [1, 1], [3, 4])])
    assert pairs.generated is None and pairs[1].generated is None and pairs.usable.all()
    assert pairs.tokens.tolist() == [2, 4] and list(Pairs.of([])) == []


def test_the_hash_of_columns_sees_every_token_and_the_order() -> None:
    pairs = Pairs.of(MANY)
    same = Pairs.of(MANY[1:] + MANY[:1]).take([6, 0, 1, 2, 3, 4, 5])
    assert pairs.content_hash == same.content_hash
    changed = [replace(MANY[3], real=[2, 2, 9]), replace(MANY[3], prompt=[1, 1, 1])]
    changed += [replace(MANY[3], generated=[3])]
    others = [Pairs.of([*MANY[:3], pair, *MANY[4:]]) for pair in changed] + [pairs[::-1], pairs[:6]]
    assert len({pairs.content_hash, *(other.content_hash for other in others)}) == 6


def test_chosen_items_are_made_when_they_are_asked_for() -> None:
    seen: list[int] = []

    def change(x: int) -> int:
        seen.append(x)
        return 10 * x

    some = Chosen([5, 6, 7, 8], [3, 1], change)
    assert len(some) == 2 and seen == []
    assert some[1] == 60 and seen == [6]
    assert list(some[1:]) == [60] and list(Chosen([5, 6])) == [5, 6]


def test_a_pair_of_the_data_counts_once_and_has_no_reference() -> None:
    pair = Pair("row", [1], [2])
    assert (pair.generated, pair.weight, pair.ref_real, pair.ref_generated) == (None, 1.0, 0.0, 0.0)
