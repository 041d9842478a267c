"""Which rows are held out: whole conversations, equal prompts together, the right number."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldalign.data.splitting import divide, groups_of, held_out, heldout_counts, mixed
from ldalign.system.errors import InputError


def keys(values: list[int]) -> list[bytes]:
    return [str(value).encode() for value in values]


def test_groups_hang_together_by_conversation_and_by_prompt() -> None:
    groups = groups_of(keys([1, 1, 2, 3, 4, 5]), keys([10, 11, 11, 12, 12, 13]))
    assert groups.tolist() == [0, 0, 0, 3, 3, 5]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=60), st.integers(0, 60))
def test_no_conversation_and_no_prompt_is_on_both_sides(
    rows: list[tuple[int, int]], count: int
) -> None:
    conversations, prompts = ([row[side] for row in rows] for side in (0, 1))
    found = divide(
        keys(conversations), keys(prompts), heldout=count, most=None, seed=3, shuffle=True
    )
    train, heldout = found.train.tolist(), found.heldout.tolist()
    assert sorted(train + heldout) == list(range(len(rows))) and len(heldout) <= count
    for values in (conversations, prompts):
        assert not {values[i] for i in train} & {values[i] for i in heldout}


@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_the_counts_add_up(fraction: float) -> None:
    """10,000 rows of conversations of one to four turns, some prompts in several of them."""
    rng = np.random.default_rng(0)
    conversations = np.repeat(np.arange(10_000), rng.integers(1, 5, 10_000))[:10_000].tolist()
    prompts = rng.integers(0, 1_000_000, 10_000).tolist()
    count = round(fraction * 10_000)
    found = divide(
        keys(conversations), keys(prompts), heldout=count, most=5000, seed=0, shuffle=True
    )
    left = sum(map(len, found.left_out.values()))
    assert len(found.heldout) == count and len(found.train) == 5000
    assert count + 5000 + left == 10_000
    assert not {conversations[i] for i in found.train} & {conversations[i] for i in found.heldout}


def test_rows_are_in_a_random_order_before_any_cut() -> None:
    many = keys(list(range(1000)))
    one, same, other = (
        divide(many, many, heldout=100, most=200, seed=seed, shuffle=True) for seed in (0, 0, 1)
    )
    assert one.train.tolist() == same.train.tolist() != other.train.tolist()
    assert one.train.max() > 900 and one.train.tolist() != sorted(one.train)
    kept = divide(many, many, heldout=100, most=200, seed=0, shuffle=False)
    assert kept.train.tolist() == sorted(kept.train) and kept.train.max() < 300
    assert kept.heldout.tolist() == one.heldout.tolist()


def test_rows_that_share_a_prompt_with_given_held_out_ones_are_left_out() -> None:
    conversations, prompts = keys([0, 1, 2, 3]), keys([10, 11, 12, 13])
    found = divide(
        conversations, prompts, heldout=2, most=None, seed=0, shuffle=False,
        given=(keys([7, 2, 8]), keys([11, 20, 13])),
    )  # fmt: skip
    # Row 3 asks what a held-out row asks that is not among the two used: it is not trained on.
    assert found.heldout.tolist() == [0, 1] and found.train.tolist() == [0]
    assert Counter({r: len(i) for r, i in found.left_out.items()}).total() == 3


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    st.integers(0, 10),
    st.integers(0, 30),
    st.sets(st.integers(0, 39)),
    st.booleans(),
)
def test_the_next_rows_come_in_the_place_of_those_that_do_not_fit(
    rows: list[tuple[int, int]], count: int, most: int, bad: set[int], shuffle: bool
) -> None:
    """The order stays that of all rows, and no place is left empty while there are others."""
    unfit = np.array([i in bad for i in range(len(rows))])
    conversations, prompts = (keys([row[side] for row in rows]) for side in (0, 1))

    def divided(most: int | None, unfit: np.ndarray) -> Any:
        return divide(
            conversations, prompts, heldout=count, most=most, seed=1, shuffle=shuffle,
            unfit=(unfit, np.zeros(0, dtype=bool)),
        )  # fmt: skip

    found, whole = divided(most, unfit), divided(None, unfit)
    fit = {i for i in range(len(rows)) if not unfit[i]}
    assert {*whole.train.tolist(), *whole.heldout.tolist()} == fit
    assert found.train.tolist() == whole.train.tolist()[:most]
    assert len(found.heldout) <= count
    order = divide(conversations, prompts, heldout=0, most=None, seed=1, shuffle=shuffle).train
    place = {row: n for n, row in enumerate(order.tolist())}
    assert sorted(found.train.tolist(), key=place.__getitem__) == found.train.tolist()


def test_rows_for_validation_are_of_other_prompts() -> None:
    """Three rows a conversation: of the held-out ones, and of given ones, none is shared."""
    groups = keys([i // 3 for i in range(300)])
    one, plain = (
        divide(groups, groups, heldout=30, most=None, seed=3, shuffle=True, validation=n)
        for n in (24, 0)
    )
    assert one.heldout.tolist() == plain.heldout.tolist() and len(one.validation) == 24
    assert not len(plain.validation)
    parts = [{int(i) // 3 for i in rows} for rows in (one.train, one.heldout, one.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 100
    both = (keys([0, 0, 1, 2, 3, 3]), keys([10, 11, 12, 10, 13, 14]))
    found = divide(
        keys([3, 7, 8]), keys([20, 12, 21]), heldout=1, most=None, seed=0, shuffle=False,
        given=both, validation=3,
    )  # fmt: skip
    # Row 1 is of row 0's conversation, row 3 has its prompt; the last two are of one.
    assert found.heldout.tolist() == [0] and found.validation.tolist() == [2, 4, 5]
    # All given prompts are off limits, also those that are not used.
    assert found.train.tolist() == [2]


@pytest.mark.parametrize(
    ("most", "reported", "asked", "expected"),
    [
        (232, 200, None, (200, 32)),
        (600, 600, None, (568, 32)),
        (100, 200, None, (75, 25)),
        (32, 200, None, (24, 8)),
        (31, 200, None, (31, 0)),
        (31, 20, None, (20, 11)),
        (0, 0, None, (0, 0)),
        (20, 200, 10, (10, 10)),
        (60, 20, 40, (20, 40)),
        (60, 20, 0, (20, 0)),
    ],
)
def test_how_many_are_set_aside(
    most: int, reported: int, asked: int | None, expected: tuple[int, int]
) -> None:
    assert heldout_counts(most, reported, asked) == expected


def test_more_than_is_left_to_report_is_refused() -> None:
    with pytest.raises(InputError, match=r"^validation.rows=11: of 20 rows .* 9 would be left"):
        heldout_counts(20, 200, 11)
    with pytest.raises(
        InputError, match=r"validation.rows=30: .* give validation.rows=10 or fewer"
    ):
        heldout_counts(20, 200, 30)


def test_entries_are_mixed_by_their_shares() -> None:
    """Of 900 and 300 rows at 3 to 2 the second runs out first: about 750 rows, in their order."""
    entries = np.repeat([0, 1], [900, 300])
    rows = np.arange(1200)
    found = mixed(rows, entries, [3, 2], seed=0)
    own = [found[entries[found] == entry].tolist() for entry in (0, 1)]
    assert own[1] == list(range(900, 1200)) and own[0] == list(range(len(own[0])))
    assert 0.55 < len(own[0]) / len(found) < 0.65
    assert 0.3 < np.mean(entries[found[:100]]) < 0.5  # mixed from the beginning
    many = keys(rows.tolist())
    whole = divide(
        many, many, heldout=0, most=None, seed=0, shuffle=True, entries=entries, shares=[3, 2]
    )
    left = whole.left_out["beyond data_shares"]
    assert sorted([*whole.train, *left]) == rows.tolist()


def test_a_group_that_does_not_fit_stays_whole() -> None:
    groups = np.array([0] * 8 + [8, 9])
    assert held_out(groups, 3, 0).tolist() == [False] * 8 + [True, True]
