"""Judge agreement (LD-Align, arXiv 2404.06390, section 5.2): does latent distance know quality?

A policy answers each held-out prompt twice. The guide calls the sample farther from the real
response the worse one; a judge says which is better. The rate at which they agree is over pairs on
which both decide, with Wilson's 95 % interval (1927; prompts are independent, one pair each).
Chance is 1/2. Beside it, on the same pairs, stands the rate of a rule that needs no guide: the
longer sample is the worse one. Here are the figures; run/stages/agreement.py makes the pairs.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ldalign.evaluation.statistics import wilson
from ldalign.system.metrics import Metrics

CHANCE = 0.5


def verdict(record: dict[str, Any]) -> str:
    """Says of a judged pair: agree, disagree, or why it does not count.

    That is identical (two equal samples), none (no verdict of the judge) or tie (the judge's, or
    equal distances).
    """
    if record["first"] == record["second"]:
        return "identical"
    if record["preference"] is None:
        return "none"
    judged = record["preference"] - 0.5
    nearer = record["second_distance"] - record["first_distance"]
    # both are positive where the first sample is the better one
    if judged == 0 or nearer == 0:
        return "tie"
    return "agree" if (judged > 0) == (nearer > 0) else "disagree"


def summary(records: Sequence[dict[str, Any]]) -> Metrics:
    """Sums up judged pairs; a rate is left out where no pair decides it."""
    count = Counter(record["verdict"] for record in records)
    decided = [r for r in records if r["verdict"] in ("agree", "disagree")]
    shorter = [
        (r["preference"] > 0.5) == (r["first_tokens"] < r["second_tokens"])
        for r in decided
        if r["first_tokens"] != r["second_tokens"]
    ]
    return {
        "agreement/prompts": len(records),
        "agreement/rows": len(decided),
        "agreement/ties": count["tie"],
        "agreement/no_verdict": count["none"],
        "agreement/identical": count["identical"],
        "agreement/chance": CHANCE,
        **_rate("agreement/", count["agree"], len(decided)),
        "agreement/length_rows": len(shorter),
        **_rate("agreement/length_", sum(shorter), len(shorter)),
    }


def _rate(prefix: str, hits: int, count: int) -> Metrics:
    if not count:
        return {}
    low, high = wilson(hits, count)
    return {f"{prefix}rate": hits / count, f"{prefix}low": low, f"{prefix}high": high}
