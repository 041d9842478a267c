"""Judge agreement: its figures by hand, and train/judge.py on a toy run's policy and guide."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from ldalign.evaluation.agreement import summary, verdict
from ldalign.evaluation.statistics import wilson
from ldalign.models.guide_folder import load_guide
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train.judge import main, planned


def pair(
    first: float, second: float, preference: float | None, tokens: tuple[int, int] = (5, 9)
) -> dict[str, Any]:
    """Distances of the two samples, and how surely a judge prefers the first."""
    record = {
        "id": "r",
        "first": "one",
        "second": "two",
        "first_distance": first,
        "second_distance": second,
        "preference": preference,
        "first_tokens": tokens[0],
        "second_tokens": tokens[1],
    }
    return record | {"verdict": verdict(record)}


def test_verdicts() -> None:
    """The nearer sample is called the better one."""
    assert verdict(pair(1.0, 2.0, 0.9)) == verdict(pair(2.0, 1.0, 0.4)) == "agree"
    assert verdict(pair(1.0, 2.0, 0.1)) == verdict(pair(2.0, 1.0, 1.0)) == "disagree"
    assert verdict(pair(1.0, 2.0, 0.5)) == verdict(pair(1.0, 1.0, 1.0)) == "tie"
    assert verdict(pair(1.0, 2.0, None)) == "none"
    assert verdict({"first": "x", "second": "x"}) == "identical"


def test_summary() -> None:
    """Three of four decided pairs agree; by length, where it differs, one of three."""
    same = {"first": "x", "second": "x", "verdict": "identical"}
    s = summary(
        [
            pair(1, 2, 1.0),
            pair(1, 2, 0.8, (9, 5)),
            pair(3, 2, 0.0, (5, 9)),
            pair(1, 2, 0.0, (7, 7)),
            pair(1, 2, 0.5),
            pair(1, 2, None),
            same,
            same,
        ]
    )
    assert {
        k: s[f"agreement/{k}"]
        for k in ("prompts", "rows", "ties", "no_verdict", "identical", "length_rows")
    } == {"prompts": 8, "rows": 4, "ties": 1, "no_verdict": 1, "identical": 2, "length_rows": 3}
    assert s["agreement/rate"] == 0.75 and s["agreement/chance"] == 0.5
    assert (s["agreement/low"], s["agreement/high"]) == wilson(3, 4)
    assert s["agreement/length_rate"] == pytest.approx(1 / 3)
    assert "agreement/rate" not in summary([same, pair(1, 2, None)])


def test_wilson() -> None:
    """The interval's ends are the shares that lie 1.96 of their own standard errors
    away from what was seen.
    """
    for hits, count in ((3, 4), (60, 100), (0, 7), (7, 7)):
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                error = math.sqrt(end * (1 - end) / count)
                assert abs(hits / count - end) / error == pytest.approx(1.959964, rel=1e-4)


def arguments(toy_run: Path, toy_cache: Path, run: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"policy={toy_run / 'iteration_0/policy'}",
        "sft.epochs=0",
        "continual_sft.epochs=0",
        "max_rows=16",
        f"guide={toy_run / 'guide'}",
        f"run={run}",
        f"cache={toy_cache}",
        "evaluation.rows=12",
        "agreement.rows=10",
        "max_new_tokens=8",
        *more,
    ]


def test_the_script(toy_run: Path, toy_cache: Path, tmp_path: Path, in_process: None) -> None:
    """The policy judges itself; distances are the guide's; a second start does nothing, another
    judge is refused.
    """
    given = arguments(toy_run, toy_cache, tmp_path / "run", "judge=policy")
    main(given)
    folder = tmp_path / "run/agreement"
    records = read_jsonl(folder / "agreement.jsonl")
    rows = {row["id"]: row["messages"] for row in read_jsonl(tmp_path / "run/data/heldout.jsonl")}
    assert [r["id"] for r in records] == list(rows)[:10]
    guide = load_guide(toy_run / "guide")
    for side in ("first", "second"):
        questions, real = ([rows[r["id"]][at]["content"] for r in records] for at in (1, 2))
        expected = guide.distance(questions, real, [r[side] for r in records])
        assert [r[f"{side}_distance"] for r in records] == pytest.approx(
            expected.tolist(), rel=1e-4
        )
    assert all(r["verdict"] == verdict(r) for r in records)
    figures = json.loads((folder / "summary.json").read_text())
    assert {**figures, **summary(records)} == figures and figures["agreement/rows"] + figures[
        "agreement/ties"
    ] > 0
    assert "agreement/rate" in (tmp_path / "run/metrics.jsonl").read_text()
    before = (folder / "manifest.json").stat().st_mtime_ns
    main(given)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="judge.model was"):
        main([*given, "judge=checker"])


def test_what_is_missing_is_named(
    toy_run: Path, toy_cache: Path, tmp_path: Path, in_process: None
) -> None:
    given = arguments(toy_run, toy_cache, tmp_path / "run")
    with pytest.raises(InputError, match="no trained guide is there"):
        main([*given, f"guide={tmp_path}"])
    with pytest.raises(InputError, match="evaluation.rows=0"):
        main([*given, "evaluation.rows=0"])
    assert planned(load_config(RunConfig, overrides=["sft.epochs=1"])) == [
        "sft/policy",
        "agreement_samples",
        "agreement",
    ]
