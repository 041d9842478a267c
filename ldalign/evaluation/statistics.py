"""Statistics of evaluation and report: ranks, shares and means, with their errors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NORMAL_95 = 1.959964  # half the width of a 95 % interval, in standard errors
FEWEST = 5  # rows, below which an interval means nothing


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, from n rows."""

    value: float
    low: float
    high: float
    n: int


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of independent values (N,); 0 for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def ratio_error(values: np.ndarray, sizes: np.ndarray) -> float:
    """Returns the standard error of sum(values) / sum(sizes), of N independent rows (N,), by the
    delta method; 0 for fewer than two.
    """
    n = len(values)
    if n < 2:
        return 0.0
    rest = values - values.sum() / sizes.sum() * sizes
    return float(math.sqrt(n / (n - 1) * (rest**2).sum()) / sizes.sum())


def ranks(values: Array) -> Array:
    """Ranks values from 1; equal values share the mean of their ranks. (N,) -> (N,)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: Array = (counts.cumsum() - (counts - 1) / 2)[place]
    return shared


def spearman(x: Array, y: Array) -> Estimate | None:
    """Estimates Spearman's rank correlation of (N,) and (N,); rows with a NaN are left out.

    The interval is Fisher's z with Bonett and Wright's error, sqrt((1 + r^2 / 2) / (n - 3))
    (Psychometrika 65, 2000). None where fewer than FEWEST rows are left or one side is constant.
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    n = len(x)
    if n < FEWEST or x.min() == x.max() or y.min() == y.max():
        return None
    r = float(np.corrcoef(ranks(x), ranks(y))[0, 1])
    r = max(-1.0, min(1.0, r))
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
    error = math.sqrt((1 + r * r / 2) / (n - 3))
    return Estimate(r, math.tanh(z - NORMAL_95 * error), math.tanh(z + NORMAL_95 * error), n)


def superiority(a: Array, b: Array) -> Estimate | None:
    """Estimates the probability that a value of `a` exceeds one of `b`, where a tie counts half.

    It is the area under the ROC curve. The interval is normal with DeLong's error (Biometrics 44,
    1988). None where one side has fewer than FEWEST rows.
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    together = ranks(np.concatenate([a, b]))
    above = (together[: len(a)] - ranks(a)) / len(b)  # for each of a: the share of b below it
    below = 1 - (together[len(a) :] - ranks(b)) / len(a)  # for each of b: the share of a above it
    value = float(above.mean())
    half = NORMAL_95 * math.sqrt(above.var(ddof=1) / len(a) + below.var(ddof=1) / len(b))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), len(a) + len(b))


def mean_relative_gain(scores: Mapping[str, float], base: Mapping[str, float]) -> float | None:
    """Returns the mean of score / base - 1 over the scores that both have, as in the paper's table.

    None where there is no such score; a base of 0 has no relative gain.
    """
    gains = [scores[key] / base[key] - 1 for key in scores if base.get(key)]
    return sum(gains) / len(gains) if gains else None


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % score interval of a share, `hits` of `count`.

    It holds near 0 and 1 and for few trials, unlike the share +- 2 errors.
    """
    share, z2 = hits / count, NORMAL_95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    reach = NORMAL_95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def incomplete_beta(a: Array, b: Array, x: Array) -> Array:
    """Regularised incomplete beta function I_x(a, b), element by element; a, b > 0, 0 <= x <= 1.

    By its continued fraction (DLMF 8.17.22), evaluated by Lentz's method on the side of the mean
    where it converges fast: to about 1e-14.
    """
    a, b, x = (np.array(v, dtype=np.float64) for v in np.broadcast_arrays(a, b, x))
    flip = x > (a + 1) / (a + b + 2)
    a, b, x = np.where(flip, b, a), np.where(flip, a, b), np.where(flip, 1 - x, x)
    tiny = 1e-300
    c, d = np.ones_like(x), 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    fraction = d.copy()
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            d = 1 / _away(1 + step * d, tiny)
            c = _away(1 + step / c, tiny)
            fraction *= c * d
        if (np.abs(c * d - 1) < 1e-15).all():
            break
    with np.errstate(divide="ignore"):  # log 0 at the ends, where the front is 0
        front = a * np.log(x) + b * np.log1p(-x) - _log_beta(a, b)
    below = np.exp(front) * fraction / a
    return np.where(flip, 1 - below, below)


def _away(values: Array, tiny: float) -> Array:
    """Values with `tiny` in place of 0."""
    return np.where(values == 0, tiny, values)


def _log_beta(a: Array, b: Array) -> Array:
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    out: Array = log_gamma(a) + log_gamma(b) - log_gamma(a + b)
    return out


def t_p_value(t: Array, df: Array) -> Array:
    """The two-sided p-value of Student's t with df degrees of freedom, which need not be whole."""
    half = np.array(0.5)
    return incomplete_beta(np.asarray(df) / 2, half, df / (df + np.square(t)))


def t_quantile(share: float, df: Array) -> Array:
    """The value below which Student's t with df degrees of freedom lies with probability `share`,
    at least 0.5.

    By Newton's method from 0: the tail is convex there, so the steps never pass the root.
    """
    df = np.asarray(df, dtype=np.float64)
    half = np.array(0.5)
    t = np.zeros_like(df)
    for _ in range(200):
        log_density = -(df + 1) / 2 * np.log1p(t**2 / df) - np.log(df) / 2 - _log_beta(df / 2, half)
        step = (t_p_value(t, df) - 2 * (1 - share)) / (2 * np.exp(log_density))
        t = t + step
        if (np.abs(step) <= 1e-12 * t).all():
            break
    return t


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusts the p-values of a family of tests by Holm's method (Scandinavian Journal of
    Statistics 6, 1979): those below 0.05 hold together, with at most 5 % chance of any false one.

    The k-th smallest of n is multiplied by n - k + 1, and none falls below a smaller one's.
    """
    adjusted: dict[str, float] = {}
    most = 0.0
    for k, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        most = max(most, min(1.0, (len(p_values) - k) * p_values[name]))
        adjusted[name] = most
    return {name: adjusted[name] for name in p_values}
