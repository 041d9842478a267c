"""Means over examples, and the two places a record goes to."""

import json
from pathlib import Path

import pytest
import torch

from ldalign.system.metrics import Mean, MetricsLog, peak_memory_gib

CPU = torch.device("cpu")


def test_mean_is_by_example_not_by_batch() -> None:
    mean = Mean()
    mean.add("a", torch.tensor([1.0, 2.0, 3.0]))
    mean.add("a", torch.tensor([10.0]))
    mean.add("b", torch.tensor(12.0), count=8)
    assert mean.reduce(CPU) == {"a": 4.0, "b": 1.5}


def test_muted_values_count_for_nothing_not_even_as_nan() -> None:
    mean = Mean()
    mean.add("a", torch.tensor([2.0]))
    mean.muted = True
    mean.add("a", torch.tensor([float("nan"), 7.0]))
    mean.add("b", torch.tensor(5.0), count=3)
    assert mean.sums.keys() == {"a", "b"}  # named, for the other ranks' sake
    assert mean.reduce(CPU) == {"a": 2.0}


def test_nothing_added() -> None:
    assert Mean().reduce(CPU) == {}


def test_sums_keep_small_terms() -> None:
    """A million float32 tenths: summed in float32 one by one they would be off
    in the fourth digit.
    """
    mean = Mean()
    mean.add("a", torch.tensor([1e8]))
    for _ in range(100):
        mean.add("a", torch.full((100,), 0.1))
    assert mean.reduce(CPU)["a"] * 10_001 - 1e8 == pytest.approx(1000, rel=1e-6)


def test_log_appends_lines_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", "policy")
    log.write({"loss": 0.5}, "loss 0.5")
    MetricsLog(tmp_path / "m.jsonl", "guide").write({"loss": 0.25}, "loss 0.25")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"stage": "policy", "loss": 0.5}, {"stage": "guide", "loss": 0.25}]
    assert capsys.readouterr().err == "policy: loss 0.5\nguide: loss 0.25\n"
    MetricsLog(None, "policy").write({}, "no file")


def test_peak_memory_is_in_gib() -> None:
    before = peak_memory_gib(CPU)
    assert 0.05 < before < 100
    block = torch.ones(int(before * 2**30) // 4 + 2**25)  # more than all that was held
    assert peak_memory_gib(CPU) > before and len(block)
