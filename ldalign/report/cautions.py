"""Cautions: what a reader of a run's numbers must know before believing them, the weightiest first.

A page has the first few under its result, and the others further down.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ldalign.evaluation.guide import SURE, tells_apart
from ldalign.report.analysis import Numbers
from ldalign.report.guides import gain_text, guide_name, is_known, older
from ldalign.report.notation import percent
from ldalign.run.folder import shown_name

MOSTLY = 0.5  # share of the variance of distances that something else explains
STILL_FALLING = 0.05  # the loss fell by this share over the last two quarters: cut short
FEW = 0.3  # share of the pairs, as an effective sample size
MANY = 0.25  # share of texts that were cut
FEW_ROWS = 20  # held out, of whose standard errors little is to be had
FEWEST_RECORDS = 8  # training records, below which no trend is looked for
LEADING_CAUTIONS = 3  # that stand under the result
# The kinds of cautions by how much they take from the result: noise in all weights first, then
# what was trained or measured on little, then what weights and guides might be, last the record.
WEIGHT = (
    "guide is noise",
    "guide unknown",
    "margin",
    "pairs left out",
    "answers cut",
    "undecided",
    "distances explained",
    "few carry",
    "no latent read",
    "samples cut",
    "still falling",
    "uncommitted",
)
Caution = tuple[str, str]  # its kind, of WEIGHT, and its sentence
UNCOMMITTED = (
    "The code had changes that are in no commit: the run cannot be repeated from its commit alone."
)


def cautions(
    table: Numbers, guide_steps: Mapping[str, Sequence[Numbers]], commit: str | None = None
) -> list[str]:
    """Looks at every guide and policy; returns sentences, [] where nothing speaks against a run.

    The order is that of `WEIGHT`; of the first LEADING_CAUTIONS each is of another kind, where
    there are so many kinds. table: what table.json holds. guide_steps: each guide's training
    records by stage name. commit: the code's.
    """
    guides: Mapping[str, Numbers] = table["guides"]
    found: list[Caution] = []
    for name, figures in guides.items():
        found += _untold(guide_name(name), figures) + _unsure(guide_name(name), figures)
        found += _guide_cautions(guide_name(name), figures, guide_steps.get(name, ()))
    for row in table["policies"]:
        if row["policy"].startswith("iteration_"):
            found += _iteration_cautions(row, table["analysis"].get(row["policy"], {}))
    rows = table["policies"]
    what = "the held-out answers were cut at max_new_tokens"
    if any("accuracy/greedy" in row or "accuracy/sampled" in row for row in rows):
        what += "; a cut answer counts as wrong"
    found += _cut("answers cut", rows, "truncated_frac", what)
    what = "the responses sampled for training were cut at max_new_tokens and have no end"
    found += _cut("samples cut", rows, "responses/losers/truncated_frac", what)
    if str(commit or "").endswith("-dirty"):
        found.append(("uncommitted", UNCOMMITTED))
    found.sort(key=lambda caution: WEIGHT.index(caution[0]))
    firsts = [n for n, (kind, _) in enumerate(found) if kind not in [k for k, _ in found[:n]]]
    leading = firsts[:LEADING_CAUTIONS]
    order = [*leading, *(n for n in range(len(found)) if n not in leading)]
    return [found[n][1] for n in order]


def _untold(name: str, figures: Numbers) -> list[Caution]:
    """Says that a guide does not tell a row's two responses apart."""
    if not is_known(figures) or figures["differing"] < 2 or tells_apart(figures):
        return []
    said = (
        f"{_cap(name)} does not tell a row's two responses apart, so the distances and weights "
        f"made with it are near noise: a response is only {gain_text(figures, 'sibling_gain')} "
        "nats likelier with its own latent than with that of the other response, on "
        f"{figures['differing']:.0f} held-out rows, which is not {SURE:.0f} standard errors above "
        "0."
    )
    return [("guide is noise", said)]


def _unsure(name: str, figures: Numbers) -> list[Caution]:
    """Says that it is not known whether a guide tells a row's two responses apart."""
    if not is_known(figures):
        said = (
            f"{older(name)}: whether it tells a row's two responses apart, or distances and "
            "weights are near noise, is not known."
        )
        return [("guide unknown", said)]
    if figures["differing"] >= FEW_ROWS or _untold(name, figures):
        return []
    said = (
        f"{_cap(name)} was tried on only {figures['differing']:.0f} held-out rows whose responses "
        "differ. The standard error of so few is rough, so it is not sure whether it tells the two "
        f"apart or distances and weights are near noise ({gain_text(figures, 'sibling_gain')} "
        "nats a response). A larger max_rows or guide.heldout_fraction gives more."
    )
    return [("guide unknown", said)]


def _guide_cautions(name: str, figures: Numbers, steps: Sequence[Numbers]) -> list[Caution]:
    """Looks at one guide's other held-out figures and its training records."""
    out: list[Caution] = []
    if {"true", "none"} <= figures.keys() and figures["true"] >= figures["none"]:
        said = (
            f"{_cap(name)} reconstructs no better with the right latent ({figures['true']:.4f} "
            f"nats/token) than with none ({figures['none']:.4f})."
        )
        out.append(("no latent read", said))
    found = {key: figures.get(f"{key}_share", 0.0) for key in ("length", "cut")}
    out += _explained(f"{_cap(name)}'s held-out distances", found)
    loss = [step["loss"] for step in steps if "loss" in step]
    if len(loss) >= FEWEST_RECORDS:
        quarter = len(loss) // 4
        before = float(np.mean(loss[-2 * quarter : -quarter]))
        last = float(np.mean(loss[-quarter:]))
        if last < (1 - STILL_FALLING) * before:
            said = (
                f"{_cap(name)}'s training loss was still falling at its end, from {before:.3f} to "
                f"{last:.3f} between the last two quarters of its steps: with more "
                "guide.epochs the distances may be others."
            )
            out.append(("still falling", said))
    return out


def _explained(whose: str, shares: Mapping[str, float]) -> list[Caution]:
    """Says where something simpler explains most of the variance of distances."""
    by = {
        "length": "the difference in length of the two responses",
        "cut": "how many of the two responses were cut, so that they have no end,",
    }
    return [
        (
            "distances explained",
            f"{whose} mostly follow something simpler: {words} explains {percent(shares[key])} of "
            "their variance, so the weights say little that this does not.",
        )
        for key, words in by.items()
        if shares[key] > MOSTLY
    ]


def _cut(kind: str, rows: Sequence[Numbers], key: str, what: str) -> list[Caution]:
    """Says of which policies many texts were cut: one caution for all of them."""
    many = [row for row in rows if row.get(key, 0) > MANY]
    if not many:
        return []
    names = _cap(", ".join(shown_name(row["policy"]) for row in many))
    return [(kind, f"{names}: {', '.join(percent(row[key]) for row in many)} of {what}.")]


def _iteration_cautions(row: Numbers, analysis: Numbers) -> list[Caution]:
    """Looks at one iteration's pairs, weights and training."""
    name = _cap(row["policy"])
    out: list[Caution] = []
    found = {key: row.get(f"distance/{key}_share", 0.0) for key in ("length", "cut")}
    out += _explained(f"{name}'s distances", found)
    ties, none = row.get("judged/ties", 0), row.get("judged/none", 0)
    if ties + none > 0.5:
        said = (
            f"{name}: the judge preferred neither sample on {percent(ties + none)} of the prompts "
            f"({percent(none)} without a verdict); these were not trained on."
        )
        out.append(("undecided", said))
    left_out = row.get("train/losers/identical_frac", 0)
    if left_out > 0.5:
        said = (
            f"{name} trained on {row['train/pairs']:.0f} pairs only: {percent(left_out)} had two "
            "equal responses and were left out."
        )
        out.append(("pairs left out", said))
    if analysis.get("weight/ess", 1) < FEW:
        share, pairs = analysis["weight/ess"], analysis["pairs"]
        said = (
            f"{name}: few pairs carry the weights: their effective sample size is "
            f"{share * pairs:.0f} of {pairs} ({percent(share)})."
        )
        out.append(("few carry", said))
    margin = row.get("train/rewards/margins", 1)
    if margin <= 0:
        said = (
            f"{name}: the mean reward margin over its last epoch is {margin:+.3f}, not positive: "
            "it did not learn to prefer the better side of its pairs."
        )
        out.append(("margin", said))
    return out


def _cap(name: str) -> str:
    name = shown_name(name)
    return name[0].upper() + name[1:]
