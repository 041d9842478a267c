"""Judge agreement (LD-Align, arXiv 2404.06390, section 5.2): does latent distance know quality?

A policy answers each held-out prompt twice. The guide calls the sample farther from the real
response the worse one; a judge says which is better. The rate at which they agree is over pairs on
which both decide, with Wilson's 95 % interval (1927; prompts are independent, one pair each), and
over the half of them of which the judge is surest. Chance is 1/2. Beside it stand the rates of what
needs no trained guide, on the same pairs (`RIVALS`), and how much better or worse they are, paired.
Here are the figures; run/stages/agreement.py makes the pairs.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldalign.evaluation.statistics import standard_error, wilson
from ldalign.system.metrics import Metrics

CHANCE = 0.5
# What else may call a sample the worse one, and how a reader calls it.
RIVALS = {
    "untrained": "the guide before training",
    "pooled": "the policy's mean states",
    "nll": "NLL under the policy (higher is worse)",
    "length": "length (longer is worse)",
}


def verdict(record: Mapping[str, Any]) -> str:
    """Says of a judged pair: agree, disagree, or why it does not count.

    That is identical (two equal samples), none (no verdict of the judge) or tie (the judge's, or
    equal distances).
    """
    if record["first"] == record["second"]:
        return "identical"
    if record["preference"] is None:
        return "none"
    return _side(record, record["first_distance"], record["second_distance"])


def _side(record: Mapping[str, Any], first: float, second: float) -> str:
    """Whether "farther is worse" agrees with the judge; of two distances, or their stand-ins."""
    judged, nearer = record["preference"] - 0.5, second - first
    # both are positive where the first sample is the better one
    if judged == 0 or nearer == 0:
        return "tie"
    return "agree" if (judged > 0) == (nearer > 0) else "disagree"


def summary(records: Sequence[Mapping[str, Any]]) -> Metrics:
    """Sums up judged pairs; a rate is left out where no pair decides it.

    agreement/rate is the guide's, agreement/sure_rate that of the surer half of its pairs,
    agreement/NAME_rate a rival's; each with low and high. agreement/NAME_behind is the guide's rate
    less the rival's, on the pairs that both decide, with its standard error NAME_behind_se.
    """
    count = Counter(record["verdict"] for record in records)
    decided = [r for r in records if r["verdict"] in ("agree", "disagree")]
    out: Metrics = {
        "agreement/prompts": len(records),
        "agreement/rows": len(decided),
        "agreement/ties": count["tie"],
        "agreement/no_verdict": count["none"],
        "agreement/identical": count["identical"],
        "agreement/chance": CHANCE,
    }
    sure = surer_half(decided)
    for prefix, rows in (("agreement/", decided), ("agreement/sure_", sure)):
        out[f"{prefix}rows"] = len(rows)
        out |= _rate(prefix, [r["verdict"] == "agree" for r in rows])
    for name in RIVALS:
        for prefix, rows in ((name, decided), (f"{name}_sure", sure)):
            pairs = [
                (r["verdict"] == "agree", side == "agree")
                for r in rows
                if f"first_{name}" in r
                and (side := _side(r, r[f"first_{name}"], r[f"second_{name}"])) != "tie"
            ]
            out[f"agreement/{prefix}_rows"] = len(pairs)
            out |= _rate(f"agreement/{prefix}_", [theirs for _, theirs in pairs])
            if pairs:
                gaps = np.array([float(ours) - float(theirs) for ours, theirs in pairs])
                out[f"agreement/{prefix}_behind"] = float(gaps.mean())
                out[f"agreement/{prefix}_behind_se"] = standard_error(gaps)
    return out


def surer_half(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The half of the decided pairs that the judge is surest of; all where it is always as sure."""
    sureness = [abs(r["preference"] - 0.5) for r in records]
    if not records or min(sureness) == max(sureness):
        return list(records)
    bound = sorted(sureness, reverse=True)[max(0, len(records) // 2 - 1)]
    return [r for r, sure in zip(records, sureness, strict=True) if sure >= bound]


def _rate(prefix: str, hits: Sequence[bool]) -> Metrics:
    if not hits:
        return {}
    low, high = wilson(sum(hits), len(hits))
    return {f"{prefix}rate": sum(hits) / len(hits), f"{prefix}low": low, f"{prefix}high": high}


def lines(metrics: Mapping[str, float]) -> list[str]:
    """The figures as lines to read: the guide's, then each rival's."""
    rest = (
        f"of {metrics['agreement/prompts']:.0f} prompts; {metrics['agreement/ties']:.0f} ties, "
        f"{metrics['agreement/no_verdict']:.0f} without verdict, "
        f"{metrics['agreement/identical']:.0f} identical"
    )
    if "agreement/rate" not in metrics:
        return [f"agreement: no pair was decided, {rest}"]
    said = [
        f"agreement: {_interval(metrics, 'agreement/')}; chance {CHANCE:.0%}) on "
        f"{metrics['agreement/rows']:.0f} pairs, {rest}; of the judge's surer half "
        f"{_interval(metrics, 'agreement/sure_')})"
    ]
    for name, words in RIVALS.items():
        if f"agreement/{name}_rate" not in metrics:
            continue
        parts = []
        for prefix in (f"agreement/{name}_", f"agreement/{name}_sure_"):
            if f"{prefix}rate" in metrics:
                gap, error = metrics[f"{prefix}behind"], metrics[f"{prefix}behind_se"]
                parts.append(
                    f"{_interval(metrics, prefix)}; the guide's less this {100 * gap:+.1f} +- "
                    f"{100 * error:.1f} points)"
                )
        said.append(f"  {words}: {', surer half '.join(parts)}")
    return said


def _interval(metrics: Mapping[str, float], prefix: str) -> str:
    rate, low, high = (metrics.get(f"{prefix}{n}", math.nan) for n in ("rate", "low", "high"))
    return f"{rate:.1%} ({low:.1%} to {high:.1%}"
