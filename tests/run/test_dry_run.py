"""The memory estimate of `--dry-run` against the measured peak of a small training."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, run_script

from ldalign.models.toy import write_toy_model

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": None,
}
SAME = dict.fromkeys(("weights", "states", "compute"), "float32")


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the high-water mark from /proc"
)
@pytest.mark.parametrize(
    "case",
    [
        {**SAME, "pairs": 4, "micro": 4},
        {**SAME, "pairs": 4, "micro": 2, "optimizer": "rmsprop"},
        {**SAME, "pairs": 4, "micro": 4, "checkpointing": "full"},
        {**SAME, "compute": "bfloat16", "pairs": 4, "micro": 4},
    ],
    ids=["one micro-batch", "two", "checkpointing", "mixed precision"],
)
def test_peak_is_estimated_within_15_percent(case: dict[str, Any], tmp_path: Path) -> None:
    """25 million weights, 1,200 tokens."""
    folder = write_toy_model(tmp_path / "model", **SIZES)
    done = run_script(ROOT / "bench/memory.py", folder, "--case", json.dumps(case))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] > 300e6
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15)
