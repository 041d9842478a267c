"""The tables, from summaries written by hand; the page, from a toy run, as a browser reads it."""

import json
import math
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import POLICY, made_run
from safetensors.numpy import save_file

from ldalign.evaluation.agreement import RIVALS
from ldalign.objective import WEIGHTS
from ldalign.report import figures, notation, words
from ldalign.report.agreement import agreement_rows, read_agreement, sentence
from ldalign.report.analysis import OWN, read_pairs
from ldalign.report.cautions import cautions
from ldalign.report.chart import Chart
from ldalign.report.glossary import TERMS
from ldalign.report.guides import GAINS, gain_text
from ldalign.report.page import try_page, write_page
from ldalign.report.table import read_steps, read_summaries, read_validation, write_report
from ldalign.report.validation import validation
from ldalign.run.settings import GUIDED, RunConfig
from ldalign.system.config import to_dict
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train import report as script


def put(
    run: Path, stage: str, summary: dict[str, float], answers: dict[str, list[bool]] | None = None
) -> None:
    folder = run / stage
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.5, **summary}))
    if answers is not None:
        lines = [
            json.dumps({"id": name, "correct": right}) + "\n" for name, right in answers.items()
        ]
        (folder / "answers.jsonl").write_text("".join(lines))


ACCURACY = {
    "accuracy/greedy": 0.5,
    "accuracy/greedy_se": 0.25,
    "accuracy/sampled": 0.25,
    "accuracy/sampled_se": 0.125,
}
DISTANCES = {
    f"distance/{k}": v for k, v in (("mean", 2.0), ("p10", 1.0), ("p50", 1.75), ("p90", 3.25))
} | {
    "distance/length_share": 0.253,
    "distance/cut_share": 0.041,
    "weight/std": 0.4,
    "weight/min": 0.1,
    "weight/max": 2.2,
    "weight/ess": 0.86,
}


# A guide that tells a row's two responses apart, by six standard errors.
FIGURES = {
    "rows": 60,
    "differing": 58,
    "true": 3.0,
    "other": 3.5,
    "none": 3.25,
    "latent_gain": 0.5,
    "sibling_gain": 2.4,
    "sibling_gain_se": 0.4,
    "first_gain": 0.35,
    "first_gain_se": 0.05,
    "own_better": 0.81,
    "own_better_se": 0.03,
    "none_gain": 1.5,
    "none_gain_se": 0.25,
    "other_gain": 4.5,
    "other_gain_se": 0.5,
    "ess": 0.91,
    "length_share": 0.12,
    "cut_share": 0.034,
}
# What a summary of an earlier version has: nats a token, without errors.
OLDER = {"true": 3.0, "other": 3.5, "none": 3.25, "latent_gain": 0.5, "sibling_gain": 0.25}


def first_caution(text: str) -> str:
    """The first caution of table.md; it follows the result."""
    return next(line for line in text.splitlines() if line.startswith("Caution: "))


def all_cautions(text: str) -> list[str]:
    """The sentences of table.md's cautions: those under the result, and those further down."""
    first = [line[9:] for line in text.splitlines() if line.startswith("Caution: ")]
    _, _, more = text.partition("**More cautions**\n\n")
    rest = more.partition("\n\n")[0].splitlines()
    assert len(first) <= 3 and (len(first) == 3 or not rest)
    return first + [line.removeprefix("- ") for line in rest]


def untold(gain: float, error: float) -> dict[str, float]:
    return FIGURES | {"sibling_gain": gain, "sibling_gain_se": error}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    # Greedy and two samples a prompt. Sampled: 0, 1, 1/2, 1/2 before; 1, 1, 1, 1/2 after.
    before = {
        "a": [False, False, False],
        "b": [True, True, True],
        "c": [True, True, False],
        "d": [False, True, False],
    }
    after = {
        "a": [True, True, True],
        "b": [True, True, True],
        "c": [True, True, True],
        "d": [True, False, True],
    }
    put(tmp_path, "data", {"rows/train": 10})
    put(tmp_path, "sft/policy", {"loss": 2.0, "tokens": 999})
    put(tmp_path, "sft/evaluation", {"nll/real": 1.25, "truncated_frac": 0.125, **ACCURACY}, before)
    put(tmp_path, "guide", FIGURES)
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
    assert notation.markdown(text) == (run / "report/table.md").read_text(encoding="utf-8")
    assert text.isascii()  # what a console is shown
    for line in (
        "| sft | 50 +- 25 | 25 +- 12 | - | - | 12.5 | 1.2500 |",
        # paired gaps 1, 0, 1/2, 0: mean 3/8, standard error sqrt(11/48 / 4); greedy gaps 1, 0, 0,
        # 1: mean 1/2
        "| iteration_0 | 50 +- 25 | 25 +- 12 | +50 +- 29 | +38 +- 24 | - | 1.5000 |",
        "| sft | - | - | - | - | - | - | 2.0000 | - | - | 999 |",
        "| iteration_0 | 2 (1, 1.75, 3.25) | 25 / 4 | 0.40 (0.10, 2.20) | 0.86 | +0.123 | 0.750 | "
        "0.6000 | 50.0 | 1234 | 5678 |",
        "| iteration_0 | 2 | 2 | 2 | 2 | 6 |",
        "| on held-out rows | the guide |\n|---|---|\n"
        "| own latent over the sibling's, nats a response | +2.40 +- 0.40 |",
        "| so it tells the two apart (at least 2 standard errors above 0) | yes |",
        "| the same at the first differing token alone, nats | +0.350 +- 0.050 |",
        "| own latent better than the sibling's, % of responses | 81.0 +- 3.0 |",
        "| own latent over none, nats a response | +1.50 +- 0.25 |",
        "| own latent over another row's, nats a response | +4.50 +- 0.50 |",
        "| rows whose two responses differ | 58 of 60 |",
        "| effective sample size of the distances, share of the rows | 0.91 |",
        "| distance explained by length, % of its variance | 12 |",
        "| distance explained by the cut, % of its variance | 3 |",
    ):
        assert line in text, text
    assert "too few to say whether it moved (+38 +- 24 points)" in text


def test_table_json(run: Path) -> None:
    write_report(run)
    table = json.loads((run / "report/table.json").read_text())
    sft, first = table["policies"]
    assert (sft["policy"], first["policy"]) == ("sft", "iteration_0")
    assert first["difference/sampled"] == 0.375
    assert math.isclose(first["difference/sampled_se"], math.sqrt(11 / 48 / 4))
    assert (
        first["responses/tokens"] == 1234
        and first["train/tokens"] == 5678
        and first["seconds"] == 6.0
    )
    assert table["seconds"]["guide"] == 1.5
    assert table["guides"]["guide"] == {"seconds": 1.5, **FIGURES}
    assert first["distance/length_share"] == 0.253


@pytest.mark.parametrize(
    ("gain", "error", "shown"),
    [
        (0.7, 0.4, "+0.70 +- 0.40"),
        (0.0, 0.0, "+0.0 +- 0.0"),
        (-2.4, 0.4, "-2.40 +- 0.40"),
        (1.2e-6, 8e-7, "+1.2e-06 +- 8.0e-07"),
    ],
)
def test_a_guide_near_noise_is_the_first_caution(
    run: Path, gain: float, error: float, shown: str
) -> None:
    """Whatever its gains over no latent and over another row's, and whatever else there is."""
    put(run, "iteration_1/guide", untold(gain, error))
    put(run, "iteration_1/policy", {"rewards/margins": -0.1, "tokens": 1})
    (run / "guide/metrics.jsonl").write_text('{"loss": 4.0}\n' * 6 + '{"loss": 2.0}\n' * 2)
    text = write_report(run)
    first, *others = all_cautions(text)
    assert "Iteration 1's guide does not tell a row's two responses apart" in first
    assert "near noise" in first and f"{shown} nats" in first
    assert [
        part in caution
        for part, caution in zip(
            (
                "margin over its last epoch is -0.100",
                "responses sampled for training were cut",
                "still falling",
            ),
            others,
            strict=True,
        )
    ] == [True] * 3
    assert "(at least 2 standard errors above 0) | yes | NO |" in text
    page = made(run)
    where = [page.text.index(notation.page(caution)) for caution in (first, *others)]
    assert where == sorted(where)
    results = page.text.index("Results on held-out data")
    assert where[2] < results < where[3]  # three under the result, the others further down


@pytest.mark.parametrize("rows", [0, 1, 2, 19])
def test_a_guide_tried_on_few_rows_is_cautioned_about(run: Path, rows: int) -> None:
    """Of one row the standard error is 0, so that any gain seems sure. What is known to be noise
    comes first all the same.
    """
    few = FIGURES | {"differing": rows, "sibling_gain_se": 0.0 if rows < 2 else 0.4}
    (run / "guide/summary.json").write_text(json.dumps({"seconds": 1, **few}))
    said = f"Caution: The guide was tried on only {rows} held-out rows whose responses differ"
    assert first_caution(write_report(run)).startswith(said)
    put(run, "iteration_1/guide", untold(0.7, 0.4))
    text = write_report(run)
    assert first_caution(text).startswith("Caution: Iteration 1's guide does not tell")
    assert text.count(said) == 1


def test_guides_of_an_older_version_are_shown_as_such(run: Path) -> None:
    """Their figures are in nats a token and without errors; nothing says that they are good."""
    (run / "guide/summary.json").write_text(json.dumps({"seconds": 1, **OLDER}))
    text, page = write_report(run), made(run)
    said = "Caution: The guide's held-out figures are of an older version"
    assert first_caution(text).startswith(said)
    assert "tells the two apart" not in text and "tells the two apart" not in page.text
    for said in (text, page.text):
        assert (
            "without standard errors. Own latent over another row's +0.5000, over the sibling's "
            "+0.2500 nats a token."
        ) in said
    assert "Not drawn, “What the guide's latent is worth”: the guide's held-out" in page.text
    put(run, "iteration_1/guide", FIGURES)  # one of each
    text, page = write_report(run), made(run)
    assert "| on held-out rows | iteration 1's guide |" in text and "older version" in text
    assert "+2.40 ± 0.40" in section(page, "pull") and "older version" in section(page, "pull")
    (run / "guide/summary.json").write_text('{"seconds": 1}')  # and what has no figures at all
    assert "without standard errors.\n" in write_report(run)


def test_distances_that_follow_length_or_cuts_are_cautioned_about(run: Path) -> None:
    (run / "guide/summary.json").write_text(
        json.dumps({"seconds": 1, **FIGURES, "length_share": 0.51, "cut_share": 0.5})
    )
    shares = {"distance/length_share": 0.2, "distance/cut_share": 0.77}
    path = run / "iteration_0/distances/summary.json"
    path.write_text(json.dumps({"seconds": 1.5, **DISTANCES, **shares}))
    said = all_cautions(write_report(run))
    assert len(said) == 3
    assert (
        "The guide's held-out distances mostly follow something simpler: the difference in length "
        "of the two responses explains 51 %"
    ) in said[0]
    # Of three at most, the first are each of another kind.
    assert "responses sampled for training were cut" in said[1]
    assert "Iteration 0's distances mostly follow something simpler: how many" in said[2]
    assert "explains 77 % of their variance" in said[2]


def test_the_guide_figure_shows_all_gains_with_their_bars() -> None:
    found = {"guide": FIGURES, "iteration_1/guide": untold(-0.3, 0.2), "iteration_2/guide": OLDER}
    chart = figures.guide(found)
    assert chart.figure is not None
    panels = chart.figure.axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == [
        "over the sibling's",
        "at the first differing token",
        "over none",
        "over another row's",
    ]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        "the guide",
        "iteration 1's guide",
    ]
    for panel, (key, _, unit) in zip(panels, GAINS, strict=True):
        assert panel.get_xlabel() == unit
        (bars,) = panel.containers
        (segments,) = bars.lines[2]
        for place, (segment, name) in enumerate(
            zip(segments.get_segments(), ("guide", "iteration_1/guide"), strict=True)
        ):
            gain, error = found[name][key], found[name][f"{key}_se"]
            expected = [[gain - 1.959964 * error, place], [gain + 1.959964 * error, place]]
            np.testing.assert_allclose(segment, expected)
            assert panel.texts[place].get_text() == notation.page(gain_text(found[name], key))
    assert figures.guide({"guide": OLDER}).figure is None and figures.guide({}).figure is None


def test_options_of_the_loss_are_shown_where_they_are_on() -> None:
    config = to_dict(RunConfig())
    assert not [key for key, _ in words.settings(config, {"data": {}}) if "loss." in key]
    config["loss"] |= {"kind": "ipo", "nll": 0.5}
    shown = [pair for pair in words.settings(config, {"data": {}}) if "loss." in pair[0]]
    assert shown == [("loss.kind", "ipo"), ("loss.nll", 0.5)]
    config["method"] = "sft"
    assert not [key for key, _ in words.settings(config, {"data": {}}) if "loss." in key]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_ln_2_is_no_preference_of_dpo_alone(kind: str) -> None:
    steps = {"iteration_0": [{"rewards/margins": 0.1, "loss/unweighted": 0.6}] * 4}
    chart = figures.training(steps, OWN, kind)
    assert chart.figure is not None
    loss = chart.figure.axes[0]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert ("ln 2: no preference" in labels) == (kind == "sigmoid")
    assert loss.get_ylabel() == ("nats a pair" if kind == "sigmoid" else "nats² a pair")


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "start/evaluation", {"nll/real": 2.5}, {})
    text = write_report(tmp_path)
    assert "| start | 2.5000 |" in text
    assert "accuracy, %" not in text and "**Training**" not in text and "moved" not in text


def test_other_prompts_are_not_compared(run: Path) -> None:
    path = run / "iteration_0/evaluation/answers.jsonl"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    assert "What moved" not in write_report(run)


def test_benchmarks_stand_in_the_papers_form(run: Path) -> None:
    for policy, scores in {"sft": (0.5, 0.2), "iteration_0": (0.6, 0.25)}.items():
        for task, metric, score in zip(
            ("arc_easy", "gsm8k"), ("acc", "exact_match/strict"), scores, strict=True
        ):
            summary = {
                "rows": 50,
                "shots": 5,
                metric: score,
                f"{metric}_se": 0.07,
                "exact_match/flexible": 0.9,
            }
            put(run, f"{policy}/benchmarks/{task}", summary)
            put(run, f"{policy}/benchmarks/{task}.partial", {"rows": 1})  # of a run that was killed
    text = write_report(run)
    assert (
        "| policy | arc_easy acc, % | gsm8k exact_match/strict, % | mean relative gain, % |"
    ) in text
    assert "| sft | 50.0 +- 7.0 | 20.0 +- 7.0 | - |" in text
    assert "| iteration_0 | 60.0 +- 7.0 | 25.0 +- 7.0 | +22.50 |" in text
    page = made(run)
    assert (
        "arc_easy<small>acc,\u00a0%, 5-shot, 50 rows</small>"
    ) in page.source and "+22.50\u00a0%" in page.text
    assert "Mean relative gain over 2 benchmarks: +22.50\xa0%." in page.text


# ----------------------------------------------------------------------------------------- the page

CHARTS = (
    "held_out",
    "distances",
    "correlations",
    "distance_length",
    "distance_nll",
    "guide",
    "weights",
    "training",
    "validation",
    "budget",
)
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """A page's text, elements and complaints: unclosed or crossed elements, repeated ids."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.text, self.open = source, "", list[str]()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self.open]
        ids = [given["id"] for _, given in self.elements if "id" in given]
        self.problems += [f"id {i} twice" for i in set(ids) if ids.count(i) > 1]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.text += data

    def loads(self) -> list[str]:
        """What a browser would fetch, or run."""
        found = [
            f"<{tag}>"
            for tag, _ in self.elements
            if tag in {"script", "link", "img", "iframe", "object", "base"}
        ]
        for tag, given in self.elements:
            for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                value = given.get(name) or ""
                if value and not value.startswith(("#", "data:")):
                    found.append(f"<{tag} {name}={value}>")
            found += [f"<{tag} {name}>" for name in given if name.startswith("on")]
        return found + re.findall(r"@import[^;]*|url\((?!#)[^)]*\)", self.source)


def made(run: Path) -> Page:
    """The page of a run folder, after the checks that every page must pass."""
    (run / "config.yaml").touch()
    page = Page(write_page(run).read_text(encoding="utf-8"))
    assert not page.problems and not page.loads()
    for svg in (run / "report/figures").glob("*.svg"):
        assert svg.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert f'id="{svg.stem}"' in page.source
    assert page.source.count("<svg") == len(list((run / "report/figures").glob("*.svg")))
    return page


@pytest.fixture
def toy(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the toy run without its models, and without its report."""
    folder = tmp_path / "toy"
    shutil.copytree(
        toy_run,
        folder,
        ignore=shutil.ignore_patterns("model.safetensors", "tokenizer.json", "report"),
    )
    return folder


def test_the_page_of_a_whole_run_with_hostile_texts(toy: Path) -> None:
    hostile = (
        "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)>&amp; \u2028 {{ 7 * "
        "7 }} " + "x" * 600
    )
    path = toy / "iteration_0/responses/responses.jsonl"
    records = [json.loads(line) for line in path.read_text().split("\n") if line]
    path.write_text(
        "".join(json.dumps({**record, "response": hostile}) + "\n" for record in records)
    )
    page = made(toy)
    assert hostile in page.text and "<script" not in page.source
    for name in CHARTS:
        assert (toy / f"report/figures/{name}.svg").is_file(), name
    assert (
        "After 2 iterations of LD-Align, sampled accuracy on held-out prompts did not move"
    ) in page.text
    assert "Why both log-probs may fall" in page.text and "ρ = " in page.text
    assert (
        "Not drawn, “Distance and reward”: no responses were scored by a reward model."
    ) in page.text
    table = json.loads((toy / "iteration_1/policy/summary.json").read_text())
    assert f"{table['tokens']:,.0f}" in page.text  # the token budget
    assert (
        "learning_rate: 0.001"
    ) in page.text and "ldalign align --config config.yaml run=" in page.text


def test_every_guide_and_every_iteration_is_cautioned_about(run: Path) -> None:
    """Numbers by hand; without the faults put in here there is one caution."""
    assert write_report(run).count("Caution: ") == 1
    put(
        run,
        "iteration_1/guide",
        untold(0.7, 0.4) | {"none": 2.9},
    )
    losses = [9.0] * 4 + [4.0] * 2 + [2.0] * 2
    (run / "iteration_1/guide/metrics.jsonl").write_text(
        "".join(json.dumps({"loss": loss}) + "\n" for loss in losses)
    )
    put(
        run,
        "iteration_2/guide",
        FIGURES | {"cut_share": 0.6},
    )
    put(run, "iteration_1/judged", {"judged/ties": 0.5, "judged/none": 0.25})
    put(
        run,
        "iteration_1/policy",
        {"rewards/margins": -0.1, "losers/identical_frac": 0.75, "pairs": 3, "tokens": 1},
    )
    put(run, "iteration_2/evaluation", {"nll/real": 1.5, "truncated_frac": 0.5, **ACCURACY}, {})
    said = all_cautions(write_report(run))
    for part in (
        "Iteration 0: 50 % of the responses sampled for training were cut",
        "Iteration 1's guide does not tell a row's two responses apart",
        "Iteration 1's guide reconstructs no better",
        "Iteration 1's guide's training loss was still falling at its end, from 4.000 to 2.000",
        "Iteration 2's guide's held-out distances mostly follow something simpler: how many",
        "neither sample on 75 % of the prompts (25 %",
        "Iteration 1 trained on 3 pairs only: 75 %",
        "Iteration 1: the mean reward margin over its last epoch is -0.100",
        "Iteration 2: 50 % of the held-out answers were cut at max_new_tokens",
    ):
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 9, said
    page = made(run)
    assert all(notation.page(line) in page.text for line in said)


def test_cut_answers_are_wrong_where_answers_are_checked() -> None:
    for accuracy in ({}, ACCURACY):
        row = {"policy": "start", "truncated_frac": 0.5, **accuracy}
        (said,) = cautions({"guides": {}, "policies": [row], "analysis": {}}, {})
        assert "held-out answers were cut at max_new_tokens" in said
        assert ("counts as wrong" in said) == bool(accuracy)


def test_cut_answers_of_several_policies_are_one_caution(run: Path) -> None:
    for name, share in (("iteration_1", 0.5), ("iteration_2", 0.75)):
        put(run, f"{name}/evaluation", {"nll/real": 1.5, "truncated_frac": share, **ACCURACY}, {})
        put(run, f"{name}/policy", {"tokens": 1})
    (said,) = (one for one in all_cautions(write_report(run)) if "held-out answers" in one)
    assert said.startswith("Iteration 1, iteration 2: 50 %, 75 % of the held-out answers were cut")


def test_when_a_run_was_made(tmp_path: Path) -> None:
    """A day that both ends share is said once."""
    for name, at in (("guide", 1_800_000_000), ("sft/policy", 1_800_000_000)):
        put(tmp_path, name, {})
        os.utime(tmp_path / name / "summary.json", (at, at))
    said = "2027-01-15 08:00"
    assert f" · finished {said} UTC · " in words.origin(tmp_path, {})
    for later, end in ((3600, "09:00"), (86_400, "2027-01-16 08:00")):
        at = 1_800_000_000 + later
        os.utime(tmp_path / "guide/summary.json", (at, at))
        assert f" · stages from {said} to {end} UTC · " in words.origin(tmp_path, {})


def test_a_package_without_a_checkout_says_its_version(tmp_path: Path) -> None:
    machine: dict[str, str | None] = {"ldalign": "0.1.0", "git_commit": None}
    assert words.origin(tmp_path, machine).endswith(" · ldalign 0.1.0")
    machine["git_commit"] = "0123456789abcdef"
    assert words.origin(tmp_path, machine).endswith(" · ldalign 0.1.0, commit 0123456789ab")


@pytest.mark.parametrize("scored", [False, True])
def test_accuracy_is_explained_where_there_is_any(tmp_path: Path, scored: bool) -> None:
    """Rows of one's own name no checker: a note on how it checks would be of another run."""
    more = {"accuracy/greedy": 0.5} if scored else {}
    for name in ("start/evaluation", "iteration_0/evaluation"):
        put(tmp_path, name, {"nll/real": 2.0, "nll/real_se": 0.1, **more})
    put(tmp_path, "iteration_0/policy", {"loss": 0.6})
    (tmp_path / "config.yaml").write_text("policy: toy\n")
    (tmp_path / "environment.json").write_text("{}")
    table = write_report(tmp_path)
    rows = json.loads((tmp_path / "report/table.json").read_text())["policies"]
    page = words.results(rows)
    assert ("Accuracy: a program checks" in page["note"]) == scored
    assert ("Accuracy: a program checks" in table) == scored and "NLL: of the data set's" in table


def test_tokens_of_guide_and_agreement_are_in_the_budget(run: Path) -> None:
    summary = json.loads((run / "guide/summary.json").read_text())
    (run / "guide/summary.json").write_text(json.dumps(summary | {"tokens": 4321}))
    put(run, "agreement_samples", {"rows": 4, "tokens": 777})
    lines = {line[0]: line for line in words.budget(read_summaries(run))}
    assert lines["guide"][1:3] == ("–", "4,321") and lines["agreement_samples"][1:3] == ("777", "–")
    # 1234 + 777; 999 + 5678, without the guide's own
    assert lines["all"][1:3] == ("2,011", "6,677")


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def other_method(run: Path, method: str, rows: list[dict[str, object]]) -> None:
    (run / "config.yaml").write_text(f"method: {method}\n")
    write_jsonl(run / "data/train.jsonl", rows)
    steps = [
        {
            "rewards/margins": 0.1,
            "rewards/chosen": -0.1,
            "rewards/rejected": -0.2,
            "loss/unweighted": 0.6,
        }
    ] * 4
    write_jsonl(
        run / "iteration_0/policy/metrics.jsonl", [{"stage": "x", **step} for step in steps]
    )
    reference = run / "iteration_0/reference"
    reference.mkdir()
    (reference / "rows.json").write_text(json.dumps([row["id"] for row in rows]))
    save_file({"logps": np.zeros((len(rows), 2))}, reference / "reference.safetensors")


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_given_pairs_are_called_chosen_and_rejected(tmp_path: Path) -> None:
    ask = turn("user", "Which?")
    other_method(
        tmp_path,
        "dpo",
        [
            {
                "id": "a",
                "chosen": [ask, turn("assistant", "this one")],
                "rejected": [ask, turn("assistant", "that one")],
            }
        ],
    )
    page = made(tmp_path)
    for part in (
        "this one",
        "that one",
        "reward of the chosen responses \u22120.100, of the rejected ones \u22120.200",
        "DPO has no guide, so this run has no latent distances",
        "DPO has no guide and weighs all pairs alike",
    ):
        assert part in page.text, part
    assert "generated" not in section(page, "steps") + section(page, "samples")
    assert ">chosen<" in page.source and ">rejected<" in page.source


def test_ranked_samples_are_called_preferred_and_not(tmp_path: Path) -> None:
    rows = [
        {"id": i, "messages": [turn("user", "Which?"), turn("assistant", f"real {i}")]}
        for i in "abc"
    ]
    other_method(tmp_path, "self_reward", rows)
    write_jsonl(
        tmp_path / "iteration_0/responses/responses.jsonl",
        [
            {"id": i, "response": f"{n} of {i}", "n_tokens": 3, "finish_reason": "stop"}
            for i in "abc"
            for n in (1, 2)
        ],
    )
    assert read_pairs(tmp_path, 0) is None  # not judged yet
    write_jsonl(
        tmp_path / "iteration_0/judged/judged.jsonl",
        [
            {"id": "a", "preference": 0.25},
            {"id": "b", "preference": 0.5},
            {"id": "c", "preference": None},
        ],
    )
    pairs = read_pairs(tmp_path, 0)
    assert pairs and pairs.real[0] == "2 of a" and pairs.generated[0] == "1 of a"
    assert pairs.trained.tolist() == [True, False, False]
    page = made(tmp_path)
    for part in (
        "real a",
        "preferred, iteration 0",
        "rejected, iteration 0",
        "judge preferred the other, p = 0.750",
        "reward of the preferred responses \u22120.100, of the rejected ones",
    ):
        assert part in page.text, part
    assert "generated" not in section(page, "steps")


def test_sft_has_no_pairs(tmp_path: Path) -> None:
    other_method(
        tmp_path,
        "sft",
        [{"id": "a", "messages": [turn("user", "Which?"), turn("assistant", "this")]}],
    )
    shutil.rmtree(tmp_path / "iteration_0/reference")
    write_jsonl(
        tmp_path / "iteration_0/policy/metrics.jsonl",
        [{"stage": "x", "nll": 2.0 - n / 9} for n in range(9)],
    )
    page = made(tmp_path)
    assert (
        "Why both log-probs may fall"
    ) not in page.text and "SFT has no guide and no pairs" in page.text
    assert "SFT trains on the data alone" in page.text
    assert (tmp_path / "report/figures/training.svg").is_file()


def section(page: Page, name: str) -> str:
    """The page's source from one heading to the next."""
    found = re.search(rf'<h2 id="{name}">(.*?)<h2 ', page.source, flags=re.DOTALL)
    assert found
    return found[1]


def test_spin_has_no_distances(toy: Path) -> None:
    shutil.rmtree(toy / "guide")
    for t in (0, 1):
        shutil.rmtree(toy / f"iteration_{t}/distances")
    config = toy / "config.yaml"
    config.write_text(config.read_text().replace("method: ld_align", "method: spin"))
    page = made(toy)
    assert "After 2 iterations of SPIN" in page.text
    assert "SPIN has no guide, so this run has no latent distances" in page.text
    names = {path.stem for path in (toy / "report/figures").glob("*.svg")}
    assert names == {"held_out", "training", "validation", "budget"}
    assert "the first, the last and three evenly spaced" in page.text  # how the samples are chosen


def test_a_control_without_a_guide_is_named_as_such(toy: Path) -> None:
    shutil.rmtree(toy / "guide")
    config = toy / "config.yaml"
    config.write_text(config.read_text().replace("weights: latent", "weights: pooled"))
    page = made(toy)
    assert "lies from the data set's (“real”) in the space of the start policy's mean" in page.text
    assert (
        "a control in their place: pooled, by the distance of the two responses' mean" in page.text
    )
    assert "No guide was trained." in page.text
    assert "Not drawn, “What the guide's latent is worth”: this run trained no guide" in page.text
    assert "Iteration 0: of the variance of these distances, the difference in length" in page.text
    assert "sentence-embedding model" in words.measured_in({"weights": "semantic"})
    assert words.measured_in({"weights": "shuffled"}) == "the guide's latent space"
    for kind in WEIGHTS:  # each is said, in words of its own
        text = words.method_text({"method": "ld_align", "weights": kind})
        assert (f"in their place: {kind}, " in text) == (kind != "latent")
        assert ("No guide was trained" in text) == (kind not in GUIDED)
    shorter = words.method_text({"method": "sft", "sft_prompts": "pairs"})
    assert "those prompts alone" in shorter


def test_an_unfinished_run(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each time less is there; what an earlier report drew and the run no longer has is gone."""
    (toy / "report/figures").mkdir(parents=True)
    (toy / "report/figures/training.png").touch()
    shutil.rmtree(toy / "iteration_1")
    for name in ("policy", "evaluation", "reference"):
        shutil.rmtree(toy / "iteration_0" / name)
    page = made(toy)
    assert (
        "No iteration has finished: this"
    ) in page.text and "no iteration has trained yet" in page.text
    assert (toy / "report/figures/distances.svg").is_file()
    assert not (toy / "report/figures/training.png").exists()
    for path in toy.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    script.main([f"run={toy}"])
    assert f"The report: {toy}/report/report.html" in capsys.readouterr().err
    assert "No stage of this run has results yet." in made(toy).text


def test_rewards_are_shown(run: Path) -> None:
    put(run, "iteration_0/reward", {"reward/mean": 0.731, "reward/win_rate": 0.25})
    page = made(run)
    assert "reward/win_rate" in page.text and "0.731" in page.text
    assert "No agreement with a judge: it was not measured." in page.text


def agreement(**more: float) -> dict[str, float]:
    """A summary as `ldalign.evaluation.agreement.summary` makes it; the judge is sure of half."""
    out: dict[str, float] = {"prompts": 50, "rows": 40, "ties": 7, "no_verdict": 2, "identical": 1}
    out |= {"rate": 0.65, "low": 0.495, "high": 0.779, "chance": 0.5}
    out |= {"sure_rows": 20, "sure_rate": 0.8, "sure_low": 0.584, "sure_high": 0.919}
    for n, name in enumerate(RIVALS):
        for part, rows in (("", 36), ("_sure", 18)):
            own = {"rows": rows, "rate": 0.5 + 0.01 * n, "low": 0.3, "high": 0.7}
            own |= {"behind": 0.15 - 0.01 * n, "behind_se": 0.06}
            out |= {f"{name}{part}_{key}": value for key, value in own.items()}
    return {f"agreement/{key}": value for key, value in (out | more).items()}


def test_agreement_is_shown_beside_its_rivals(run: Path) -> None:
    put(run, "agreement", agreement(length_sure_rows=4))
    manifest = {"parents": {"judge.model": "checker", "guide": "f00d"}}
    (run / "agreement/manifest.json").write_text(json.dumps(manifest))
    text, page = write_report(run), made(run)
    half = "surer half: "
    head = ("agrees, % (95 % interval)", "pairs", "first row less this, points")
    titles = ["what calls a sample the worse one", *head, *(half + title for title in head)]
    for line in (
        f"| {' | '.join(titles)} |",
        "| the guide | 65.0 (49.5 to 77.9) | 40 | - | 80.0 (58.4 to 91.9) | 20 | - |",
        "| the guide before training | 50 (30 to 70) | 36 | +15.0 +- 6.0 | "
        "50 (30 to 70) | 18 | +15.0 +- 6.0 |",
        "| the policy's mean states | 51 (30 to 70) | 36 | +14.0 +- 6.0 | ",
        "| NLL under the policy (higher is worse) | 52 (30 to 70) | 36 | +13.0 +- 6.0 | ",
        # an error over four pairs says nothing
        "| length (longer is worse) | 53 (30 to 70) | 36 | +12.0 +- 6.0 | 53 (30 to 70) | 4 | - |",
        "The judge (checker) agreed with the guide in 65.0 % of the cases (95 % interval 49.5 to "
        "77.9 %); chance is 50 %: the interval holds chance, so no agreement is shown. Of 50 "
        "prompts: 40 decided, 7 ties, 2 without a verdict, 1 with two equal samples.",
    ):
        assert line in text, text
    shown = section(page, "judges")
    for cells in (
        '<th scope="row">the guide</th><td>65.0 (49.5 to 77.9)</td><td>40</td><td>–</td>',
        '<th scope="row">length (longer is worse)</th><td>53 (30 to 70)</td><td>36</td>'
        "<td>+12.0 ± 6.0</td><td>53 (30 to 70)</td><td>4</td><td>–</td>",
    ):
        assert cells in shown, shown
    assert "The judge (checker) agreed with the guide in 65.0\u00a0%" in shown and "+-" not in shown
    table = json.loads((run / "report/table.json").read_text())
    assert table["agreement"]["judge"] == "checker"
    assert table["agreement"]["agreement/untrained_behind"] == 0.15


def test_what_agreement_amounts_to() -> None:
    """Chance outside the interval; a judge that is always as sure, an older summary, no pair."""
    assert "more often than chance" in sentence(agreement(low=0.51))
    assert "less often than chance" in sentence(agreement(rate=0.3, low=0.2, high=0.45))
    titles, rows = agreement_rows(agreement(sure_rows=40))
    assert len(titles) == 3 and len(rows) == 5
    older = {"agreement/rate": 0.64, "agreement/low": 0.5, "agreement/high": 0.75}
    said = "in 64.0 % of the cases (95 % interval 50.0 to 75.0 %); chance is 50 %"
    assert said in sentence(older)
    assert agreement_rows(older) == ([], [])
    older |= {"agreement/rows": 40, "agreement/length_rows": 30, "agreement/length_rate": 0.5}
    older |= {"agreement/length_low": 0.33, "agreement/length_high": 0.67}
    titles, rows = agreement_rows(older)
    assert [cells for _, cells in rows] == [
        ["64.0 (50.0 to 75.0)", "40"],
        ["50.0 (33.0 to 67.0)", "30"],
    ]
    none = {"agreement/prompts": 3, "agreement/rows": 0, "agreement/identical": 3}
    assert "decided no pair together" in sentence(none) and agreement_rows(none) == ([], [])


@pytest.mark.parametrize(
    ("parents", "config", "name"),
    [
        ({"judge.model": "checker"}, {"model": "policy"}, "checker"),
        ({"judge.model": "f00d"}, {"model": "policy"}, "policy, of its own samples"),
        ({"judge.model": "f00d"}, {"model": "checker"}, "policy, of its own samples"),
        ({"judge.model": "beef"}, {"model": "models/Big-7B"}, "language model, Big-7B"),
        ({"judge.model": "beef"}, {"model": "checker"}, "language model"),
        ({"judge.model": "embedding"}, {"model": "checker"}, "embedding"),
        (
            {"judge.model": "embedding", "judge.folder": "beef"},
            {"model": "embedding", "folder": "sentence-transformers/all-MiniLM-L6-v2"},
            "embedding, all-MiniLM-L6-v2",
        ),
        (
            {"judge.model": "gpt", "judge.endpoint": "http://localhost:8000/v1"},
            {"model": "checker"},
            "endpoint, gpt",
        ),
        ({}, {}, ""),
    ],
)
def test_the_judge_is_named(
    tmp_path: Path, parents: dict[str, str], config: dict[str, str], name: str
) -> None:
    """By what the stage was made from: the config may be a later command's."""
    put(tmp_path, "agreement", agreement())
    put(tmp_path, "agreement_samples", {"rows": 50})
    for stage, made_from in (("agreement", parents), ("agreement_samples", {"policy": "f00d"})):
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"parents": made_from}))
    found = read_agreement(tmp_path, {"judge": config})
    assert found["judge"] == name and found["guide"] == "the guide"
    assert sentence(found).startswith(f"The judge ({name}) agreed" if name else "The judge agreed")
    (tmp_path / "config.yaml").write_text(json.dumps({"judge": config}))
    assert sentence(found) in write_report(tmp_path)


def test_agreement_without_a_guide_is_of_the_mean_states(tmp_path: Path) -> None:
    put(tmp_path, "agreement", agreement())
    manifest = {"parents": {"judge.model": "checker", "guide": "none"}}
    (tmp_path / "agreement/manifest.json").write_text(json.dumps(manifest))
    found = read_agreement(tmp_path, {})
    assert "agreed with the policy's mean states in 65.0 %" in sentence(found)
    names = [who for who, _ in agreement_rows(found)[1]]
    assert names[0] == "the policy's mean states" and names.count(names[0]) == 1
    assert read_agreement(tmp_path / "none", {}) == {}


def test_without_matplotlib_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'matplotlib" in try_page(run)
    with pytest.raises(EnvironmentProblem, match="matplotlib is not installed"):
        write_page(run)
    assert not (run / "report/report.html").exists()


def test_a_page_that_fails_loses_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldalign.report.page.gather", lambda run: 1 / 0)
    assert re.search(r"not written: ZeroDivisionError: .* tries again", try_page(run))


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        script.main([f"run={tmp_path}"])
    with pytest.raises(InputError, match="run"):
        script.main([])


# ------------------------------------------------------------------------------- every kind of run

KINDS = {
    "align": (
        f"LD-Align on {POLICY}",
        "LD-Align (iteration 1) minus continual SFT from the same start: ",
        ["results", "run", "distance", "pull", "steps", "judges", "samples", "cost", "again"],
    ),
    "evaluate": (
        f"Evaluation of {POLICY}",
        "No difference to a baseline, as this run measured one policy alone: the policy given "
        "reached ",
        ["results", "run", "samples", "cost", "again"],
    ),
    "judge": (
        f"Judge agreement on {POLICY}",
        "The judge (checker) agreed with the guide in 64.8 % of the cases (95 % interval 53.2 to ",
        ["judges", "run", "cost", "again"],
    ),
    "sft": (
        f"Supervised fine-tuning of {POLICY}",
        "No difference to a baseline, as this run measured one policy alone: the policy after SFT "
        "reached ",
        ["results", "run", "steps", "samples", "cost", "again"],
    ),
    "guide": (
        f"A guide for {POLICY}",
        "No difference to a baseline, as no policy was trained, only a guide. The guide tells a "
        "row's two responses apart: a response is +1.03 +- 0.24 nats likelier",
        ["pull", "run", "cost", "again"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_page_of_its_own(tmp_path: Path, kind: str) -> None:
    """Title, first sentence and parts are those of what was run; no part is empty."""
    title, first, parts = KINDS[kind]
    run = made_run(tmp_path / kind, kind)
    text, page = write_report(run), made(run)
    assert text.startswith(first)
    assert f"<h1>{title}</h1>" in page.source
    assert re.search(rf'<p class="lead">{re.escape(notation.page(first))}', unescape(page.source))
    headings = re.findall(r'<h2 id="([a-z]+)">', page.source)
    assert headings == parts
    linked = re.findall(r'<li><a href="#([a-z]+)">', page.source)
    assert linked == parts
    assert "small tasks made by a program that also checks the answers" in section(page, "run")
    script = "align" if kind == "align" else kind
    assert f"ldalign {script} --config config.yaml" in page.text
    if kind != "align":
        absent = re.findall(r'<p class="absent">(.*?)</p>', page.source)
        assert not absent, absent
        assert "learning_rate" not in section(page, "run") or kind == "sft"
    accessible(page)


def accessible(page: Page) -> None:
    """Headings in order, heads of tables that say what they head, drawings with a text."""
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), levels
    heads = [given.get("scope") for tag, given in page.elements if tag == "th"]
    assert heads and set(heads) == {"col", "row"}
    for row in re.findall(r"<tbody>(.*?)</tbody>", page.source, flags=re.DOTALL):
        assert row.count("<tr>") == row.count('<th scope="row">')
    drawings = [given for tag, given in page.elements if tag == "svg"]
    assert all(d.get("role") == "img" and d.get("aria-label") for d in drawings)
    assert page.source.count("<figcaption>") == len(drawings)


def test_a_term_is_explained_where_it_first_stands_and_once(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "align")
    text, page = write_report(run), made(run)
    terms = re.findall(r"<dfn>(.*?)</dfn>: ", page.source)
    assert len(set(terms)) == len(terms) == len(TERMS) - ("reward accuracy" not in page.text)
    # No block of the page before the one that explains the guide speaks of a guide.
    blocks = page.source.split("<main>")[1].split('<p class="terms">')
    before = [block for block in blocks if "<dfn>Guide</dfn>" not in block]
    at = next(n for n, block in enumerate(blocks) if "<dfn>Guide</dfn>" in block)
    parts = "".join(before[: at - 1])
    parts = re.sub(r"<(svg|nav|pre|dl|details)\b.*?</\1>|<[^>]*>", " ", parts, flags=re.DOTALL)
    assert "guide" not in parts.lower()
    for term, _, meaning in TERMS:
        assert text.count(f"{term[0].upper()}{term[1:]}: {meaning}.") <= 1
    first = text.split("**Held out**")[0]
    for term in ("Policy", "Sampled", "Points", "95 % interval", "Continual SFT"):
        assert f"{term}: " in first, first
    assert "NLL: minus" in text and "Weight: how" in text and "Reward accuracy: the" in text


def test_signs_are_true_in_pages_and_plain_in_json(run: Path) -> None:
    """Names, paths, code and what a policy wrote keep their hyphens."""
    path = run / "sft/evaluation/answers.jsonl"
    better = {name: [True, True, True] for name in "abcd"}
    lines = [json.dumps({"id": name, "correct": right}) + "\n" for name, right in better.items()]
    path.write_text("".join(lines))
    write_report(run)
    text = (run / "report/table.md").read_text(encoding="utf-8")
    assert "| iteration_0 | 50 +- 25 | 25 +- 12 | +0.0 +- 0.0 | \u221212 +- 12 |" in text
    assert "greedy \u2212 sft, points" in text and "| - |" in text
    assert "\\u2212" not in (run / "report/table.json").read_text()
    page = made(run)
    assert "\u221212 ± 12 points" in page.text and "+-" not in page.text
    assert "LD-Align" in page.text


@pytest.mark.parametrize("checked", [True, False])
def test_answers_before_and_after_stand_side_by_side(checked: bool, tmp_path: Path) -> None:
    """Also where no program checks them: then the page counts changes, and no verdicts."""
    texts = {"start": ["a", "b", "c"], "iteration_0": ["a", "B", "C"]}
    verdicts = {"start": [True, True, False], "iteration_0": [True, True, True]}
    for policy, greedy in texts.items():
        lines = [
            {"id": str(i), "prompt": f"p{i}", "real": "r", "greedy": text, "correct": right}
            for i, (text, right) in enumerate(
                zip(greedy, ([one] * checked for one in verdicts[policy]), strict=True)
            )
        ]
        folder = tmp_path / policy / "evaluation"
        folder.mkdir(parents=True)
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = words.answers(tmp_path, [{"policy": name} for name in texts], "iteration_0")
    labels = [one["label"] for one in shown["answers"]]
    assert labels == (["row 2", "row 1"] if checked else ["row 1", "row 2"])
    assert [side["text"] for side in shown["answers"][-1]["answers"]] == (
        ["r", "b", "B"] if checked else ["r", "c", "C"]
    )
    rule = shown["answer_rule"]
    assert rule.startswith("of 3, 2 changed from ") and "the first 2 in the file's order" in rule
    assert ("1 became right and 0 became wrong" in rule) == ("beginning with" in rule) == checked


def test_distances_that_are_all_equal_have_a_page(tmp_path: Path) -> None:
    """A guide that learned nothing may leave such; no rank is above another then."""
    run = made_run(tmp_path / "run", "align")
    for path in run.glob("iteration_*/distances/distances.jsonl"):
        lines = [json.loads(line) | {"distance": 0.5} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    page = write_page(run).read_text()
    assert "Iteration 0: all distances are equal" in page


def test_a_run_of_many_iterations_is_drawn_legibly(tmp_path: Path) -> None:
    """30 of them: no drawing collapses for its legend or its panels, and the captions say that some
    iterations alone are drawn.
    """
    run = made_run(tmp_path / "run", "align")
    steps = read_steps(run, ["iteration_0/policy"])["iteration_0/policy"]
    checks = read_validation(run, ["iteration_0/policy"])["iteration_0/policy"]
    pairs = read_pairs(run, 0)
    assert pairs is not None
    many = [replace(pairs, iteration=t) for t in range(30)]
    found: dict[str, Any] = {f"iteration_{t}": {"pairs": 9} for t in range(30)}
    policies = [{"policy": name} for name in found]
    for chart in (
        figures.distances(many, policies),
        figures.against(figures.LENGTH, many, found),
        figures.weights(many, found),
        validation({"sft": checks, **dict.fromkeys(found, checks)}, {}),
    ):
        assert chart.caption.endswith(" Drawn: 6 of 30 iterations, evenly spread.")
        draw(chart)
    training = figures.training(dict.fromkeys(found, steps), OWN, "sigmoid")
    draw(training)
    assert training.figure is not None
    labels = [text.get_text() for text in training.figure.axes[0].texts]
    assert labels == [f"iteration {t}" for t in (0, 6, 12, 18, 24)]
    for few in (many[:4], many[:5]):
        chart = figures.against(figures.LENGTH, few, found)
        assert chart.figure is not None and len(chart.figure.axes) == len(few)
        assert "Drawn: " not in chart.caption
        draw(chart)


def draw(chart: Chart) -> None:
    """Lays a drawing out as it is written; it fails where there is no room for the axes."""
    assert chart.figure is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout not applied")
        chart.figure.draw_without_rendering()
