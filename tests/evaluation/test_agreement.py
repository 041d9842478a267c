"""Judge agreement: its figures by hand, and train/judge.py on a toy run's policy and guide."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import ROOT

from ldalign.evaluation.agreement import RIVALS, lines, summary, surer_half, verdict
from ldalign.evaluation.statistics import wilson
from ldalign.models.guide_folder import load_guide
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl
from ldalign.train.judge import main, planned


def pair(
    first: float, second: float, preference: float | None, **rivals: tuple[float, float]
) -> dict[str, Any]:
    """Distances of the two samples, how surely a judge prefers the first, and by name what else
    calls a sample the worse one.
    """
    record: dict[str, Any] = {
        "id": "r",
        "first": "one",
        "second": "two",
        "first_distance": first,
        "second_distance": second,
        "preference": preference,
    }
    for name, (one, two) in rivals.items():
        record |= {f"first_{name}": one, f"second_{name}": two}
    return record | {"verdict": verdict(record)}


SAME = {"first": "x", "second": "x", "verdict": "identical"}


def test_verdicts() -> None:
    """The nearer sample is called the better one."""
    assert verdict(pair(1.0, 2.0, 0.9)) == verdict(pair(2.0, 1.0, 0.4)) == "agree"
    assert verdict(pair(1.0, 2.0, 0.1)) == verdict(pair(2.0, 1.0, 1.0)) == "disagree"
    assert verdict(pair(1.0, 2.0, 0.5)) == verdict(pair(1.0, 1.0, 1.0)) == "tie"
    assert verdict(pair(1.0, 2.0, None)) == "none"
    assert verdict({"first": "x", "second": "x"}) == "identical"


def test_summary() -> None:
    """Three of four decided pairs agree; by length, where it differs, one of three. The judge is
    surest of three of them, as the second and third surest are tied.
    """
    s = summary(
        [
            pair(1, 2, 1.0, length=(5, 9)),
            pair(1, 2, 0.8, length=(9, 5)),
            pair(3, 2, 0.0, length=(5, 9)),
            pair(1, 2, 0.0, length=(7, 7)),
            pair(1, 2, 0.5),
            pair(1, 2, None),
            SAME,
            SAME,
        ]
    )
    assert {
        k: s[f"agreement/{k}"]
        for k in ("prompts", "rows", "ties", "no_verdict", "identical", "length_rows", "sure_rows")
    } == {
        "prompts": 8,
        "rows": 4,
        "ties": 1,
        "no_verdict": 1,
        "identical": 2,
        "length_rows": 3,
        "sure_rows": 3,
    }
    assert s["agreement/rate"] == 0.75 and s["agreement/chance"] == 0.5
    assert (s["agreement/low"], s["agreement/high"]) == wilson(3, 4)
    assert s["agreement/sure_rate"] == pytest.approx(2 / 3)
    assert (s["agreement/sure_low"], s["agreement/sure_high"]) == wilson(2, 3)
    assert s["agreement/length_rate"] == pytest.approx(1 / 3)
    # on these three: the guide is right on all, length on one
    assert s["agreement/length_behind"] == pytest.approx(2 / 3)
    assert s["agreement/length_behind_se"] == pytest.approx(1 / 3)
    assert s["agreement/nll_rows"] == 0 and "agreement/nll_rate" not in s
    none = summary([SAME, pair(1, 2, None)])
    assert "agreement/rate" not in none and none["agreement/sure_rows"] == 0
    assert lines(none) == [
        "agreement: no pair was decided, of 2 prompts; 0 ties, 1 without verdict, 1 identical"
    ]


def random_records(seed: int, count: int) -> list[dict[str, Any]]:
    """Judged pairs with ties of every kind; `pooled` is missing from some."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for _ in range(count):
        if rng.random() < 0.1:
            out.append(SAME)
            continue
        preference = None if rng.random() < 0.1 else float(rng.choice(np.linspace(0, 1, 11)))
        sides = {name: tuple(map(float, rng.integers(0, 5, 2))) for name in ("first", *RIVALS)}
        if rng.random() < 0.2:
            del sides["pooled"]
        first, second = sides.pop("first")
        out.append(pair(first, second, preference, **sides))
    return out


@pytest.mark.parametrize("seed", range(3))
def test_summary_against_plain_loops(seed: int) -> None:
    """Rates, intervals and paired differences, of the guide and of each rival, on all decided pairs
    and on the surer half.
    """
    records = random_records(seed, 200)
    s = summary(records)

    def right(record: dict[str, Any], name: str) -> bool | None:
        """Whether `name` calls the judge's worse sample the farther one; None where it cannot say
        or the judge does not.
        """
        if "preference" not in record or record["preference"] in (None, 0.5):
            return None
        if f"first_{name}" not in record or record[f"first_{name}"] == record[f"second_{name}"]:
            return None
        first_is_better = record[f"first_{name}"] < record[f"second_{name}"]
        return first_is_better == (record["preference"] > 0.5)

    decided = [r for r in records if right(r, "distance") is not None]
    assert s["agreement/rows"] == len(decided) > 50
    by_sureness = sorted(decided, key=lambda r: -abs(r["preference"] - 0.5))
    least = abs(by_sureness[len(decided) // 2 - 1]["preference"] - 0.5)
    surer = [r for r in decided if abs(r["preference"] - 0.5) >= least]
    assert surer_half(decided) == surer and len(decided) / 2 - 1 < len(surer) < len(decided)
    for part, rows in (("", decided), ("sure_", surer)):
        hits = sum(bool(right(r, "distance")) for r in rows)
        assert s[f"agreement/{part}rate"] == hits / len(rows)
        assert (s[f"agreement/{part}low"], s[f"agreement/{part}high"]) == wilson(hits, len(rows))
        for name in RIVALS:
            both = [r for r in rows if right(r, name) is not None]
            assert s[f"agreement/{name}_{part}rows"] == len(both) < len(rows)
            theirs = [bool(right(r, name)) for r in both]
            ours = [bool(right(r, "distance")) for r in both]
            assert s[f"agreement/{name}_{part}rate"] == sum(theirs) / len(both)
            interval = (s[f"agreement/{name}_{part}low"], s[f"agreement/{name}_{part}high"])
            assert interval == wilson(sum(theirs), len(both))
            gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
            mean = sum(gaps) / len(gaps)
            error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
            assert s[f"agreement/{name}_{part}behind"] == pytest.approx(mean, abs=1e-12)
            assert s[f"agreement/{name}_{part}behind_se"] == pytest.approx(error)


def test_the_surer_half() -> None:
    """The pairs that the judge is surest of, one half where no two are tied; all where it is always
    as sure, as the checker is.
    """
    sure = [pair(1, 2, p) for p in (0.9, 0.2, 0.6, 0.45, 0.99)]
    assert surer_half(sure) == [sure[0], sure[4]]
    assert surer_half(sure[:2]) == [sure[0]] and surer_half(sure[:1]) == sure[:1]
    checked = [pair(1, 2, p) for p in (0.0, 1.0, 1.0)]
    assert surer_half(checked) == checked and surer_half([]) == []


def test_lines() -> None:
    """The guide's, then a line for each rival that decides a pair, in the order of RIVALS."""
    records = [
        pair(1, 2, 0.9, length=(5, 9), untrained=(1, 2)),
        pair(1, 2, 0.6, length=(9, 5), untrained=(1, 2)),
        pair(3, 2, 0.7, length=(3, 3), untrained=(1, 2)),
        pair(1, 2, 0.8, length=(3, 3), untrained=(2, 1)),
        SAME,
    ]
    guide, untrained, length = lines(summary(records))
    assert guide == (
        "agreement: 75.0% (30.1% to 95.4%; chance 50%) on 4 pairs, of 5 prompts; 0 ties, 0 without "
        "verdict, 1 identical; of the judge's surer half 100.0% (34.2% to 100.0%)"
    )
    assert untrained == (
        "  the guide before training: 75.0% (30.1% to 95.4%; the guide's less this +0.0 +- 40.8 "
        "points), surer half 50.0% (9.5% to 90.5%; the guide's less this +50.0 +- 50.0 points)"
    )
    assert length.startswith(
        "  length (longer is worse): 50.0% (9.5% to 90.5%; the guide's less this +50.0 +- 50.0"
    )


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
    samples = read_jsonl(tmp_path / "run/agreement_samples/samples.jsonl")
    for n, side in enumerate(("first", "second")):
        read = []
        for r, sample in zip(records, samples[n::2], strict=True):
            assert (r["id"], r[side]) == (sample["id"], sample["response"])
            *history, real = rows[r["id"]]
            ended = (True, sample["finish_reason"] == "stop")
            read.append(guide.pair(r["id"], history, real["content"], r[side], ended))
        expected = guide.pair_distances(read).tolist()
        assert [r[f"{side}_distance"] for r in records] == pytest.approx(expected, rel=1e-4)
        assert [r[f"{side}_length"] for r in records] == [
            len(s["token_ids"]) for s in samples[n::2]
        ]
        # What the two towers of another run's guide began as is not known.
        assert not any(f"{side}_untrained" in r for r in records)
        rivals = RIVALS.keys() - {"untrained"}
        assert all(math.isfinite(r[f"{side}_{name}"]) for r in records for name in rivals)
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


def test_a_runs_own_guide_is_held_against_what_it_began_as(
    toy_run: Path, toy_cache: Path, tmp_path: Path, in_process: None
) -> None:
    shutil.copytree(toy_run, tmp_path / "run")
    keys = [f"run={tmp_path / 'run'}", f"cache={toy_cache}", "judge=policy", "agreement.rows=4"]
    main(["--config", str(ROOT / "configs/toy.yaml"), *keys])
    records = read_jsonl(tmp_path / "run/agreement/agreement.jsonl")
    assert len(records) == 4
    assert all(math.isfinite(r[f"first_{name}"]) for r in records for name in RIVALS)


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
