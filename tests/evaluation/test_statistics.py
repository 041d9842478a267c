"""Shares, means and ranks with their errors, against equations that they solve and small cases by
hand. The rest of the module has its tests in test_crossed.py and tests/report/test_analysis.py.
"""

import math
from statistics import NormalDist, mean, variance

import numpy as np
import pytest

from ldalign.evaluation.statistics import (
    NORMAL_95,
    incomplete_beta,
    mean_relative_gain,
    ratio_error,
    spearman,
    standard_error,
    superiority,
    wilson,
)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(("hits", "count"), [(3, 4), (1, 5), (40, 50), (7, 1000)])
def test_wilsons_bounds_are_the_shares_that_the_score_test_just_accepts(
    hits: int, count: int
) -> None:
    """|hits / count - p| is 1.96 errors of a share p, for both bounds."""
    low, high = wilson(hits, count)
    assert 0 < low < hits / count < high < 1
    for p in (low, high):
        errors = (hits / count - p) / math.sqrt(p * (1 - p) / count)
        assert abs(errors) == pytest.approx(NORMAL_95)


def test_95_percent_of_a_normal() -> None:
    assert pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-6) == NORMAL_95


def test_wilsons_interval_of_none_and_of_all() -> None:
    z2 = NORMAL_95**2
    for count in range(1, 200):
        low, high = wilson(0, count)
        assert 0 <= low < 1e-12 and high == pytest.approx(z2 / (count + z2))
        below, above = wilson(count, count)
        assert 1 - 1e-12 < above <= 1 and below == pytest.approx(1 - high)


def test_the_error_of_a_mean() -> None:
    assert standard_error(array(1, 3)) == pytest.approx(1)  # deviation sqrt(2), over sqrt(2)
    assert standard_error(array(5)) == standard_error(array()) == 0.0


def test_the_error_of_a_ratio() -> None:
    values = array(1, 4, 2, 7, 3)
    same = ratio_error(values, np.full(5, 2.5))  # sizes alike: a mean's error
    assert same == pytest.approx(standard_error(values / 2.5))
    assert ratio_error(3 * values, values) == pytest.approx(0, abs=1e-12)
    # 0.25, from which the rows are 0.75 and -0.75 away: sqrt(2 (0.75^2 + 0.75^2)) / 4
    assert ratio_error(array(1, 0), array(1, 3)) == pytest.approx(0.375)
    assert ratio_error(array(2), array(3)) == 0.0


def test_spearman_mirrored() -> None:
    """The other way round it is the opposite, the interval too; a constant side says nothing."""
    x, y = array(1, 2, 3, 4, 5, 6), array(10, 30, 20, 40, 60, 50)
    one, other = spearman(x, y), spearman(x, -y)
    assert one and other and one.value > 0.8 and one.low < one.value < one.high < 1
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))
    assert spearman(np.full(6, 7.0), y) is None


def test_a_perfect_order_is_1() -> None:
    for n in range(5, 60):
        for sign in (1, -1):
            found = spearman(np.arange(n) ** 1.5, sign * np.arange(n) ** 3.0)
            assert found and found.value == pytest.approx(sign)
            assert -1 <= found.low <= found.high <= 1 and abs(found.value) <= 1
            assert sign * found.value > 0.99 and min(abs(found.low), abs(found.high)) > 0.99


def test_superiority_by_hand() -> None:
    """23 of 25 pairs won, one of them a tie: 0.94; the interval ends at 0 and at 1."""
    a, b = array(2, 3, 4, 5, 6), array(0, 0, 1, 1, 4)
    found = superiority(a, b)
    assert found and found.value == pytest.approx((5 * 4 + 2 + 0.5) / 25) and found.n == 10
    assert found.high == 1.0 and 0 < found.low < found.value
    other = superiority(b, a)
    assert other and (other.value, other.low) == (pytest.approx(1 - found.value), 0.0)
    assert other.high == pytest.approx(1 - found.low)
    assert superiority(a, b[:4]) is None and superiority(a[:4], b) is None
    sure = superiority(a + 10, b)
    assert sure and (sure.value, sure.low, sure.high) == (1.0, 1.0, 1.0)


def test_superiority_has_delongs_error() -> None:
    """By the shares of each value, one after the other, and their unbiased variances."""
    a, b = array(1, 5, 2, 8, 3, 7), array(4, 0, 6, 2, 1)

    def won(x: float, y: float) -> float:
        return 1.0 if x > y else 0.5 if x == y else 0.0

    of_a = [sum(won(x, y) for y in b) / 5 for x in a]
    of_b = [sum(won(x, y) for x in a) / 6 for y in b]
    half = NORMAL_95 * math.sqrt(variance(of_a) / 6 + variance(of_b) / 5)
    found = superiority(a, b)
    assert found and found.value == pytest.approx(mean(of_a))
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, min(1, found.value + half))
    )


def test_a_correlation_is_never_above_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's may be, by a last bit."""
    for r in (1 + 2e-16, -1 - 2e-16):
        monkeypatch.setattr(np, "corrcoef", lambda x, y, r=r: np.array([[1, r], [r, 1]]))
        found = spearman(np.arange(9.0), np.arange(9.0))
        assert found and abs(found.value) == 1


def test_relative_gains() -> None:
    base = {"a": 2.0, "b": 0.0, "c": 4.0}
    assert mean_relative_gain({"a": 3.0, "b": 1.0, "c": 3.0, "d": 9.0}, base) == 0.125
    assert mean_relative_gain({"b": 1.0, "d": 2.0}, base) is None


def test_incomplete_beta_of_whole_numbers() -> None:
    """I_x(a, b) is the chance of a or more hits in a + b - 1 trials of chance x."""
    x = np.linspace(0, 1, 41)
    for a, b in ((1, 1), (2, 3), (5, 2), (4, 9), (30, 12)):
        n = a + b - 1
        chance = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
        found = incomplete_beta(array(a), array(b), x)
        np.testing.assert_allclose(found, chance, rtol=1e-12, atol=1e-14)
