"""What in the benchmark definitions is no template: how rows are brought into shape, two scores.

The YAML files of tasks/ name these functions (`!function ldalign.evaluation.benchmarks.rows.NAME`).
`rows` is anything with `map(function of a row)`: a data set of the hub, or local rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

# What the harness knows of one choice: its log-prob (natural), whether it is the greedy one.
Result = tuple[float, bool]

# Space before punctuation, and quotation marks, as MuTual's tokeniser left them; in this order.
SPACED = (
    (" '", "'"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" n't", "n't"),
    ("`` ", '"'),
    ("''", '"'),
    (" :", ":"),
    (" ;", ";"),
    (" !", "!"),
    (" ?", "?"),
    (" ,", ","),
    (" .", "."),
)


class Mapped(Protocol):
    """What a definition gets of its rows."""

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]]) -> Self:
        """The rows with what `function` returns for each put into it."""
        ...


def hellaswag(rows: Mapped) -> Mapped:
    """Makes `query` and `choices` of the hub's columns, where a row has them not yet."""
    return rows.map(_hellaswag)


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    if "query" in row:
        return {}
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _without_brackets(f"{row['activity_label']}: {context}"),
        "choices": [_without_brackets(ending) for ending in row["endings"]],
    }


def _without_brackets(text: str) -> str:
    """Takes out WikiHow's marks: [title] begins a sentence, [step] and the like are nothing."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def truthfulqa(rows: Mapped) -> Mapped:
    """Checks the rows: the score takes the first of the mc1 choices to be the true one."""
    return rows.map(_truthfulqa)


def _truthfulqa(row: dict[str, Any]) -> dict[str, Any]:
    if list(row["mc1_targets"]["labels"])[:1] != [1]:
        raise ValueError("the first choice of mc1_targets must be the true one (label 1)")
    return {}


def true_probability(row: Mapping[str, Any], results: Sequence[Result]) -> dict[str, float]:
    """Computes TruthfulQA's mc2: the true choices' share of the probability of all."""
    logprobs = np.array([logprob for logprob, _ in results])
    shares = np.exp(logprobs - logprobs.max())
    return {"acc": float(shares[np.array(row["mc2_targets"]["labels"]) == 1].sum() / shares.sum())}


def mutual(rows: Mapped) -> Mapped:
    """Makes ordinary text of the article and the options."""
    return rows.map(_mutual)


def _mutual(row: dict[str, Any]) -> dict[str, Any]:
    options = [_joined(option) for option in row["options"]]
    return {"article": _joined(row["article"]), "options": options}


def _joined(text: str) -> str:
    for old, new in SPACED:
        text = text.replace(old, new)
    return text


def recall_of_four(row: Mapping[str, Any], results: Sequence[Result]) -> dict[str, float]:
    """Computes MuTual's r@1, r@2 and reciprocal rank of the right option, by log-prob.

    A tie counts against it.
    """
    logprobs = [logprob for logprob, _ in results]
    right = "ABCD".index(row["answers"])
    rank = sum(logprob >= logprobs[right] for logprob in logprobs)
    return {"r@1": float(rank == 1), "r@2": float(rank <= 2), "mrr": 1 / rank}
