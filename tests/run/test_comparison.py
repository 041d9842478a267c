"""The comparison of methods: what is shared, how learning rates are chosen, and the arithmetic of
its differences.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT
from toy_context import rows_file

from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import (
    START,
    Arm,
    arm_folder,
    check_reported,
    read_answers,
    scored_by,
    scores,
    validation_ids,
)
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train import compare

OPTIONS = [
    "iterations=1",
    "training.steps=2",
    "compare.seeds=[0, 1]",
    "compare.learning_rates=[1e-3, 4e-3]",
    "compare.methods=[sft, spin, ld_align/uniform]",
    "compare.validation_rows=8",
    "max_rows=16",
    "global_batch=8",
    "evaluation.samples=1",
    "max_new_tokens=8",
]


def config_of(*overrides: str) -> CompareConfig:
    return load_config(CompareConfig, ROOT / "configs/toy.yaml", [*OPTIONS, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.methods=[sft, spinn]", "'spinn' is not one of sft, sft/pairs, spin, ld_align, "),
        ("compare.methods=[spin/shuffled]", "'spin/shuffled' is not one of"),
        ("compare.methods=[spin, rlaif]", "'rlaif' is not one of"),
        ("compare.methods=[sft/shuffled]", "'sft/shuffled' is not one of"),
        ("compare.methods=[ld_align/noise]", "ld_align/WEIGHTS with weights of latent, uniform"),
        ("compare.methods=[spin, spin]", "'spin' is there twice"),
        ("compare.methods=[ld_align/latent, ld_align]", "ld_align is ld_align/latent"),
        ("compare.methods=[ld_align/retrained]", "iterations=1: ld_align/retrained differs from"),
        ("weights=uniform", "weights: compare.methods says what is compared"),
        ("guide.retrain=true", "guide.retrain: give ld_align/retrained in compare.methods"),
        ("compare.methods=[ld_align/semantic]", "ld_align/semantic needs the folder"),
        ("oracle_contrast=0.5", "oracle_contrast=0.5: is read by weights=oracle alone"),
        ("training.steps=null", "training.steps: must be given"),
        ("compare.validation_rows=26", "leaves none of evaluation.rows=26 to report"),
        ("compare.learning_rates=[0.0]", "must be greater than 0"),
        ("compare.seeds=[]", "must be not empty"),
        ("compare.seeds=[1, 2, 1]", "compare.seeds: a seed is there twice"),
        ("compare.learning_rates=[]", r"compare.learning_rates=\[\]: give one or more, each once"),
        ("compare.learning_rates=[1e-3, 1.0000001e-3]", "each once in six figures, as folders"),
        ("compare.only=[3]", r"compare.only: 3 is none of compare.seeds=\[0, 1\]"),
        ("compare.primary=[spin]", "compare.primary: 'spin' is not METHOD - METHOD"),
        ("compare.primary=[spin - dpo]", "'spin - dpo' is not METHOD - METHOD, two of"),
        ("compare.primary=[spin - spin]", "'spin - spin' is not METHOD - METHOD"),
    ],
)
def test_what_cannot_be_compared_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(override)


def test_a_comparison_and_its_resumption(
    tmp_path: Path, toy_cache: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three methods, two rates, two seeds: 9 trainings from one start; the second call makes none
    of them again.
    """
    run = tmp_path / "run"
    arguments = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        *OPTIONS,
        f"run={run}",
        f"cache={toy_cache}",
    ]
    compare.main(arguments)
    made = sorted(path.parent.parent.name for path in run.glob("seed_*/*/iteration_0/policy"))
    assert len(made) == 9
    summary = json.loads((run / "report/comparison.json").read_text())
    arms = [Arm.of(name) for name in ("sft", "spin", "ld_align/uniform")]
    config = config_of(f"run={run}")
    rates = summary["learning_rates"]
    # One sampling and one guide a seed, shared by hard links.
    for seed in (0, 1):
        folders = list((run / f"seed_{seed}").glob("*/iteration_0/responses/responses.jsonl"))
        assert len(folders) > 1 and len({path.stat().st_ino for path in folders}) == 1
    # Weights of 1 are SPIN: the same answers, to the last bit of their likelihood.
    if rates["spin"] == rates["ld_align/uniform"]:
        one, two = (
            read_jsonl(
                arm_folder(config, arm, 1, rates[arm.name]) / "iteration_0/evaluation/answers.jsonl"
            )
            for arm in arms[1:]
        )
        assert one == two
    # The figures, from the answers: rows that no choice has seen, and differences from the start's
    # own answers.
    validation, test = validation_ids(config)
    assert len(validation) == 8 and len(test) == 18 and not set(validation) & set(test)
    for arm in arms:
        tables = [
            read_answers(arm_folder(config, arm, s, rates[arm.name]) / "iteration_0")
            for s in (0, 1)
        ]
        starts = [read_answers(arm_folder(config, arm, s, rates[arm.name]) / START) for s in (0, 1)]
        nll = np.mean([[t[i]["nll"] for i in test] for t in tables])
        gap = nll - np.mean([[t[i]["nll"] for i in test] for t in starts])
        assert summary["policies"][arm.name]["nll"]["value"] == pytest.approx(nll)
        found = summary["others"][f"{arm.name} - start"]["nll"]
        assert found["value"] == pytest.approx(gap)
    text = (run / "report/comparison.md").read_text(encoding="utf-8")
    assert "| spin \u2212 sft |" in text and "| ld_align/uniform |" in text
    settings = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "again.yaml").write_text(settings)
    assert load_config(CompareConfig, tmp_path / "again.yaml") == config_of(
        f"run={run}", f"cache={toy_cache}"
    )
    assert "named in advance" not in text  # neither of the usual two is compared
    assert (run / "report/comparison.svg").stat().st_size > 5000
    before = {
        path: path.stat().st_mtime_ns
        for path in run.glob("seed_*/*/iteration_0/policy/model.safetensors")
    }
    capfd.readouterr()
    compare.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "iteration_0/policy: done" not in capfd.readouterr().err


def test_two_rows_at_least_are_left_to_report(
    tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """A file's share held out may be smaller than evaluation.rows: said before any training."""
    rows, run = rows_file(tmp_path / "rows.jsonl", 60), tmp_path / "run"
    given = ["--config", str(ROOT / "configs/toy.yaml"), *OPTIONS, f"run={run}"]
    given += [f"cache={toy_cache}", f"data={rows}", "heldout_fraction=0.1", "sft.epochs=0"]
    for count in (5, 8):
        more = [*given, f"compare.validation_rows={count}"]
        message = f"validation_rows={count}: of 6 rows that are held out {max(0, 6 - count)} would"
        for last in ([], ["--dry-run"]):
            with pytest.raises(InputError, match=message):
                compare.main([*more, *last])
    assert not list(run.glob("start/*/evaluation")) and not list(run.glob("seed_*/*/*"))
    check_reported(config_of("compare.validation_rows=4"), 6)


def test_rates_are_scored_on_validation_rows_alone() -> None:
    figures = {
        "a": {"nll": 1.0, "sampled": 1.0},
        "b": {"nll": 3.0, "sampled": 0.0},
        "c": {"nll": 9.0, "sampled": 0.0},
    }
    assert scores(figures, ["a", "b"]).tolist() == [1.0, 0.0]
    unchecked = {i: {"nll": row["nll"]} for i, row in figures.items()}
    assert scores(unchecked, ["a", "b"]).tolist() == [-1.0, -3.0]
    mixed = figures | {"b": unchecked["b"]}  # one row without a checker
    assert scored_by(mixed, ["a", "b"]) == "nll" and scored_by(mixed, ["a"]) == "sampled"
    assert scores(mixed, ["a", "b"]).tolist() == [-1.0, -3.0]
    # evaluation.samples=0
    greedy = {i: {"nll": 1.0, "greedy": row["sampled"]} for i, row in figures.items()}
    assert scores(greedy, ["a"]).tolist() == [1.0]
