"""A guide's held-out figures as a reader wants them: the same table in table.md and on the page.

The leading one is the sibling gain: what a response's own latent adds over that of the other
response to the same prompt (`ldalign.evaluation.guide`).
"""

from collections.abc import Callable, Mapping

from ldalign.evaluation.guide import SURE, tells_apart
from ldalign.report.analysis import Numbers
from ldalign.report.notation import with_error

# What a response's own latent is compared with: key, words, unit. The leading gain comes first.
GAINS = (
    ("sibling_gain", "own latent over the sibling's", "nats a response"),
    ("first_gain", "at the first differing token", "nats"),
    ("none_gain", "own latent over none", "nats a response"),
    ("other_gain", "own latent over another row's", "nats a response"),
)
WHAT = "on held-out rows"  # the table's first column
Form = Callable[[Numbers], str]


def guide_name(stage: str) -> str:
    """Says how a reader calls the guide of a stage: "the guide", "iteration 1's guide"."""
    return "the guide" if stage == "guide" else f"{stage.split('/')[0].replace('_', ' ')}'s guide"


def is_known(figures: Mapping[str, float]) -> bool:
    """Whether a guide's summary has the gains with their standard errors; an older version's has
    not.
    """
    return "sibling_gain_se" in figures


def older(name: str) -> str:
    """Says that a guide's summary is an older version's."""
    return (
        f"{name[0].upper()}{name[1:]}'s held-out figures are of an older version of ldalign, "
        "without standard errors"
    )


def older_figures(name: str, figures: Mapping[str, float]) -> str:
    """Says what an older version's summary of a guide tells."""
    gains = [
        f"{words} {figures[key]:+.4f}"
        for key, words in (("latent_gain", "another row's"), ("sibling_gain", "the sibling's"))
        if key in figures
    ]
    found = f" Own latent over {', over '.join(gains)} nats a token." if gains else ""
    return f"{older(name)}.{found}"


def gain_text(figures: Mapping[str, float], key: str) -> str:
    """Says a gain with its standard error."""
    return with_error(figures[key], figures[f"{key}_se"], "+")


def guide_rows(guides: Mapping[str, Numbers]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Makes the table: the guides' names, and (what, a text a guide) of each figure, the leading
    one first. guides: summaries by stage name; those of an older version are left out.
    """
    known = {guide_name(name): found for name, found in guides.items() if is_known(found)}
    lines = [(what, [form(found) for found in known.values()]) for what, form in _figures()]
    return list(known), [line for line in lines if any(cell != "-" for cell in line[1])]


def _figures() -> list[tuple[str, Form]]:
    sibling, _, none, other = [(f"{words}, {unit}", _gain(key)) for key, words, unit in GAINS]
    return [
        sibling,
        (f"so it tells the two apart (at least {SURE:.0f} standard errors above 0)", _verdict),
        ("the same at the first differing token alone, nats", _gain("first_gain")),
        ("own latent better than the sibling's, % of responses", _percent("own_better")),
        none,
        other,
        ("rows whose two responses differ", _rows),
        ("effective sample size of the distances, share of the rows", _number("ess", "{:.2f}")),
        ("distance explained by length, % of its variance", _number("length_share", "{:.0f}")),
        ("distance explained by the cut, % of its variance", _number("cut_share", "{:.0f}")),
    ]


NOTE = (
    "Held out: rows that the guide was not trained on. A row has two responses to one prompt; each "
    "is the other's sibling. Own latent over the sibling's: how much likelier a response is to the "
    "guide's decoder when this gets the response's own latent, and not its sibling's, in nats "
    "(natural logarithm; 0.69 is twice as likely). The distance between the two latents, and the "
    f"weight, rest on it: where it is not {SURE:.0f} standard errors above 0, they are near noise. "
    "First differing token: of that token alone, where both have the same text so far. None, "
    "another row's: against no latent, and against that of a response to another prompt, over all "
    "rows; they may be large though the latent does not tell the two apart. All else is over the "
    "rows whose two responses differ. +-: one standard error over rows. Effective sample size: "
    "with weights of these distances, the rows count as so many of equal weight would. Explained: "
    "by a straight line in the difference of the two lengths, in tokens; in how many of the two "
    "were cut, so that they have no end."
)


def _gain(key: str) -> Form:
    return lambda figures: gain_text(figures, key) if key in figures else "-"


def _percent(key: str) -> Form:
    def cell(figures: Numbers) -> str:
        if key not in figures:
            return "-"
        return with_error(100 * figures[key], 100 * figures[f"{key}_se"])

    return cell


def _number(key: str, form: str) -> Form:
    factor = 100 if key.endswith("_share") else 1
    return lambda figures: form.format(factor * figures[key]) if key in figures else "-"


def _verdict(figures: Numbers) -> str:
    return "yes" if tells_apart(figures) else "NO"


def _rows(figures: Numbers) -> str:
    return f"{figures['differing']:.0f} of {figures['rows']:.0f}"
