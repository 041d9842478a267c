"""The held-out figures of a guide, against plain loops over rows, sides and tokens."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from tiny_guides import pairs, stir, text_guide

from ldalign.data.pairs import Pair
from ldalign.evaluation.guide import (
    explained,
    first_difference,
    heldout_figures,
    sentence,
    tells_apart,
)
from ldalign.models.guide import Guide, Latent, Reading

KINDS: list[dict[str, Any]] = [
    {},
    {"readout": "queries", "injection": "both", "latent_tokens": 3},
]


def rows(guide: Guide) -> list[Pair]:
    """Eight rows: ended and cut responses, two alike, one the beginning of the other's."""
    texts = pairs(guide, 4)
    end = guide.end_id
    return [
        *texts,
        Pair("cut", [7, 8, 9], [20, 21, 22, 23, 24, 25], [20, 21, end]),
        Pair("same", [7, 8], [20, 21, end], [20, 21, end]),
        Pair("beginning", [7], [30, 31, 32, 33, 34, 35, 36], [30, 31, 32]),
        Pair("first token", [7, 9, 7], [40], [41, 42, end]),
    ]


@pytest.fixture(scope="module", params=KINDS, ids=["plain", "queries and prefix"])
def guide(request: pytest.FixtureRequest) -> Guide:
    return stir(text_guide(**request.param), 0.6)


def plainly(guide: Guide, chosen: list[Pair], others: list[int]) -> dict[str, float]:
    """The figures by loops, each response read by itself with each latent; others: by row, the one
    whose latents stand for another row's.
    """
    with torch.no_grad():
        z = [guide.encode([p]) for p in chosen]

        def logps(p: int, side: int, latent: torch.Tensor) -> list[float]:
            table = torch.stack([latent, latent])
            found = guide.decode([chosen[p]], table, [Reading(side, side)])
            return [float(x) for x in found.double()]

        sums: dict[str, float] = {"true": 0.0, "other": 0.0, "none": 0.0}
        gains: dict[str, list[float]] = {
            name: []
            for name in ("sibling_gain", "first_gain", "own_better", "other_gain", "none_gain")
        }
        tokens = 0
        for p, pair in enumerate(chosen):
            of_row: dict[str, list[float]] = {name: [] for name in gains}
            for side, y in enumerate(pair.responses):
                tokens += len(y)
                true = logps(p, side, z[p][side])
                other = logps(p, side, z[others[p]][side])
                none = logps(p, side, guide.latent.null)
                sibling = logps(p, side, z[p][1 - side])
                for name, found in (("true", true), ("other", other), ("none", none)):
                    sums[name] -= math.fsum(found)
                of_row["other_gain"].append(math.fsum(true) - math.fsum(other))
                of_row["none_gain"].append(math.fsum(true) - math.fsum(none))
                if pair.real == pair.generated:
                    continue
                gain = math.fsum(true) - math.fsum(sibling)
                of_row["sibling_gain"].append(gain)
                of_row["own_better"].append(1.0 if gain > 0 else 0.0)
                for t, token in enumerate(y):
                    theirs = pair.responses[1 - side]
                    if t >= len(theirs) or theirs[t] != token:
                        of_row["first_gain"].append(true[t] - sibling[t])
                        break
            for name, values in of_row.items():
                if values:
                    gains[name].append(statistics.fmean(values))
    figures = {name: value / tokens for name, value in sums.items()}
    figures["latent_gain"] = figures["other"] - figures["true"]
    for name, values in gains.items():
        figures[name] = statistics.fmean(values)
        figures[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values))
    differ = [p for p, pair in enumerate(chosen) if pair.real != pair.generated]
    d = [math.dist(*z[p].double().tolist()) for p in differ]
    figures |= {"rows": len(chosen), "differing": len(differ)}
    figures["ess"] = math.fsum(d) ** 2 / math.fsum(x * x for x in d) / len(d)
    lengths = [[len(y) for y in chosen[p].responses] for p in differ]
    ends = [[y[-1] == guide.end_id for y in chosen[p].responses] for p in differ]
    gaps = [float(abs(a - b)) for a, b in lengths]
    figures["length_share"] = statistics.correlation(d, gaps) ** 2
    figures["cut_share"] = statistics.correlation(d, [float(2 - sum(e)) for e in ends]) ** 2
    return figures


def test_the_figures_are_those_of_plain_loops(guide: Guide) -> None:
    """One row of the eight has no sibling to be told from; in one a response begins the other."""
    chosen = rows(guide)
    figures = heldout_figures(guide, chosen, 100_000)
    expected = plainly(guide, chosen, [1, 2, 3, 4, 5, 6, 7, 0])
    assert figures.keys() == expected.keys()
    assert figures == pytest.approx(expected, rel=1e-3, abs=2e-5)
    assert (figures["rows"], figures["differing"]) == (8, 7)
    named = ("sibling_gain", "first_gain", "other_gain", "none_gain", "latent_gain")
    assert all(abs(figures[name]) > 5e-4 for name in named)
    assert 0 < figures["own_better"] < 1 and 0.2 < figures["ess"] < 1
    assert max(figures["length_share"], figures["cut_share"]) > 1e-2
    assert set(sentence(figures).replace("%", "").split()) >= {
        f"{figures['sibling_gain']:+.3f}",
        f"{figures['none_gain_se']:.3f},",
        "7",
        "rows",
    }


def test_the_budget_changes_nothing_but_the_other_row(guide: Guide) -> None:
    """Small runs have two rows at least: each is the other's other row."""
    chosen = rows(guide)
    figures = heldout_figures(guide, chosen, 1)
    expected = plainly(guide, chosen, [1, 0, 3, 2, 5, 4, 7, 6])
    assert figures == pytest.approx(expected, rel=1e-3, abs=2e-5)
    assert abs(figures["other"] - heldout_figures(guide, chosen, 100_000)["other"]) > 1e-4
    assert heldout_figures(guide, chosen[:3], 1)["rows"] == 3


def test_rows_whose_responses_are_alike_say_nothing(guide: Guide) -> None:
    alike = [Pair(p.id, p.prompt, p.real, p.real) for p in rows(guide)]
    figures = heldout_figures(guide, alike, 1000)
    assert figures["differing"] == 0 and figures["sibling_gain"] == 0.0 == figures["own_better"]
    assert "ess" not in figures and not tells_apart(figures) and sentence(figures)


def test_a_latent_without_use_ties(guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own latent is as good as any: no gain, and half of all responses are better with it."""
    m = guide.config.latent_tokens if guide.config.readout == "queries" else 1
    monkeypatch.setattr(
        Latent, "read", lambda self, states: self.null.expand(len(states) // m, -1).clone()
    )
    figures = heldout_figures(guide, rows(guide), 100_000)
    for name in ("sibling_gain", "first_gain", "other_gain", "none_gain", "latent_gain"):
        assert figures[name] == pytest.approx(0.0, abs=1e-5), name
    assert not tells_apart(figures)


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([4], [5, 6], 0),
        ([], [1], 0),
    ],
)
def test_the_first_difference(a: list[int], b: list[int], place: int) -> None:
    assert first_difference(a, b) == place


@pytest.mark.parametrize(
    ("gain", "error", "rows", "told"),
    [
        (1.0, 0.5, 9, True),
        (1.0, 0.501, 9, False),
        (0.0, 0.0, 9, False),
        (-1.0, 0.1, 9, False),
        (0.2, 0.0, 2, True),
        (0.2, 0.0, 1, False),  # a row alone has no standard error
        (math.nan, 0.1, 9, False),
        (1.0, math.nan, 9, False),
    ],
)
def test_two_standard_errors_above_zero_tell_apart(
    gain: float, error: float, rows: int, told: bool
) -> None:
    figures = {"sibling_gain": gain, "sibling_gain_se": error, "differing": rows}
    assert tells_apart(figures) == told


def test_explained_variance_is_r_squared() -> None:
    draw = np.random.default_rng(0)
    by = draw.normal(size=50)
    values = 2 * by + draw.normal(size=50)
    slope, level = np.polyfit(by, values, 1)
    rest = values - slope * by - level
    assert explained(values, by) == pytest.approx(1 - rest.var() / values.var())
    assert explained(3 - 2 * by, by) == pytest.approx(1.0)
    assert explained(values, np.ones(50)) == 0.0 == explained(np.ones(50), values)
    assert explained(values[:2], by[:2]) == 0.0
