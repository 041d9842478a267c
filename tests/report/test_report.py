"""The tables, from summaries written by hand; the page, from a toy run, as a browser reads it."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ldalign.report import words
from ldalign.report.analysis import read_pairs
from ldalign.report.page import try_page, write_page
from ldalign.report.table import read_summaries, write_report
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
    "weight/std": 0.4,
    "weight/min": 0.1,
    "weight/max": 2.2,
    "weight/ess": 0.86,
}


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
    put(
        tmp_path,
        "guide",
        {"true": 3.0, "other": 3.5, "none": 3.25, "latent_gain": 0.5, "sibling_gain": 0.25},
    )
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
        # paired gaps 1, 0, 1/2, 0: mean 3/8, standard error sqrt(11/48 / 4); greedy gaps 1, 0, 0,
        # 1: mean 1/2
        "| iteration_0 | 50.0 +- 25.0 | 25.0 +- 12.5 | +50.0 +- 28.9 | +37.5 +- 23.9 | - | 1.5000 "
        "|",
        "| sft | - | - | - | - | - | 2.0000 | - | - | 999 |",
        "| iteration_0 | 2 (1, 1.75, 3.25) | 0.40 (0.10, 2.20) | 0.86 | +0.123 | 0.750 | 0.6000 | "
        "50.0 | 1234 | 5678 |",
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
    assert (
        first["responses/tokens"] == 1234
        and first["train/tokens"] == 5678
        and first["seconds"] == 6.0
    )
    assert table["seconds"]["guide"] == 1.5


def test_a_latent_that_says_nothing_is_shouted(run: Path) -> None:
    (run / "guide/summary.json").write_text(
        json.dumps(
            {
                "true": 3,
                "other": 3,
                "none": 3,
                "latent_gain": -0.01,
                "sibling_gain": 0,
                "seconds": 1,
            }
        )
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
        "arc_easy<small>acc, %, 5-shot, 50 rows</small>"
    ) in page.source and "+22.50 %" in page.text
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
    "budget",
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


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
        "Distance and reward: not drawn: no responses were scored by a reward model."
    ) in page.text
    table = json.loads((toy / "iteration_1/policy/summary.json").read_text())
    assert f"{table['tokens']:,.0f}" in page.text  # the token budget
    assert (
        "learning_rate: 0.001"
    ) in page.text and "train/align.py --config config.yaml" in page.text


def test_every_guide_and_every_iteration_is_cautioned_about(run: Path) -> None:
    """Numbers by hand; without the faults put in here there is one caution."""
    assert write_report(run).count("Caution: ") == 1
    put(
        run,
        "iteration_1/guide",
        {"true": 3.0, "other": 3.1, "none": 2.9, "latent_gain": 0.1, "sibling_gain": -0.002},
    )
    losses = [9.0] * 4 + [4.0] * 2 + [2.0] * 2
    (run / "iteration_1/guide/metrics.jsonl").write_text(
        "".join(json.dumps({"loss": loss}) + "\n" for loss in losses)
    )
    put(
        run,
        "iteration_2/guide",
        {"true": 3.0, "other": 3.004, "none": 3.1, "latent_gain": 0.004, "sibling_gain": 0.2},
    )
    put(run, "iteration_1/judged", {"judged/ties": 0.5, "judged/none": 0.25})
    put(
        run,
        "iteration_1/policy",
        {"rewards/margins": -0.1, "losers/identical_frac": 0.75, "pairs": 3, "tokens": 1},
    )
    put(run, "iteration_2/evaluation", {"nll/real": 1.5, "truncated_frac": 0.5, **ACCURACY}, {})
    said = [line for line in write_report(run).splitlines() if line.startswith("Caution: ")]
    for part in (
        "Iteration 0: 50% of its sampled responses were cut",
        "Iteration 1's guide's sibling gain is -0.0020",
        "does not tell the two responses of a row apart",
        "Iteration 1's guide reconstructs no better",
        "Iteration 1's guide's training loss was still falling at its end, from 4.000 to 2.000",
        "Iteration 2's guide's latent gain is only +0.0040 nats/token",
        "neither sample on 75% of the prompts (25%",
        "Iteration 1 trained on 3 pairs only: 75%",
        "Iteration 1: the mean reward margin over its last epoch is -0.100",
        "Iteration 2: 50% of the held-out answers were cut",
    ):
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 9, said
    assert all(line.removeprefix("Caution: ") in made(run).text for line in said)


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
        "reward of the chosen responses -0.100, of the rejected ones -0.200",
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
        "reward of the preferred responses -0.100, of the rejected ones",
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
    assert names == {"held_out", "training", "budget"}
    assert "the first, the last and three evenly spaced" in page.text  # how the samples are chosen


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


def test_rewards_and_agreement_are_shown(run: Path) -> None:
    put(run, "iteration_0/reward", {"reward/mean": 0.731, "reward/win_rate": 0.25})
    put(
        run,
        "agreement",
        {
            "agreement/rate": 0.64,
            "agreement/low": 0.5,
            "agreement/high": 0.75,
            "agreement/chance": 0.5,
        },
    )
    page = made(run)
    assert "reward/win_rate" in page.text and "0.731" in page.text
    assert (
        "The judge agreed in 64.0% of the cases (95 % 50.0% to 75.0%); chance is 50.0%."
    ) in page.text


def test_without_matplotlib_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'ldalign[report]'" in try_page(run)
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
