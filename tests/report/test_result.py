"""The report's first sentence: the selected policy minus the run's baseline; and what validation
found, as the report shows it.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from ldalign.evaluation.statistics import ratio_error, standard_error
from ldalign.report.notation import page as signs
from ldalign.report.page import write_page
from ldalign.report.result import kind_of, paired, read_answers
from ldalign.report.table import collect, movement, read_steps, read_validation, write_report
from ldalign.report.validation import validation

NAMES = [f"row-{i}" for i in range(40)]
Right = list[list[bool]]


def put(run: Path, stage: str, summary: dict[str, float]) -> Path:
    folder = run / stage
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.5, **summary}))
    return folder


def measured(run: Path, policy: str, right: Right | None, logps: list[float]) -> None:
    """A policy's evaluation: of every prompt the greedy verdict and the samples', and the log-prob
    of a real response of 3 or 4 tokens. right None: no program checks the answers.
    """
    tokens = [3 + i % 2 for i in range(len(NAMES))]
    summary = {"nll/real": -sum(logps) / sum(tokens)}
    for key, pick in (("greedy", slice(0, 1)), ("sampled", slice(1, None))):
        if right is not None:
            values = np.array([np.mean(r[pick]) for r in right])
            summary[f"accuracy/{key}"] = float(values.mean())
            summary[f"accuracy/{key}_se"] = standard_error(values)
    folder = put(run, f"{policy}/evaluation", summary)
    verdicts: Any = [[] for _ in NAMES] if right is None else right
    lines = [
        {"id": name, "prompt": "p", "real": "r", "logp": logp, "n_tokens": n, "correct": correct}
        | ({} if right is None else {"greedy": "g", "sampled": ["s"] * (len(correct) - 1)})
        for name, logp, n, correct in zip(NAMES, logps, tokens, verdicts, strict=True)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def drawn(share: float, seed: int) -> Right:
    """Verdicts on a greedy answer and two samples of each prompt."""
    values = np.random.default_rng(seed).random((len(NAMES), 3)) < share
    return [[bool(x) for x in row] for row in values]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two iterations and the baseline, of which iteration 0 was selected."""
    (tmp_path / "config.yaml").write_text("method: ld_align\npolicy: toy\nseed: 0\n")
    draw = np.random.default_rng(7)
    logps = {name: (-draw.uniform(4, 8, len(NAMES))).tolist() for name in "abcd"}
    measured(tmp_path, "sft", drawn(0.3, 1), logps["a"])
    for t in (0, 1):
        put(
            tmp_path,
            f"iteration_{t}/policy",
            {
                "loss": 0.6, "steps": 8, "validation/step": 6 - 2 * t, "validation/nll": 1.25 + t,
                "validation/nll_start": 1.5, "validation/nll_last": 1.375,
            },
        )  # fmt: skip
    measured(tmp_path, "iteration_0", drawn(0.9, 2), logps["b"])
    measured(tmp_path, "iteration_1", drawn(0.5, 3), logps["c"])
    measured(tmp_path, "continual_sft", drawn(0.5, 4), logps["d"])
    select(tmp_path, "iteration_0", "the best of 2 iterations by validation NLL, 1.25 nats/token")
    return tmp_path


def select(run: Path, policy: str, why: str) -> None:
    found = {"policy": policy, "folder": f"{policy}/policy", "select": "best", "why": why}
    (run / "selected.json").write_text(json.dumps(found))


def shares(run: Path, policy: str) -> np.ndarray:
    """The share of right samples of every prompt, from the file itself."""
    lines = (run / policy / "evaluation/answers.jsonl").read_text().splitlines()
    return np.array([np.mean(json.loads(line)["correct"][1:]) for line in lines])


def sentences(run: Path) -> list[str]:
    """The first two paragraphs of table.md; they are the page's too."""
    text = write_report(run)
    page = write_page(run).read_text().replace("\u00a0", " ")
    first, second, *_ = text.split("\n\n")
    for sentence in (first, second):
        assert f">{escape(signs(sentence).replace(chr(160), ' '))}</p>" in page
    assert (
        page.index('<p class="lead">LD-Align')
        < page.index(f"<p>{escape(second)}")
        < page.index("<p>After 1 iteration of LD-Align")
    )
    return [first, second]


def test_the_selected_policy_minus_the_baseline_comes_first(run: Path) -> None:
    first, second = sentences(run)
    gaps = shares(run, "iteration_0") - shares(run, "continual_sft")
    gap, error = gaps.mean(), gaps.std(ddof=1) / math.sqrt(len(gaps))
    low, high = 100 * (gap - 1.959964 * error), 100 * (gap + 1.959964 * error)
    assert first == (
        f"LD-Align (iteration 0) minus continual SFT from the same start: {100 * gap:+.1f} points "
        f"of sampled accuracy on 40 held-out prompts (95 % interval {low:+.1f} to {high:+.1f}; "
        "paired by prompt; one seed): LD-Align is better."
    )
    assert second == (
        "The run's policy is that of iteration 0: the best of 2 iterations by validation NLL, 1.25 "
        "nats/token."
    )
    found = json.loads((run / "report/table.json").read_text())["result"]
    assert (found["policy"], found["baseline"], found["figure"]) == (
        "iteration_0", "continual_sft", "sampled",
    )  # fmt: skip
    text = (run / "report/table.md").read_text(encoding="utf-8").replace("\u2212", "-")
    head = next(line for line in text.splitlines() if line.startswith("| policy | greedy"))
    columns = head.split(" | ")
    at = columns.index("sampled - continual_sft, points")
    table = text[text.index(head) :].split("\n\n")[0]
    rows = {line.split(" | ")[0]: line.split(" | ") for line in table.splitlines()}
    assert rows["| iteration_0"][at] == f"{100 * gap:+.1f} +- {100 * error:.1f}"
    assert rows["| sft"][at] == rows["| continual_sft"][at] == "-"
    assert "6 of 8" in text and "1.5000, 1.2500, 1.3750" in text
    page = (run / "report/report.html").read_text()
    assert f"{100 * gap:+.1f} ± {100 * error:.1f} points vs continual SFT" in page
    assert first.isascii() and found["sentence"] == first


def test_a_loss_is_said_as_one(run: Path) -> None:
    (run / "continual_sft").rename(run / "apart")
    measured(run, "continual_sft", [[True] * 3] * 40, [-1.0] * 40)
    first, _ = sentences(run)
    assert first.endswith("paired by prompt; one seed): LD-Align is worse.")
    assert first.startswith("LD-Align (iteration 0) minus continual SFT from the same start: -")


def test_what_cannot_be_told_apart(run: Path) -> None:
    select(run, "iteration_1", "the last of 2 iterations (select=last)")
    text = write_report(run)
    assert text.startswith("LD-Align (iteration 1) minus continual SFT from the same start: ")
    assert "one seed): the two cannot be told apart." in text.split("\n\n")[0]
    assert "The run's policy is that of iteration 1: the last of 2 iterations" in text


@pytest.mark.parametrize("few", [1, 4])
def test_of_few_prompts_nothing_is_claimed(run: Path, few: int) -> None:
    """Their standard error is 0 where all moved alike: of one prompt always."""
    for name, right in (("sft", False), ("continual_sft", False), ("iteration_0", True)):
        path = run / name / "evaluation/answers.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, line in enumerate(lines):  # a program checks the answers to few of the prompts
            line["correct"] = [right] * 3 if i < few else []
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, _ = sentences(run)
    assert first == (
        "LD-Align (iteration 0) minus continual SFT from the same start: +100.0 points of sampled "
        f"accuracy on {few} held-out prompt{'s' * (few > 1)}: too few to tell the two apart "
        "(evaluation.rows)."
    )
    text = (run / "report/table.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("- iteration_0:"))
    said = f"was measured on {few} prompt{'s' * (few > 1)}, too few to say whether it moved"
    assert line.count(f"accuracy {said}") == 2
    page = (run / "report/report.html").read_text()
    assert said in page and "rose" not in page
    assert movement(0.1, 0.06, 5) == "did not move beyond two standard errors"
    assert movement(0.13, 0.06, 5) == "rose" and movement(-0.13, 0.06, 5) == "fell"
    found = json.loads((run / "report/table.json").read_text())["result"]
    assert found["rows"] == few and "low" not in found


def test_without_a_baseline_the_start_is_it(run: Path) -> None:
    (run / "continual_sft").rename(run / "apart")
    (run / "selected.json").unlink()
    first, second, *_ = write_report(run).split("\n\n")
    assert first.startswith(
        "LD-Align (iteration 1) minus the start (after SFT), as the run has no continual SFT: "
    )
    assert second == "Iteration 1, the last so far, stands for the run: none is selected yet."
    assert "- continual_sft" not in (run / "report/table.md").read_text()
    with (run / "config.yaml").open("a") as file:
        file.write("continual_sft: {epochs: 1}\n")
    assert "as the run has no continual SFT yet: " in write_report(run).split("\n\n")[0]


@pytest.mark.parametrize(("shift", "verdict"), [(0.4, "better"), (-0.4, "worse")])
def test_where_no_program_checks_it_is_the_likelihood(
    tmp_path: Path, shift: float, verdict: str
) -> None:
    """Lower is better; the difference is that of the tables' NLL, over all tokens."""
    (tmp_path / "config.yaml").write_text("method: spin\n")
    logps = np.random.default_rng(3).uniform(-8, -4, (2, len(NAMES)))
    measured(tmp_path, "start", None, logps[0].tolist())
    put(tmp_path, "iteration_0/policy", {})
    other = logps[0] + shift + 0.1 * (logps[1] + 6)
    measured(tmp_path, "iteration_0", None, other.tolist())
    text = write_report(tmp_path)
    start, own = (
        next(r["nll/real"] for r in collect(tmp_path)["policies"] if r["policy"] == name)
        for name in ("start", "iteration_0")
    )
    assert text.startswith(
        "SPIN (iteration 0) minus the start, as the run has no continual SFT: "
        f"{own - start:+.4f} nats/token of NLL of real responses on 40 held-out prompts (95 % "
    )
    assert f"lower is better; paired by prompt; one seed): SPIN is {verdict}." in text


def test_differences_are_paired(run: Path) -> None:
    answers = read_answers(run, ["sft", "iteration_1", "nobody"])
    found = paired(answers, "sft", "iteration_1", "difference")
    gaps = shares(run, "iteration_1") - shares(run, "sft")
    assert found["difference/sampled"] == pytest.approx(gaps.mean())
    assert found["difference/sampled_se"] == pytest.approx(gaps.std(ddof=1) / math.sqrt(40))
    assert found["difference/rows"] == 40
    assert paired(answers, "sft", "sft", "x") == {} == paired(answers, "sft", "nobody", "x")
    path = run / "iteration_1/evaluation/answers.jsonl"
    path.write_text(path.read_text().replace("row-39", "row-40"))
    answers = read_answers(run, ["sft", "iteration_1"])
    assert paired(answers, "sft", "iteration_1", "difference") == {}


def test_where_nothing_can_be_compared_it_says_why(run: Path) -> None:
    (run / "continual_sft").rename(run / "apart")
    select(run, "iteration_1", "the last")
    path = run / "iteration_1/evaluation/answers.jsonl"
    path.write_text(path.read_text().replace("row-39", "row-40"))
    said = "LD-Align minus a baseline is not known: "
    assert write_report(run).startswith(
        f"{said}iteration 1 and the others did not answer the same prompts."
    )
    shutil.rmtree(run / "iteration_1/evaluation")
    assert write_report(run).startswith(
        f"{said}of this run's policies only start (after SFT), iteration 0 was evaluated"
    )
    for name in ("sft", "iteration_0"):
        shutil.rmtree(run / name / "evaluation")
    assert write_report(run).startswith(f"{said}nothing was evaluated on held-out rows")


def test_what_was_run_is_told_by_its_stages() -> None:
    found = {
        "nothing": ["data"],
        "evaluate": ["start/evaluation"],
        "sft": ["sft/policy", "sft/evaluation"],
        "guide": ["sft/policy", "iteration_0/responses", "guide"],
        "judge": ["sft/policy", "guide", "agreement_samples"],
        "align": ["sft/policy", "guide", "iteration_0/distances"],
    }
    assert {kind: kind_of(names) for kind, names in found.items()} == {k: k for k in found}
    assert kind_of(["start/benchmarks/piqa"]) == "evaluate"
    assert kind_of(["start/evaluation", "continual_sft/policy"]) == "align"
    assert kind_of(["iteration_0/responses"]) == "nothing"


def test_the_error_of_a_ratio_is_the_jackknifes() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(3, 40, 400).astype(float)
    values = 0.3 * sizes + draw.normal(0, 2, 400)
    left_out = (values.sum() - values) / (sizes.sum() - sizes)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert ratio_error(values, sizes) == pytest.approx(jackknife, rel=0.02)
    # Of equal sizes it is the standard error of the mean.
    ones = np.ones(400)
    assert ratio_error(values, ones) == pytest.approx(standard_error(values))
    assert ratio_error(values[:1], sizes[:1]) == 0.0


def test_validation_is_drawn_apart_from_the_steps(tmp_path: Path) -> None:
    folder = put(tmp_path, "iteration_0/policy", {})
    lines = [
        {"global_step": 0, "validation/nll": 2.0, "validation/accuracy": 0.25},
        {"global_step": 1, "loss": 0.7},
        {"global_step": 1, "validation/nll": 1.0, "validation/accuracy": 0.5},
        {"global_step": 2, "loss": 0.6},
        {"global_step": 2, "validation/nll": 1.5, "validation/accuracy": 0.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ["iteration_0/policy"]
    assert read_steps(tmp_path, names) == {"iteration_0/policy": [lines[1], lines[3]]}
    records = read_validation(tmp_path, names)["iteration_0/policy"]
    assert records == lines[::2]
    found = validation({"iteration_0": records}, {"iteration_0": 1.0})
    assert found.figure is not None
    nll, accuracy = found.figure.axes
    curve, ring = nll.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[0, 2.0], [1, 1.0], [2, 1.5]])
    np.testing.assert_array_equal(ring.get_xydata(), [[1, 1.0]])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [25, 50, 50])
    both = validation({"sft": records, "iteration_0": records}, {}).figure
    assert both is not None and len(both.axes) == 4  # SFT has its own scale
    assert [axes.get_legend().get_texts()[0].get_text() for axes in both.axes[:2]] == [
        "start (after SFT)",
        "iteration 0",
    ]
    assert validation({}, {}).figure is None
    assert validation({"iteration_0": []}, {}).figure is None
