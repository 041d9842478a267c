"""Judges: the checker, a local model asked in both orders, and any OpenAI-compatible endpoint."""

import math
from typing import cast

import pytest
import tiny
import torch

from ldalign import tasks
from ldalign.data import Row
from ldalign.judges import ONE_LETTER, QUESTION, Checker, ModelJudge
from ldalign.mistral import Mistral
from ldalign.tokenizer import load_tokenizer
from ldalign.toy import write_toy_model
from ldalign.weights import load_model


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [
        Row(r["id"], (r["messages"][0],), r["messages"][1]["content"], kind=r["kind"], answer=r["answer"])
        for r in tasks.make_rows(0, "heldout", 7)
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> ModelJudge:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "model")
    model = cast(Mistral, load_model(folder, torch.float32))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6)  # a random model that has preferences
    return ModelJudge(model, load_tokenizer(folder), 2000, torch.device("cpu"))


def test_checker(rows: list[Row]) -> None:
    right = [row.response for row in rows]
    wrong = ["I do not know."] * len(rows)
    assert Checker().prefer(rows, right, wrong) == [1.0] * len(rows)
    assert Checker().prefer(rows, wrong, right) == [0.0] * len(rows)
    assert Checker().prefer(rows, right, right) == Checker().prefer(rows, wrong, wrong) == [0.5] * len(rows)
    (verdict,) = Checker().prefer([Row("x", rows[0].history, "y")], ["y"], ["z"])
    assert math.isnan(verdict)


def test_a_model_is_asked_in_both_orders(rows: list[Row], judge: ModelJudge) -> None:
    """Against whole logits of one prompt at a time: the share of one letter among the two, averaged over the orders."""
    first, second = [row.response for row in rows], [f"{n} is it." for n in range(len(rows))]
    a, b = (judge.tokenizer.encode(letter)[0] for letter in "AB")

    def says_a(row: Row, x: str, y: str) -> float:
        text = QUESTION.format(question=row.history[0]["content"], a=x, b=y) + ONE_LETTER
        ids = judge.tokenizer.prompt_ids([{"role": "user", "content": text}])
        scores = [float(tiny.logps(judge.model, ids, [letter]).detach()) for letter in (a, b)]
        return math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))

    expected = [(says_a(r, x, y) + 1 - says_a(r, y, x)) / 2 for r, x, y in zip(rows, first, second, strict=True)]
    got = judge.prefer(rows, first, second)
    assert got == pytest.approx(expected, abs=1e-5)
    assert max(abs(p - 0.5) for p in got) > 0.02, "a judge that prefers nothing tests nothing"
    positions = [says_a(r, x, y) for r, x, y in zip(rows, first, second, strict=True)]
    assert got != pytest.approx(positions, abs=1e-2), "one order alone is another judge"


def test_a_model_is_symmetric_and_repeats(rows: list[Row], judge: ModelJudge) -> None:
    first, second = [row.response for row in rows], [f"{n} is it." for n in range(len(rows))]
    there = judge.prefer(rows, first, second)
    assert judge.prefer(rows, first, second) == there
    assert judge.prefer(rows, second, first) == pytest.approx([1 - p for p in there], abs=1e-12)
    assert judge.prefer(rows, first, first) == pytest.approx([0.5] * len(rows), abs=1e-6)


def test_no_verdict_on_what_a_model_cannot_read(rows: list[Row], judge: ModelJudge) -> None:
    verdicts = judge.prefer(rows[:3], ["short", "word " * 500, "short"], ["brief"] * 3)
    assert [math.isnan(v) for v in verdicts] == [False, True, False]
    assert judge.prefer([], [], []) == []
