"""Correlations, intervals and weights against hand-made numbers; the join of a run by row id."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ldalign.data.pairs import Pair
from ldalign.evaluation.statistics import mean_relative_gain, ranks, spearman, superiority
from ldalign.report.analysis import RunPairs, concentration, read_pairs, summarise, top_share
from ldalign.run.stages.distances import _distance_summary


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_ranks_share_ties() -> None:
    assert ranks(array(10, 30, 20, 30, 5)).tolist() == [2, 4.5, 3, 4.5, 1]


def test_spearman_by_hand() -> None:
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)); rank differences 0, -1, 1, 0, -1, 1: 1 - 24 / 210
    found = spearman(array(1, 2, 3, 4, 5, 6), array(10, 30, 20, 40, 60, 50))
    assert found and found.value == pytest.approx(1 - 24 / 210) and found.n == 6
    error = math.sqrt((1 + found.value**2 / 2) / 3)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.value) - 1.959964 * error))
    assert found.high == pytest.approx(math.tanh(math.atanh(found.value) + 1.959964 * error))


def test_spearman_against_brute_force_with_ties() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 4, 40).astype(float)

    def slow_ranks(values: np.ndarray) -> np.ndarray:
        return array(*((values < v).sum() + ((values == v).sum() + 1) / 2 for v in values))

    a, b = slow_ranks(x) - slow_ranks(x).mean(), slow_ranks(y) - slow_ranks(y).mean()
    found = spearman(x, y)
    assert found and found.value == pytest.approx(
        (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
    )


def test_spearman_says_nothing_without_numbers() -> None:
    assert spearman(array(1, 2, 3, 4), array(1, 2, 3, 4)) is None
    assert spearman(array(1, 2, 3, 4, 5), array(7, 7, 7, 7, 7)) is None
    nan = math.nan
    assert spearman(array(1, 2, 3, 4, 5, 6), array(1, nan, nan, 4, 5, 6)) is None
    found = spearman(array(1, 2, 3, 4, 5, 6), array(2, 4, 6, 8, 10, nan))
    assert (
        found
        and found.n == 5
        and found.value == pytest.approx(1)
        and 0.99 < found.low <= found.high <= 1
    )


def test_the_interval_covers() -> None:
    """95 % intervals of 400 samples of correlated normals hold the true rank
    correlation about 95 times in 100.
    """
    rng, rho = np.random.default_rng(0), 0.5
    true = 6 / math.pi * math.asin(rho / 2)
    hits = 0
    for _ in range(400):
        x = rng.standard_normal(60)
        found = spearman(x, rho * x + math.sqrt(1 - rho**2) * rng.standard_normal(60))
        assert found
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_superiority_against_brute_force_and_its_interval() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, 30).astype(float), rng.integers(0, 7, 20).astype(float)
    found = superiority(a, b)
    wins = [(x > y) + 0.5 * (x == y) for x, y in product(a, b)]
    assert found and found.value == pytest.approx(np.mean(wins)) and found.n == 50
    table = np.array(wins).reshape(30, 20)  # DeLong: variances of the row and of the column means
    error = math.sqrt(table.mean(1).var(ddof=1) / 30 + table.mean(0).var(ddof=1) / 20)
    assert found.high - found.value == pytest.approx(1.959964 * error)
    assert superiority(a[:4], b) is None


def test_concentration() -> None:
    assert concentration(array(1, 6, 3)).tolist() == [0, 0.6, 0.9, 1]
    assert top_share(array(*[1.0] * 20)) == pytest.approx(0.1)
    assert top_share(array(9, *[1.0] * 9)) == pytest.approx(0.5)
    assert top_share(array()) == 0 and top_share(array(0, 0)) == 0


def test_what_explains_the_distances_of_an_iteration() -> None:
    """R squared of a straight line, in the difference of lengths and in the number of responses
    without an end token (0), against least squares; of the kept pairs alone.
    """
    rng = np.random.default_rng(5)
    pairs, gaps, cuts = [], [], []
    for i in range(40):
        real = [7] * int(rng.integers(1, 9)) + [0] * int(rng.integers(0, 2))
        generated = [8] * int(rng.integers(1, 9)) + [0] * int(rng.integers(0, 2))
        pairs.append(Pair(str(i), [1], real, generated))
        gaps.append(abs(len(real) - len(generated)))
        cuts.append((real[-1] != 0) + (generated[-1] != 0))
    distances = array(*(3 + 0.4 * gap + rng.normal() for gap in gaps))
    kept = [i % 4 != 1 for i in range(40)]

    def share(by: list[int]) -> float:
        x, y = np.array(by, dtype=float)[kept], distances[kept]
        left = y - np.polyval(np.polyfit(x, y, 1), x)
        return float(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum())

    d, ones = torch.from_numpy(distances), torch.ones(40)
    found = _distance_summary(d, ones, pairs, kept, (0, 99))
    assert found["distance/length_share"] == pytest.approx(share(gaps)) and share(gaps) > 0.1
    assert found["distance/cut_share"] == pytest.approx(share(cuts))
    assert found["distance/mean"] == pytest.approx(distances[kept].mean())
    same = _distance_summary(torch.ones(40).double(), ones, pairs, kept, (0,))
    assert same["distance/length_share"] == same["distance/cut_share"] == 0.0
    assert _distance_summary(d, ones, pairs, [False] * 40, (0,)) == {}


# (TruthfulQA, PIQA, HellaSwag, ARC, OpenbookQA, GSM8k, MuTual) of the paper's table
SCORES = {
    "sft": (43.7, 82.1, 62.1, 55.7, 30.8, 44.4, 63.5),
    "spin": (48.7, 81.7, 65.1, 60.4, 33.6, 45.4, 61.2),
    "iteration 2": (50.3, 82.5, 66.2, 60.7, 33.2, 45.9, 63.3),
}


@pytest.mark.parametrize(("name", "gain"), [("spin", 4.56), ("iteration 2", 6.00)])
def test_mean_relative_gain_is_the_papers(name: str, gain: float) -> None:
    base, scores = (dict(zip("abcdefg", SCORES[n], strict=True)) for n in ("sft", name))
    found = mean_relative_gain(scores, base)
    assert found is not None and round(100 * found, 2) == gain
    assert (
        mean_relative_gain(scores, {}) is None and mean_relative_gain({"a": 1}, {"a": 0.0}) is None
    )


# ----------------------------------------------------------------------------------------- the join


def lines(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three pairs whose files hold them in different orders; c's responses are equal."""

    def row(id_: str, real: str, **more: str) -> dict[str, object]:
        messages = [
            {"role": "user", "content": f"ask {id_}"},
            {"role": "assistant", "content": real},
        ]
        return {"id": id_, "messages": messages, **more}

    lines(
        tmp_path / "data/train.jsonl",
        row("a", "Answer: 2", kind="arithmetic", answer="2"),
        row("b", "yes"),
        row("c", "same"),
        row("unused", "x"),
    )
    folder = tmp_path / "iteration_0"
    lines(
        folder / "responses/responses.jsonl",
        {"id": "c", "response": "same", "finish_reason": "stop", "n_tokens": 2},
        {"id": "a", "response": "Answer: 2", "finish_reason": "length", "n_tokens": 4},
        {"id": "b", "response": "no, never", "finish_reason": "stop", "n_tokens": 5},
    )
    lines(
        folder / "distances/distances.jsonl",
        *(
            {"id": i, "distance": d, "weight": w}
            for i, d, w in (("a", 1.5, 0.5), ("b", 4.5, 1.5), ("c", 0, 0))
        ),
    )
    (folder / "reference").mkdir()
    (folder / "reference/rows.json").write_text('["b", "a"]')
    save_file(
        {"logps": np.array([[-1.0, -10.0], [-2.0, -8.0]])},
        folder / "reference/reference.safetensors",
    )
    lines(folder / "pair_rewards/rewards.jsonl", {"id": "b", "generated": 0.25, "real": 1.0})
    return tmp_path


def same(found: np.ndarray, *expected: float) -> None:
    np.testing.assert_array_equal(found, np.array(expected))


def joined(run: Path) -> RunPairs:
    pairs = read_pairs(run, 0)
    assert pairs
    return pairs


def test_rows_are_joined_by_id(run: Path) -> None:
    pairs, nan = joined(run), math.nan
    assert pairs.ids == ["c", "a", "b"] and pairs.prompts == ["ask c", "ask a", "ask b"]
    assert pairs.real == ["same", "Answer: 2", "yes"] and pairs.generated == [
        "same",
        "Answer: 2",
        "no, never",
    ]
    same(pairs.tokens, 2, 4, 5)
    same(pairs.trained, False, True, True)  # what the reference stage scored
    same(pairs.distance, 0, 1.5, 4.5)
    same(pairs.weight, 0, 0.5, 1.5)
    same(pairs.logp_real, nan, -2, -1)
    same(pairs.nll, nan, 2, 2)
    # no checker for b and c; a was cut, and what does not end is no answer
    same(pairs.right, nan, 0, nan)
    same(pairs.reward_real - pairs.reward_generated, nan, nan, 0.75)
    same(pairs.length_gap, 0, 0, 6)


def test_weights_are_summed_up_over_trained_pairs(run: Path) -> None:
    found = summarise(joined(run))
    assert found["pairs"] == 2 and found["spearman"] == {}
    assert found["weight/ess"] == pytest.approx(2**2 / (0.5**2 + 1.5**2) / 2)
    assert found["weight/top10_share"] == pytest.approx(0.75)


def test_what_is_not_there_yet_is_nan(run: Path) -> None:
    for name in ("distances", "reference", "pair_rewards"):
        (run / "iteration_0" / name).rename(run / f"away-{name}")
    pairs = joined(run)
    assert (
        np.isnan(pairs.distance).all()
        and np.isnan(pairs.nll).all()
        and np.isnan(pairs.reward_real).all()
    )
    same(pairs.trained, False, False, True)  # by the texts
    assert summarise(pairs) == {"pairs": 1}
    assert read_pairs(run, 1) is None
