"""One form of numbers and signs, and what terms mean where they first stand."""

import pytest

from ldalign.report.glossary import TERMS, Glossary, explained
from ldalign.report.notation import (
    FIGURES,
    column_decimals,
    decimals,
    interval,
    markdown,
    number,
    page,
    percent,
    with_error,
)


@pytest.mark.parametrize(
    ("errors", "digits"),
    [
        ([4.1], 1),
        ([0.9, 1.5], 1),  # of a column, the largest
        ([0.9], 2),
        ([12.5], 0),
        ([289.0], 0),
        ([0.0017], 4),
        ([0.0996], 2),  # 0.10: rounded before it is counted
        ([], 7),
        ([0.0, float("nan")], 7),
    ],
)
def test_a_standard_error_says_how_many_decimals(errors: list[float], digits: int) -> None:
    assert decimals(errors, 7) == digits


def test_one_form_of_numbers() -> None:
    assert with_error(52.34, 3.41) == "52.3 +- 3.4"
    assert with_error(1.9, 0.94, "+", 1) == "+1.9 +- 0.9"
    assert with_error(1.5e-6, 2e-7, "+") == "+1.5e-06 +- 2.0e-07"
    assert number(-0.04, 1) == "0.0" and number(-0.04, 1, "+") == "+0.0"
    assert interval(-2.31, 2.94, "+") == "-2.3 to +2.9" and percent(0.125, 1) == "12.5 %"
    rows = [{"a": 1, "a_se": 0.004}, {"a": 2, "a_se": 0.041}, {"b_se": 9}]
    assert column_decimals(rows, "a", FIGURES["greedy"]) == 1
    assert column_decimals(rows, "c", FIGURES["nll"]) == 4


def test_signs_are_those_of_numbers_and_differences_alone() -> None:
    text = "-2.3 to +2.9 (-1; |-4|), greedy - sft, LD-Align, row-39, 2026-11-29, a/-1, 1e-05, | - |"
    assert markdown(text) == (
        "\u22122.3 to +2.9 (\u22121; |\u22124|), greedy \u2212 sft, LD-Align, row-39, 2026-11-29, "
        "a/-1, 1e-05, | - |"
    )
    assert page("5 +- 1 %") == "5 ± 1\u00a0%"
    assert markdown("- a: -1\n- b: --debug") == "- a: \u22121\n- b: --debug"


def test_a_term_is_explained_once() -> None:
    glossary = Glossary()
    found = glossary.first_used("The policy's NLL, 3 +- 1")
    assert [term for term, _ in found] == ["policy", "NLL", "+-"]
    assert explained(found).startswith(
        "Policy: the language model that is trained or measured. NLL: minus"
    )
    assert glossary.first_used("The policies and the guide") == [
        (term, meaning) for term, _, meaning in TERMS if term == "guide"
    ]
    assert [term for term, _ in glossary.first_used("Greedy accuracy, and Validation")] == [
        "validation",
        "greedy",
    ]
    assert explained(glossary.first_used("policy, guide ± NLL")) == ""
