"""`--dry-run`: its memory estimate against the measured peak of a small training; folders that
may only be read.
"""

import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, run_script

from ldalign.models.toy import write_toy_model
from ldalign.run import dry_run
from ldalign.system.errors import EnvironmentProblem

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


def test_a_run_folder_that_may_only_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    """A run that is there is looked at, with a warning, and its lock is still asked for; where none
    is, none could be made.
    """
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        run.mkdir()
        (run / "lock").touch()
        for folder, mode in ((Path(place), 0o555), (run, 0o555), (run / "lock", 0o444)):
            os.chmod(folder, mode)
        try:
            if root:
                os.seteuid(65534)
            assert dry_run._existing(run) == run
            assert f"WARNING: {run}: cannot be written to" in capfd.readouterr().err
            with pytest.raises(EnvironmentProblem, match="cannot be written to; give another"):
                dry_run._existing(Path(place) / "new")
            with (run / "lock").open() as held, pytest.raises(EnvironmentProblem, match="in use"):
                fcntl.flock(held, fcntl.LOCK_EX)
                dry_run._existing(run)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(place, 0o755)
            os.chmod(run, 0o755)
