"""The table, from summaries written by hand."""

import json
import math
from pathlib import Path

import pytest

from ldalign.report import write_report


def put(run: Path, stage: str, summary: dict[str, float], answers: dict[str, list[bool]] | None = None) -> None:
    folder = run / stage
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.5, **summary}))
    if answers is not None:
        lines = [json.dumps({"id": name, "correct": right}) + "\n" for name, right in answers.items()]
        (folder / "answers.jsonl").write_text("".join(lines))


ACCURACY = {"accuracy/greedy": 0.5, "accuracy/greedy_se": 0.25, "accuracy/sampled": 0.25, "accuracy/sampled_se": 0.125}
DISTANCES = {f"distance/{k}": v for k, v in (("mean", 2.0), ("p10", 1.0), ("p50", 1.75), ("p90", 3.25))} | {
    "weight/std": 0.4, "weight/min": 0.1, "weight/max": 2.2, "weight/ess": 0.86,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    # Greedy and two samples a prompt. Sampled: 0, 1, 1/2, 1/2 before; 1, 1, 1, 1/2 after.
    before = {"a": [False, False, False], "b": [True, True, True], "c": [True, True, False], "d": [False, True, False]}
    after = {"a": [True, True, True], "b": [True, True, True], "c": [True, True, True], "d": [True, False, True]}
    put(tmp_path, "data", {"rows/train": 10})
    put(tmp_path, "sft/policy", {"loss": 2.0, "tokens": 999})
    put(tmp_path, "sft/evaluation", {"nll/real": 1.25, "truncated_frac": 0.125, **ACCURACY}, before)
    put(tmp_path, "guide", {"true": 3.0, "other": 3.5, "none": 3.25, "latent_gain": 0.5, "sibling_gain": 0.25})
    put(tmp_path, "iteration_0/responses", {"tokens": 1234, "losers/truncated_frac": 0.5})
    put(tmp_path, "iteration_0/distances", DISTANCES)
    put(
        tmp_path,
        "iteration_0/policy",
        {"rewards/margins": 0.123, "rewards/accuracies": 0.75, "tokens": 5678, "loss": 0.6},
    )
    put(tmp_path, "iteration_0/evaluation", {"nll/real": 1.5, **ACCURACY}, after)
    return tmp_path


def test_every_number_is_in_its_place(run: Path) -> None:
    text = write_report(run)
    assert text == (run / "report/table.md").read_text()
    for line in (
        "| sft | 50.0 +- 25.0 | 25.0 +- 12.5 | - | - | 12.5 | 1.2500 |",
        # paired gaps 1, 0, 1/2, 0: mean 3/8, standard error sqrt(11/48 / 4); greedy gaps 1, 0, 0, 1: mean 1/2
        "| iteration_0 | 50.0 +- 25.0 | 25.0 +- 12.5 | +50.0 +- 28.9 | +37.5 +- 23.9 | - | 1.5000 |",
        "| sft | - | - | - | - | - | 2.0000 | - | - | 999 |",
        "| iteration_0 | 2.00 (1.00, 1.75, 3.25) | 0.40 (0.10, 2.20) | 0.86 | +0.123 | 0.750 | 0.6000 | 50.0 | 1234 | "
        "5678 |",
        "| iteration_0 | 2 | 2 | 2 | 2 | 6 |",
        "latent gain +0.5000",
    ):
        assert line in text, text
    assert "sampled accuracy did not move beyond two standard errors (+37.5 +- 23.9 points)" in text


def test_table_json(run: Path) -> None:
    write_report(run)
    table = json.loads((run / "report/table.json").read_text())
    sft, first = table["policies"]
    assert (sft["policy"], first["policy"]) == ("sft", "iteration_0")
    assert first["difference/sampled"] == 0.375
    assert math.isclose(first["difference/sampled_se"], math.sqrt(11 / 48 / 4))
    assert first["responses/tokens"] == 1234 and first["train/tokens"] == 5678 and first["seconds"] == 6.0
    assert table["seconds"]["guide"] == 1.5


def test_a_latent_that_says_nothing_is_shouted(run: Path) -> None:
    (run / "guide/summary.json").write_text(
        json.dumps({"true": 3, "other": 3, "none": 3, "latent_gain": -0.01, "sibling_gain": 0, "seconds": 1})
    )
    assert "NOT POSITIVE" in write_report(run)


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "start/evaluation", {"nll/real": 2.5}, {})
    text = write_report(tmp_path)
    assert "| start | 2.5000 |" in text
    assert "accuracy, %" not in text and "**Training**" not in text and "moved" not in text


def test_other_prompts_are_not_compared(run: Path) -> None:
    path = run / "iteration_0/evaluation/answers.jsonl"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    assert "What moved" not in write_report(run)
