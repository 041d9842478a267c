"""Means over examples, the places a record goes to, and how far work is."""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ldalign.system.listeners import listening
from ldalign.system.metrics import Bar, Mean, MetricsLog, in_words

CPU = torch.device("cpu")


def means(mean: Mean) -> dict[str, float]:
    return mean.means(mean.totals(CPU).tolist())


def test_mean_is_by_example_not_by_batch() -> None:
    mean = Mean()
    mean.add("a", torch.tensor([1.0, 2.0, 3.0]))
    mean.add("a", torch.tensor([10.0]))
    mean.add("b", torch.tensor(12.0), count=8)
    assert means(mean) == {"a": 4.0, "b": 1.5}


def test_muted_values_count_for_nothing_not_even_as_nan() -> None:
    mean = Mean()
    mean.add("a", torch.tensor([2.0]))
    mean.muted = True
    mean.add("a", torch.tensor([float("nan"), 7.0]))
    mean.add("b", torch.tensor(5.0), count=3)
    assert mean.sums.keys() == {"a", "b"}  # named, for the other ranks' sake
    assert means(mean) == {"a": 2.0}


def test_nothing_added() -> None:
    assert means(Mean()) == {}


def test_sums_keep_small_terms() -> None:
    """A million float32 tenths: summed in float32 one by one they would be off
    in the fourth digit.
    """
    mean = Mean()
    mean.add("a", torch.tensor([1e8]))
    for _ in range(100):
        mean.add("a", torch.full((100,), 0.1))
    assert means(mean)["a"] * 10_001 - 1e8 == pytest.approx(1000, rel=1e-6)


def test_log_appends_lines_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", "policy")
    log.write({"loss": 0.5}, "loss 0.5")
    MetricsLog(tmp_path / "m.jsonl", "guide").write({"loss": 0.25}, "loss 0.25")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"stage": "policy", "loss": 0.5}, {"stage": "guide", "loss": 0.25}]
    assert capsys.readouterr().err == "policy: loss 0.5\nguide: loss 0.25\n"
    MetricsLog(None, "policy").write({}, "no file")


def test_peak_memory_is_in_gib() -> None:
    """In a process of its own: this one may have held gigabytes."""
    code = (
        "import torch\n"
        "from ldalign.system.metrics import peak_memory_gib\n"
        "before = peak_memory_gib(torch.device('cpu'))\n"
        "block = torch.ones(2**27)\n"  # half a GiB
        "print(before, peak_memory_gib(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.05 < before < 2 and 0.4 < after - before < 0.7


# ------------------------------------------------------------------------------------- who listens


class Heard:
    """Keeps what it is told; fails at the record called `bad`."""

    name = "heard"

    def __init__(self, bad: str = "") -> None:
        self.told: list[str] = []
        self.bad = bad

    def begins(self, stage: str) -> None:
        self.told.append(stage)

    def record(self, stage: str, record: Mapping[str, Any], line: str) -> None:
        if stage == self.bad:
            raise OSError("no route\nto host")
        self.told.append(f"{line} {dict(record)}")

    def ends(self, stage: str, summary: Mapping[str, float], made: bool) -> None:
        self.told.append(stage)


def test_a_listener_that_fails_is_told_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails, other = Heard(bad="b"), Heard()
    with listening([fails, other]):
        for stage in ("a", "b", "c"):
            MetricsLog(tmp_path / "m.jsonl", stage).write({"loss": 1.0}, "x")
    MetricsLog(tmp_path / "m.jsonl", "d").write({}, "x")  # nobody listens any more
    assert fails.told == ["a: x {'loss': 1.0}"]
    assert [line[0] for line in other.told] == ["a", "b", "c"]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 4
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert said.startswith("WARNING: heard: OSError: no route to host; ")


# ----------------------------------------------------------------------------------- how far it is


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_in_a_file_a_bar_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("responses", 500, "rows", clock) as progress:
        progress(100, 0)  # of an earlier start: they took no time
        for _ in range(8):
            clock.now += 10
            progress(10, 50)
    assert capsys.readouterr().err.splitlines() == [
        "responses: 130 of 500 rows (26%), 5 tokens/s, about 6 min left",
        "responses: 160 of 500 rows (32%), 5 tokens/s, about 6 min left",
        "responses: 400 tokens in 80 s, 5 tokens/s",
    ]


def test_a_bar_without_total_or_with_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("data", None, "rows", clock) as progress:
        clock.now += 31
        progress(7, 0)
    with Bar("reference", 4, "pairs", clock) as progress:
        clock.now += 40
        progress(1, 0)  # the first there was tells how long one takes
        clock.now += 40
        progress(3, 0)
    assert capsys.readouterr().err.splitlines() == [
        "data: 7 rows",
        "reference: 1 of 4 pairs (25%), about 2 min left",
        "reference: 4 of 4 pairs (100%)",
    ]


def test_what_is_under_way_counts_where_tokens_come_as_they_are_made(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """100 of 400 rows at a time, the first of which ends long before the others: by the rows that
    have ended the rest would take 3 hours.
    """
    clock = Clock()
    with Bar("responses", 410, "rows", clock, most=120) as progress:
        progress(10, 0)  # of an earlier start: they took no time
        for step in range(1, 91):
            clock.now += 1
            progress(0, 100)
            if step == 10 or step >= 80:
                progress(1, 0)
    assert capsys.readouterr().err.splitlines() == [
        "responses: 11 of 410 rows (3%), 100 tokens/s, about 8 min left",
        "responses: 11 of 410 rows (3%), 100 tokens/s, about 7 min left",
        "responses: 21 of 410 rows (5%), 100 tokens/s, about 6 min left",
        "responses: 9000 tokens in 90 s, 100 tokens/s",
    ]


def test_a_short_piece_of_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("reference", 4, "pairs", Clock()) as progress:
        progress(4, 0)
    assert capsys.readouterr().err == ""


def test_a_bar_whose_terminal_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with Bar("responses", 2, "rows") as progress:
        progress(1, 10)
        progress(1, 10)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3570, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
        (math.inf, "unknown"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
