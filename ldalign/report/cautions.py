"""Cautions: what a reader of a run's numbers must know before believing them."""

from collections.abc import Mapping, Sequence

import numpy as np

from ldalign.report.analysis import Numbers
from ldalign.run.folder import shown_name

NEAR_ZERO = 0.01  # nats per token: a change of 1 % in a token's probability
STILL_FALLING = 0.05  # the loss fell by this share over the last two quarters: cut short
FEW = 0.3  # share of the pairs, as an effective sample size
MANY = 0.25  # share of texts that were cut
FEWEST_RECORDS = 8  # training records, below which no trend is looked for


def cautions(
    table: Numbers, guide_steps: Mapping[str, Sequence[Numbers]], commit: str | None = None
) -> list[str]:
    """Looks at every guide and policy; returns sentences, [] where nothing speaks against a run.

    table: what table.json holds. guide_steps: each guide's training records by stage
    name. commit: the code's.
    """
    out: list[str] = []
    for name, losses in table["guides"].items():
        out += _guide_cautions(guide_name(name), losses, guide_steps.get(name, ()))
    for row in table["policies"]:
        if row["policy"].startswith("iteration_"):
            out += _iteration_cautions(row, table["analysis"].get(row["policy"], {}))
        if row.get("truncated_frac", 0) > MANY:
            out.append(
                f"{_cap(row['policy'])}: {row['truncated_frac']:.0%} of the held-out answers were "
                "cut at max_new_tokens; a cut answer counts as wrong."
            )
    if str(commit or "").endswith("-dirty"):
        out.append(
            "The code had changes that are in no commit: the run cannot be repeated from its "
            "commit alone."
        )
    return out


def guide_name(stage: str) -> str:
    """Says how a reader calls the guide of a stage: "the guide", "iteration 1's guide"."""
    return "the guide" if stage == "guide" else f"{stage.split('/')[0].replace('_', ' ')}'s guide"


def _guide_cautions(name: str, losses: Numbers, steps: Sequence[Numbers]) -> list[str]:
    """Looks at one guide's held-out losses (nats per token) and its training records."""
    out: list[str] = []
    gain, sibling = losses.get("latent_gain"), losses.get("sibling_gain")
    if gain is not None and gain <= 0:
        out.append(
            f"{_cap(name)}'s latent gain is {gain:+.4f} nats/token, not positive: its decoder "
            "ignores the latent, and the distances and weights made with it say nothing."
        )
    elif gain is not None and gain < NEAR_ZERO:
        out.append(
            f"{_cap(name)}'s latent gain is only {gain:+.4f} nats/token: with another row's latent "
            "its decoder does nearly as well, so distances and weights made with it say little."
        )
    if sibling is not None and sibling < NEAR_ZERO and (gain is None or gain > 0):
        likely = "no less likely than" if sibling <= 0 else "nearly as likely as"
        out.append(
            f"{_cap(name)}'s sibling gain is {sibling:+.4f} nats/token: with the latent of the "
            f"row's other response, a held-out response is {likely} with its own. The latent does "
            "not tell the two responses of a row apart, so the distance between them, and with it "
            "the weight, rests on little that sets them apart."
        )
    if gain is not None and losses["true"] >= losses["none"]:
        out.append(
            f"{_cap(name)} reconstructs no better with the right latent ({losses['true']:.4f} "
            f"nats/token) than with none ({losses['none']:.4f})."
        )
    loss = [step["loss"] for step in steps if "loss" in step]
    if len(loss) >= FEWEST_RECORDS:
        quarter = len(loss) // 4
        before = float(np.mean(loss[-2 * quarter : -quarter]))
        last = float(np.mean(loss[-quarter:]))
        if last < (1 - STILL_FALLING) * before:
            out.append(
                f"{_cap(name)}'s training loss was still falling at its end, from {before:.3f} to "
                f"{last:.3f} nats/token between the last two quarters of its steps: it had not "
                "converged (guide.epochs)."
            )
    return out


def _iteration_cautions(row: Numbers, analysis: Numbers) -> list[str]:
    """Looks at one iteration's pairs, weights and training."""
    name = _cap(row["policy"])
    out: list[str] = []
    cut = row.get("responses/losers/truncated_frac", 0)
    if cut > MANY:
        out.append(
            f"{name}: {cut:.0%} of its sampled responses were cut at max_new_tokens and have no "
            "end."
        )
    ties, none = row.get("judged/ties", 0), row.get("judged/none", 0)
    if ties + none > 0.5:
        out.append(
            f"{name}: the judge preferred neither sample on {ties + none:.0%} of the prompts "
            f"({none:.0%} without a verdict); these were not trained on."
        )
    left_out = row.get("train/losers/identical_frac", 0)
    if left_out > 0.5:
        out.append(
            f"{name} trained on {row['train/pairs']:.0f} pairs only: {left_out:.0%} had two equal "
            "responses and were left out."
        )
    if analysis.get("weight/ess", 1) < FEW:
        share, pairs = analysis["weight/ess"], analysis["pairs"]
        out.append(
            f"{name}: few pairs carry the weights: their effective sample size is "
            f"{share * pairs:.0f} of {pairs} ({share:.0%})."
        )
    margin = row.get("train/rewards/margins", 1)
    if margin <= 0:
        out.append(
            f"{name}: the mean reward margin over its last epoch is {margin:+.3f}, not positive: "
            "it did not learn to prefer the better side of its pairs."
        )
    return out


def _cap(name: str) -> str:
    name = shown_name(name)
    return name[0].upper() + name[1:]
