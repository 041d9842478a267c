"""Pair sources: what fits, what is dropped, what a distance weighs."""

import logging
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldalign.data.pairs import Pair, prepare, ranked_pairs, rejected_pairs, usable, with_losers
from ldalign.data.rows import Row
from ldalign.data.tokenizer import load_tokenizer
from ldalign.objective import WEIGHTS, distance_weights, effective_size, pair_weights
from ldalign.run.settings import RunConfig
from ldalign.system.errors import InputError


def row(i: int, prompt: str = "Say it.", response: str = "It is said.") -> Row:
    return Row(id=f"row{i}", history=({"role": "user", "content": prompt},), response=response)


def test_prepare_keeps_what_fits(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    whole = prepare([row(0)], tokenizer, 10_000)
    (pair,) = whole.pairs
    assert pair.real[-1] in tokenizer.end_ids and whole.cut == 0 and whole.dropped == []
    exact = prepare([row(0)], tokenizer, len(pair.prompt) + len(pair.real))
    assert exact.pairs == whole.pairs and exact.cut == 0


def test_prepare_cuts_the_response_and_its_end_token(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    (pair,) = prepare([row(0)], tokenizer, 10_000).pairs
    cut = prepare([row(0)], tokenizer, len(pair.prompt) + 2)
    assert (
        cut.cut == 1 and cut.pairs[0].prompt == pair.prompt and cut.pairs[0].real == pair.real[:2]
    )
    assert not set(cut.pairs[0].real) & set(tokenizer.end_ids)


def test_prepare_drops_rows_without_room_by_id(chatml_folder: Path) -> None:
    """One long prompt in 200 rows is dropped; three are too many, and the
    message names the first.
    """
    tokenizer = load_tokenizer(chatml_folder)
    rows = [row(i) for i in range(200)]
    room = len(prepare(rows[:1], tokenizer, 10_000).pairs[0].prompt) + 5
    rows[7] = row(7, prompt="Say it, " * 100)
    prepared = prepare(rows, tokenizer, room)
    assert prepared.dropped == ["row7"] and len(prepared.pairs) == len(prepared.rows) == 199
    assert [p.id for p in prepared.pairs] == [r.id for r in prepared.rows]
    for i in (9, 11):
        rows[i] = row(i, prompt="Say it, " * 100)
    with pytest.raises(InputError, match=r"max_length=.*3 of 200.*row7"):
        prepare(rows, tokenizer, room)


def test_with_losers_and_usable() -> None:
    pairs = [Pair("a", [1, 2], [3, 4]), Pair("b", [1], [3, 4, 5])]
    full = with_losers(pairs, [[3, 4], [3, 4, 5, 6, 7]], max_length=4)
    assert [p.generated for p in full] == [[3, 4], [3, 4, 5]]
    # equal, also only after the cut; empty; different; no loser at all
    assert [usable(p) for p in full] == [False, False]
    assert not usable(Pair("c", [1], [2], []))
    assert usable(Pair("d", [1], [2], [3])) and usable(Pair("e", [1], [2]))


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


def weigh(kind: str, seed: int = 0, clip: float | None = None) -> list[float]:
    return pair_weights(kind, DISTANCES, PAIRS, KEPT, seed, clip)[0].tolist()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_kind_of_weight_has_mean_one_over_the_kept(kind: str) -> None:
    weights = weigh(kind)
    assert weights[3] == 0 and sum(weights) == pytest.approx(4) and min(weights) >= 0


def test_the_kinds_of_weights_by_hand() -> None:
    """Kept distances 1, 4, 0.01, 2.99 have mean 2; length differences are
    3, 0, 1, 6, with mean 2.5.
    """
    assert weigh("latent") == pytest.approx([0.5, 2.0, 0.005, 0, 1.495])
    assert weigh("uniform") == [1, 1, 1, 0, 1]
    assert weigh("length") == pytest.approx([1.2, 0, 0.4, 0, 2.4])
    inverse = [2, 0.5, 10, 1 / 1.495]  # 0.005 is nearer than a tenth of the mean
    assert weigh("inverse") == pytest.approx(
        [*(4 * x / sum(inverse) for x in inverse[:3]), 0, 4 * inverse[3] / sum(inverse)]
    )


def test_shuffled_weights_are_the_latent_ones_elsewhere() -> None:
    orders = {tuple(weigh("shuffled", seed)) for seed in range(8)}
    assert (
        all(sorted(order) == sorted(weigh("latent")) and order[3] == 0 for order in orders)
        and len(orders) > 3
    )
    assert weigh("shuffled", 3) == weigh("shuffled", 3)


def test_a_clip_lowers_the_largest_and_leaves_the_rest() -> None:
    weights, clipped = pair_weights("latent", DISTANCES, PAIRS, KEPT, 0, 1.5)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 0.005, 0, 1.495]) and clipped == 1


def test_the_key_offers_all_kinds() -> None:
    assert typing.get_args(typing.get_type_hints(RunConfig)["weights"]) == WEIGHTS


# ------------------------------------------------------------------------- preference data, samples


def test_rejected_responses_get_ids_as_chosen_ones_do(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    rows = [
        replace(row(0, response="It is said."), rejected="No."),
        replace(row(1, response="No."), rejected="Maybe."),
    ]
    pairs = rejected_pairs(rows, prepare(rows, tokenizer, 1000).pairs, tokenizer, 1000)
    assert pairs[0].generated == pairs[1].real and usable(pairs[0])
    with pytest.raises(InputError, match="row2: has no rejected response, which method=dpo needs"):
        rejected_pairs([row(2)], pairs[:1], tokenizer, 1000)


def test_samples_are_ranked_and_ties_are_none() -> None:
    """Preference for the first: 0.9 yes, 0.2 no, 0.5 and NaN say nothing; both
    sides are cut to max_length.
    """
    pairs = [Pair(f"row{i}", [1], [2]) for i in range(4)]
    samples = [([5, 5, 5], [6, 6])] * 4
    ranked = ranked_pairs(pairs, samples, [0.9, 0.2, 0.5, float("nan")], max_length=3)
    assert ranked[2:] == [None, None]
    assert ranked[0] == Pair("row0", [1], [5, 5], [6, 6]) and ranked[1] == Pair(
        "row1", [1], [6, 6], [5, 5]
    )
