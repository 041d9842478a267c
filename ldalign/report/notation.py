"""How the report says a number: the figures' names and units, one form, and one set of signs.

Texts are made in ASCII, as the console and JSON have them; `markdown` gives them true minus signs,
`page` the plus-minus sign too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldalign.evaluation.statistics import NORMAL_95
from ldalign.system.visible import visible

MOST_DECIMALS = 5  # a number that needs more is written with its power of ten


@dataclass(frozen=True)
class Figure:
    """A figure of a policy on held-out rows, as a reader knows it.

    unit: of a value, times `factor`; points: of a difference of two. digits: decimals where no
    standard error says how many. more: more of it is better.
    """

    words: str
    unit: str
    points: str
    factor: float
    digits: int
    more: bool

    def title(self) -> str:
        """The head of a column of values."""
        return f"{self.words}, {self.unit}"


# The first of these that is known is the one that a first sentence is of.
FIGURES = {
    "sampled": Figure("sampled accuracy", "%", "points", 100.0, 1, True),
    "greedy": Figure("greedy accuracy", "%", "points", 100.0, 1, True),
    "closeness": Figure("closeness to the real response", "cosine", "cosine", 1.0, 4, True),
    "nll": Figure("NLL of real responses", "nats/token", "nats/token", 1.0, 4, False),
}

HELD_OUT = (("accuracy/greedy", "greedy accuracy"), ("accuracy/sampled", "sampled accuracy"))
# Which of a benchmark's metrics stands for it in a comparison: the first of these that it has.
LEADING = ("acc_norm", "acc", "exact_match/strict", "r@1", "exact_match/flexible")


def leading(benchmark: Mapping[str, Any]) -> str | None:
    """Returns the metric that stands for a benchmark; None where its summary has none we know."""
    return next((name for name in LEADING if name in benchmark), None)


# ------------------------------------------------------------------------------------------ numbers


def decimals(errors: Iterable[float], otherwise: int = 1) -> int:
    """How many decimals show two digits of the largest of these standard errors, so that a column
    of numbers has one form; `otherwise` where none is above 0.
    """
    largest = max((e for e in map(abs, errors) if math.isfinite(e)), default=0.0)
    if not largest:
        return otherwise
    return max(0, 1 - math.floor(math.log10(float(f"{largest:.1e}"))))


def number(value: float, digits: int, sign: str = "") -> str:
    """Writes a number with so many decimals, never a zero with a minus. sign: "+" shows both
    signs.
    """
    return f"{value:{sign}.1e}" if digits > MOST_DECIMALS else f"{value:{sign}z.{digits}f}"


def with_error(value: float, error: float, sign: str = "", digits: int | None = None) -> str:
    """Writes a number with its standard error, which says how many decimals there are unless
    `digits` does, for a column.
    """
    digits = decimals([error]) if digits is None else digits
    return f"{number(value, digits, sign)} +- {number(error, digits)}"


def count(value: int) -> str:
    """Writes a whole number. Raises ValueError or TypeError for what a stranger's file has in its
    place, which is not shown.
    """
    return f"{value:d}"


def interval(low: float, high: float, sign: str = "", digits: int | None = None) -> str:
    """Writes a 95 % interval; its width says how many decimals there are unless `digits` does."""
    digits = interval_decimals(low, high) if digits is None else digits
    return f"{number(low, digits, sign)} to {number(high, digits, sign)}"


def interval_decimals(low: float, high: float, otherwise: int = 1) -> int:
    """How many decimals a 95 % interval asks for: those of its standard error."""
    return decimals([(high - low) / (2 * NORMAL_95)], otherwise)


def percent(share: float, digits: int = 0) -> str:
    """Writes a share in per cent."""
    return f"{number(100 * share, digits)} %"


def column_decimals(rows: Iterable[Mapping[str, Any]], key: str, figure: Figure) -> int:
    """How many decimals the rows' values of `key` have in a table, by their standard errors
    (KEY_se).
    """
    errors = (figure.factor * row[f"{key}_se"] for row in rows if f"{key}_se" in row)
    return decimals(errors, figure.digits)


# -------------------------------------------------------------------------------------------- signs


def plain(text: str) -> str:
    """Returns a text that holds a name from elsewhere, so that Markdown shows it as it is, in one
    line: no markup, link, formula or border of a table, and nothing that acts on a terminal.
    """
    text = re.sub(r"([\\`*<>\[\]$|&~])", r"\\\1", visible(" ".join(text.split())))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)
    # at its beginning, what makes a heading or an item of a list
    return re.sub(r"^(\d*)(?=[-+=#.)]+(\s|$))", r"\1\\", text)


def seen(value: Any) -> Any:
    """Returns a value as a template of a page shows it: a text from elsewhere with its control
    characters seen, all else as it is. What is markup is ours, made of texts that were seen.
    """
    return visible(value) if type(value) is str else value


def markdown(text: str) -> str:
    """Returns a text of ours with true minus signs: before a number, and between two names."""
    text = re.sub(r"(?<![\w.)\]/-])-(?=\d)", "\u2212", text)
    return re.sub(r"(?<=[\w)%]) - (?=[\w(])", " \u2212 ", text)


def page(text: str) -> str:
    """Returns a text of ours as the page has it: also with plus-minus signs, and with per cent
    signs that stay with their number.
    """
    return markdown(text).replace("+-", "±").replace(" %", "\u00a0%")
