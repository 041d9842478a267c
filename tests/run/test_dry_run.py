"""`--dry-run`: its memory estimate against the measured peak of a small training; folders that
may only be read.
"""

import fcntl
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, run_script
from toy_context import open_toy, rows_file

from ldalign.kernels.pieces import WORKSPACE_BYTES
from ldalign.models.toy import write_toy_model
from ldalign.run import dry_run
from ldalign.run.dry_run import Gpus, duration
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train import align
from ldalign.train.command import take_gpus

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
def test_peak_is_estimated(case: dict[str, Any], tmp_path: Path) -> None:
    """25 million weights, 1,200 tokens. Within 15 %; products without AVX-512, or by AMX's tiles,
    take some 90 to 140 MB more, which the estimate does not know: there within 25 %.
    """
    folder = write_toy_model(tmp_path / "model", **SIZES)
    done = run_script(ROOT / "bench/memory.py", folder, "--case", json.dumps(case))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] > 300e6
    vectors = torch.cpu._is_avx512_supported() and not torch.cpu._is_amx_tile_supported()
    allowed = 0.15 if vectors else 0.25
    assert found["estimate"] == pytest.approx(found["peak"], rel=allowed)


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


PLANNED = ["iteration_0/responses", "guide", "iteration_0/policy"]


def test_what_the_settings_cut_is_warned_of(tmp_path: Path, in_process: None) -> None:
    """The demonstration's numbers on longer rows; none of it where the lengths are the data's."""
    path = rows_file(tmp_path / "rows.jsonl", 90)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["response"] = " and".join(["so"] * (1 + i % 20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data={path}", "sft.epochs=0", "continual_sft.epochs=0", "evaluation.rows=9"]
    options += ["validation.rows=0", "max_rows=40"]
    page = dry_run.dry_run(open_toy(tmp_path, *options, write=False), PLANNED)
    assert "max_rows=40: an iteration uses 40 of 81 rows that are left beside those held" in page
    assert "WARNING: max_new_tokens=24: " in page and "or 0 (from the data)" in page
    assert "max_length" not in page
    short = open_toy(tmp_path, *options, "max_length=60", write=False)
    cut = int(short.counts["rows/cut"])
    page = dry_run.dry_run(short, PLANNED)
    assert cut and f"max_length=60: cuts the end of {cut} of 40 training responses" in page
    # nothing is sampled
    page = dry_run.dry_run(short, ["iteration_0/policy"])
    assert "WARNING: max_new_tokens" not in page
    own = [*options[:-1], "max_rows=null", "max_length=0", "max_new_tokens=0"]
    page = dry_run.dry_run(open_toy(tmp_path, *own, write=False), PLANNED)
    assert "WARNING" not in page and "training rows: 81; prompt median " in page


def test_no_length_is_advised_that_cannot_help(tmp_path: Path, in_process: None) -> None:
    """Rows longer than the toy policy reads, lengths from the data, or as long as it reads."""
    path = rows_file(tmp_path / "rows.jsonl", 90)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["response"] = " and".join(["so"] * 900)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data={path}", "sft.epochs=0", "continual_sft.epochs=0", "evaluation.rows=9"]
    for lengths in (["max_length=0", "max_new_tokens=0"], ["max_length=512"]):
        page = dry_run.dry_run(open_toy(tmp_path, *options, *lengths, write=False), PLANNED)
        assert "training responses; the policy reads 512 (max_position_embeddings in " in page
        assert "raise max_length" not in page
        assert ("WARNING: max_new_tokens" in page) == (lengths == ["max_length=512"])


def test_all_is_said_before_it_fails(
    tmp_path: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A full disk, and GPUs that cannot be divided as asked: every line that can be said, then one
    error with both, of the first one's kind.
    """
    ctx = open_toy(tmp_path, write=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    capfd.readouterr()
    with pytest.raises(EnvironmentProblem, match="the run needs about"):
        dry_run.dry_run(ctx, PLANNED)
    said = capfd.readouterr().err
    words = "policy:", "training rows:", "stages:", "memory:", "disk:", "time, rough", "nothing was"
    for word in words:
        assert word in said
    three = replace(ctx.config.training, shard_ranks=3)
    ctx = replace(ctx, config=replace(ctx.config, training=three))
    with pytest.raises(InputError, match=r"^2 problems: gpus: 8 GPUs cannot .* \| .*bytes of disk"):
        dry_run.dry_run(ctx, PLANNED, Gpus(8, 80))
    said = capfd.readouterr().err
    assert "disk:" in said and "time, rough" in said and "memory" not in said


def test_memory_of_gpus_elsewhere(tmp_path: Path, in_process: None) -> None:
    """Weights and averages are divided by the GPUs; an estimate that does not fit says so."""
    ctx = open_toy(tmp_path, write=False)
    one, four = (dry_run._ranks(ctx, Gpus(n, 80)) for n in (1, 4))
    assert (one.count, one.device, four.count, four.sharing) == (1, "cuda", 4, 1)
    assert four.logits == WORKSPACE_BYTES and four.available == 80 * 2**30
    page = dry_run.dry_run(ctx, PLANNED, Gpus(4, 80))
    assert "memory on 4 GPUs of 80 GiB: " in page
    assert ": fits; computed from the shapes, not measured" in page
    assert "not on those GPUs" in page and "WARNING: memory" not in page
    page = dry_run.dry_run(ctx, PLANNED, Gpus(1, 0.1))
    assert "memory on 1 GPU of 0.1 GiB" in page and ": does not fit; computed" in page
    assert "WARNING: memory: does not fit" in page


@pytest.mark.parametrize("text", ["8*80", "x80", "8x", "", "0x80", "8x0", "-1", "8x80GiB"])
def test_other_forms_of_gpus_are_one_line(text: str) -> None:
    with pytest.raises(InputError, match="give COUNTxGIB, such as gpus=8x80"):
        Gpus.of(text)


def test_gpus_go_with_a_dry_run_alone(tmp_path: Path) -> None:
    assert (Gpus.of("8x80"), Gpus.of("79.6")) == (Gpus(8, 80.0), Gpus(1, 79.6))
    assert take_gpus(["a=1", "gpus=2x40", "--dry-run"]) == (["a=1", "--dry-run"], Gpus(2, 40.0))
    assert take_gpus(["a=1", "--dry-run"]) == (["a=1", "--dry-run"], None)
    with pytest.raises(InputError, match="gpus: unknown key; .*gpus=NxGIB goes with --dry-run"):
        align.main(["gpus=8x80", f"run={tmp_path}"])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (20, "under 1 min"),
        (60 * 59, "59 min"),
        (3600 * 3 + 60 * 20, "3 h 20 min"),
        (3600 * 60, "2 d 12 h"),
    ],
)
def test_times_are_said_as_a_person_does(seconds: float, said: str) -> None:
    assert duration(seconds) == said
