"""Pair sources: what fits, what is dropped, what a distance weighs."""

import logging
from pathlib import Path

import pytest
import torch

from ldalign.batches import Pair
from ldalign.data import Row
from ldalign.errors import InputError
from ldalign.methods import distance_weights, effective_size, prepare, usable, with_losers
from ldalign.tokenizer import load_tokenizer


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
    assert cut.cut == 1 and cut.pairs[0].prompt == pair.prompt and cut.pairs[0].real == pair.real[:2]
    assert not set(cut.pairs[0].real) & set(tokenizer.end_ids)


def test_prepare_drops_rows_without_room_by_id(chatml_folder: Path) -> None:
    """One long prompt in 200 rows is dropped; three are too many, and the message names the first."""
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
    assert weights.tolist() == pytest.approx([0.75, 2.25, 0.0, 0.0]) and weights.dtype == torch.float64
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
