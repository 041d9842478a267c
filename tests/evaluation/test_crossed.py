"""Means over seeds and prompts: mean squares against loops, the bootstrap against its closed form,
the coverage of intervals by simulation, Student's t against its density.
"""

import math
from itertools import product

import numpy as np
import pytest

from ldalign.evaluation.crossed import (
    bootstrap,
    components,
    error,
    estimate,
    mean_squares,
    ratio,
    smallest_difference,
)
from ldalign.evaluation.statistics import holm, incomplete_beta, t_p_value, t_quantile

# -------------------------------------------------------------------------------- Student's t, Holm


def t_tail(t: float, df: float) -> float:
    """Both tails of Student's t by the trapezoidal rule on its density, with x = t + tan u."""
    u = np.linspace(0, math.pi / 2, 400_001)[:-1]
    x = t + np.tan(u)
    log_constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = np.exp(log_constant - (df + 1) / 2 * np.log1p(x**2 / df)) / np.cos(u) ** 2
    return 2 * float(np.trapezoid(density, u))


@pytest.mark.parametrize("df", [1.3, 2.0, 2.7, 6.0, 159.0])
@pytest.mark.parametrize("t", [0.0, 0.4, 2.0, 9.0])
def test_tails_are_those_of_the_density(t: float, df: float) -> None:
    assert t_p_value(np.array(t), np.array(df)) == pytest.approx(t_tail(t, df), rel=1e-4, abs=1e-6)


def test_quantiles_are_those_of_the_tables() -> None:
    """The usual table of Student's t, to its three decimals; the normal's for many degrees."""
    df = np.array([1, 2, 3, 4, 10, 30, 120])
    expected = [12.706, 4.303, 3.182, 2.776, 2.228, 2.042, 1.980]
    assert np.round(t_quantile(0.975, df), 3).tolist() == expected
    assert np.round(t_quantile(0.8, df[:4]), 3).tolist() == [1.376, 1.061, 0.978, 0.941]
    assert float(t_quantile(0.975, np.array(1e7))) == pytest.approx(1.959964, abs=1e-5)
    assert float(t_quantile(0.5, np.array(5.0))) == pytest.approx(0, abs=1e-9)


def test_incomplete_beta_in_closed_forms() -> None:
    """I_x(1, b) = 1 - (1 - x)^b, I_x(a, 1) = x^a, and the symmetry."""
    x, a = np.linspace(0, 1, 21), np.array(3.7)
    one = np.array(1.0)
    np.testing.assert_allclose(incomplete_beta(one, a, x), 1 - (1 - x) ** 3.7, atol=1e-13)
    np.testing.assert_allclose(incomplete_beta(a, one, x), x**3.7, atol=1e-13)
    both = incomplete_beta(a, np.array(0.5), x) + incomplete_beta(np.array(0.5), a, 1 - x)
    np.testing.assert_allclose(both, 1, atol=1e-13)


def test_holm_by_hand() -> None:
    """0.01 x 4, then 0.02 x 3; 0.025 x 2 would be less than that before it; 0.9 x 1."""
    found = holm({"a": 0.025, "b": 0.9, "c": 0.01, "d": 0.02})
    assert found == pytest.approx({"a": 0.06, "b": 0.9, "c": 0.04, "d": 0.06})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


# ----------------------------------------------------------------------------------- mean squares


def tables(
    rng: np.random.Generator,
    count: int,
    seeds: int,
    prompts: int,
    variances: tuple[float, float, float],
) -> np.ndarray:
    """Normal tables (count, seeds, prompts) of mean 0, with these variances of seeds, of prompts
    and of the rest.
    """
    shapes = ((count, seeds, 1), (count, 1, prompts), (count, seeds, prompts))
    return sum(  # type: ignore[return-value]
        math.sqrt(v) * rng.standard_normal(shape)
        for v, shape in zip(variances, shapes, strict=True)
    )


def test_mean_squares_by_loops() -> None:
    x = np.random.default_rng(0).standard_normal((3, 7)) + np.arange(7)
    s, p = x.shape
    rows = [sum(x[i]) / p for i in range(s)]
    columns = [sum(x[:, j]) / s for j in range(p)]
    mean = sum(rows) / s
    rest = sum((x[i, j] - rows[i] - columns[j] + mean) ** 2 for i, j in product(range(s), range(p)))
    m = mean_squares(x)
    assert float(m.seeds) == pytest.approx(p * sum((r - mean) ** 2 for r in rows) / 2)
    assert float(m.prompts) == pytest.approx(s * sum((c - mean) ** 2 for c in columns) / 6)
    assert float(m.rest) == pytest.approx(rest / 12)
    assert m.df == (2, 6, 12) and m.cells == 21
    several = mean_squares(np.stack([x, 2 * x + 5]))
    np.testing.assert_allclose(several.rest, [rest / 12, 4 * rest / 12])


def test_components_have_no_bias() -> None:
    """Over many tables their mean is the truth, and the error's square the variance of the mean."""
    truth = (0.5, 2.0, 3.0)
    x = tables(np.random.default_rng(1), 4000, 6, 12, truth)
    m = mean_squares(x)
    found = [float(part.mean()) for part in components(m)]
    assert found == pytest.approx(truth, rel=0.05)
    variance = 0.5 / 6 + 2.0 / 12 + 3.0 / 72
    assert float(x.mean((1, 2)).var()) == pytest.approx(variance, rel=0.06)
    assert float(np.square(error(m).se).mean()) == pytest.approx(variance, rel=0.04)


def test_errors_in_the_plain_cases() -> None:
    """One seed: the error over prompts. Prompts without any effect: the error over seeds."""
    rng = np.random.default_rng(2)
    one = rng.standard_normal((1, 30))
    found = estimate(one)
    assert found.se == pytest.approx(one.std(ddof=1) / math.sqrt(30))
    assert found.df == pytest.approx(29)
    assert found.seeds == 0 and found.by_seed == [pytest.approx(float(one.mean()))]
    same = np.array([[0.2], [0.9], [0.4]]).repeat(30, 1)
    found = estimate(same)
    assert found.se == pytest.approx(same[:, 0].std(ddof=1) / math.sqrt(3))
    assert found.df == pytest.approx(2)
    assert (found.prompts, found.rest) == pytest.approx((0, 0), abs=1e-12)
    half = float(t_quantile(0.975, np.array(2.0))) * found.se
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    # A gap of 2 everywhere is known without error; one of 0 is no difference.
    assert estimate(np.full((2, 3), 2.0)).p == 0 and estimate(np.zeros((2, 3))).p == 1
    # Gaps of 1, 2, 3 and 3, 2, 1: neither seeds nor prompts have an effect, all is rest.
    crossed = estimate(np.array([[1.0, 2, 3], [3, 2, 1]]))
    assert crossed.value == 2 and crossed.df == pytest.approx(2)
    assert crossed.se == pytest.approx(math.sqrt(2 / 6))


def test_satterthwaite_by_hand() -> None:
    """Mean squares 12, 4 and 2 of 3 seeds and 5 prompts: total 14, df 196 / (72 + 4 + 0.5)."""
    rng, x = np.random.default_rng(3), np.zeros((3, 5))
    rows, columns = np.array([-1.0, 0, 1]), np.array([-2.0, -1, 0, 1, 2])
    rest = rng.standard_normal((3, 5))
    rest -= rest.mean(1, keepdims=True) + rest.mean(0) - rest.mean()
    x += rows[:, None] * math.sqrt(12 * 2 / 5 / 2) + columns * math.sqrt(4 * 4 / 3 / 10)
    x += rest * math.sqrt(2 * 8 / np.square(rest).sum())
    m, e = mean_squares(x), error(mean_squares(x))
    assert [float(m.seeds), float(m.prompts), float(m.rest)] == pytest.approx([12, 4, 2])
    assert float(e.se) == pytest.approx(math.sqrt(14 / 15))
    assert float(e.df) == pytest.approx(196 / 76.5)
    assert [float(part) for part in components(m)] == pytest.approx([2, 2 / 3, 2])


# --------------------------------------------------------------------------------------- coverage

# Variances of seeds, of prompts and of the rest, 40 prompts: none of seeds, some, most.
CASES = [(0, 0, 1), (0, 1, 1), (1 / 40, 0, 1), (3 / 40, 0.5, 1), (0.5, 1, 1), (1, 0, 1), (1, 0, 0)]


@pytest.mark.parametrize("seeds", [3, 4])
@pytest.mark.parametrize("variances", CASES)
def test_intervals_cover(seeds: int, variances: tuple[float, float, float]) -> None:
    """95 % intervals of 3000 tables hold the truth in 90 to 99 %."""
    x = tables(np.random.default_rng(4), 3000, seeds, 40, variances)
    e = error(mean_squares(x))
    inside = np.abs(x.mean((1, 2))) <= t_quantile(0.975, e.df) * e.se
    assert 0.905 <= inside.mean() <= 0.985


def test_an_error_over_prompts_alone_does_not_cover() -> None:
    """What stood here before: where seeds differ it holds the truth less than half the time."""
    x = tables(np.random.default_rng(5), 3000, 3, 40, (0.5, 1, 1))
    alone = x.mean(1).std(1, ddof=1) / math.sqrt(40)
    assert (np.abs(x.mean((1, 2))) <= 1.96 * alone).mean() < 0.6


# -------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("variances", CASES)
def test_the_bootstraps_error_is_that_of_the_components(
    variances: tuple[float, float, float],
) -> None:
    x = tables(np.random.default_rng(6), 4, 3, 40, variances)
    drawn = bootstrap(x, seed=1)
    assert drawn.shape == (4, 4000)
    np.testing.assert_allclose(drawn.std(1), error(mean_squares(x)).se, rtol=0.05)
    np.testing.assert_allclose(drawn.mean(1), x.mean((1, 2)), atol=4e-2)


def test_the_bootstrap_resamples_rows_and_columns() -> None:
    """A loop that picks rows and columns, the same for all cells, varies by the closed form of
    resampling as it stands: A too small, E up to three times over. Ours varies by the components.
    """
    x = tables(np.random.default_rng(7), 1, 4, 9, (1, 1, 1))[0]
    seeds = np.random.default_rng(8)
    picks = [(seeds.integers(0, 4, 4), seeds.integers(0, 9, 9)) for _ in range(20_000)]
    naive = np.array([x[np.ix_(rows, columns)].mean() for rows, columns in picks])
    m = mean_squares(x)
    s, p = 4, 9
    closed = (s - 1) * m.seeds / (s * s * p) + (p - 1) * m.prompts / (p * p * s)
    closed += (s - 1) * (p - 1) * m.rest / (s * p) ** 2
    assert naive.var() == pytest.approx(float(closed), rel=0.04)
    assert bootstrap(x, draws=20_000).var() == pytest.approx(float(error(m).se) ** 2, rel=0.04)
    assert (bootstrap(x, 3) == bootstrap(x, 3)).all() and (bootstrap(x, 3) != bootstrap(x, 4)).any()


def test_many_seeds_and_prompts_make_the_two_intervals_one() -> None:
    x = tables(np.random.default_rng(9), 1, 60, 80, (1, 1, 1))[0]
    found = estimate(x)
    low, high = np.quantile(bootstrap(x, draws=10_000), [0.025, 0.975])
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.1 * found.se)


# ----------------------------------------------------------------------------------- ratios, power


def test_ratios_cover() -> None:
    """4 seeds, true ratio 0.4, most of the error the denominator's: Fieller's interval holds it in
    90 to 99 % of 120 tables.
    """
    rng, hits, made = np.random.default_rng(10), 0, 0
    for _ in range(120):
        below = 1 + tables(rng, 1, 4, 40, (0.02, 0.3, 1))[0]
        above = 0.4 + tables(rng, 1, 4, 40, (0.0005, 0.01, 0.05))[0]
        if found := ratio(above, below):
            made += 1
            hits += found.low <= 0.4 <= found.high
            assert found.low < found.value < found.high
    assert made > 115 and 0.9 <= hits / made <= 0.99


def test_ratios_of_many_are_as_the_bootstrap_has_them() -> None:
    rng = np.random.default_rng(11)
    below = 2 + tables(rng, 1, 50, 60, (0.2, 0.3, 1))[0]
    above = 0.5 * below + tables(rng, 1, 50, 60, (0.2, 0.1, 0.5))[0]
    found = ratio(above, below)
    drawn = bootstrap(np.stack([above, below]), draws=10_000)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    assert found
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_ratios_at_the_ends() -> None:
    x = tables(np.random.default_rng(12), 2, 4, 40, (0.02, 0.3, 1))
    assert ratio(1 + x[0], x[1]) is None
    # What goes along with the denominator in every cell has a sure share of it.
    for below in (np.full((3, 5), 4.0), 1 + x[0]):
        sure = ratio(0.25 * below, below)
        assert sure
        assert (sure.low, sure.value, sure.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_power_by_simulation() -> None:
    """Of tables whose true mean is the smallest difference to be seen, 80 % are found."""
    variances = (0.0, 1.0, 1.0)
    se = math.sqrt(1 / 40 + 1 / 160)
    true = smallest_difference(se, 39)
    assert true == pytest.approx((2.0227 + 0.8512) * se, rel=1e-3)
    x = true + tables(np.random.default_rng(13), 3000, 4, 40, variances)
    e = error(mean_squares(x))
    found = (x.mean((1, 2)) > t_quantile(0.975, e.df) * e.se).mean()
    assert 0.75 <= found <= 0.85
