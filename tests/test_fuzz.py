"""A short sample of `make fuzz`: what it mutates is read or refused, and the fuzzer sees what it should."""

import json
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from conftest import one_thread

# What each reader costs decides how many inputs: the whole sample is a few seconds.
SAMPLE = {"jsonl": 150, "parquet": 60, "safetensors": 40, "gguf": 8, "template": 40, "tokenizer": 20, "config": 40,
          "losers": 60, "manifest": 60}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_every_reader(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz.child(name, 7, 0, SAMPLE[name], float("inf"), tmp_path)
    counts = json.loads(capsys.readouterr().out)
    assert counts["failed"] == 0, [path.read_text() for path in tmp_path.glob("*.txt")]
    assert counts["read"] + counts["refused"] == SAMPLE[name] and counts["refused"] > 0


def test_an_input_is_a_function_of_seed_reader_and_number() -> None:
    rows = b'{"prompt": "q", "response": "r"}\n' * 3
    one, two = (fuzz.change_bytes(rows, random.Random("0/jsonl/5")) for _ in range(2))
    assert one == two != fuzz.change_bytes(rows, random.Random("0/jsonl/6"))


def test_the_fuzzer_finds_an_exception_and_a_crash(tmp_path: Path) -> None:
    """A reader that raises what it should not, and one that takes the process with it, are failures that are kept."""
    script = f"""
import os, fuzz
from pathlib import Path
sound = b"".join(path.read_bytes() for path in fuzz.make_rows(Path({str(tmp_path)!r})))
def read(folder, draw):
    if (folder / "rows.jsonl").read_bytes() != sound:
        KIND
fuzz.READERS["jsonl"] = fuzz.Reader(fuzz.make_rows, read)
fuzz.child("jsonl", 1, 0, 30, 1e18, Path({str(tmp_path)!r}))
"""
    raises = subprocess.run([sys.executable, "-c", script.replace("KIND", "raise KeyError('x')")], capture_output=True,
                            text=True, env=one_thread())  # fmt: skip
    assert json.loads(raises.stdout)["failed"] > 0, raises.stderr
    assert any("KeyError: 'x'" in path.read_text() for path in tmp_path.glob("*.txt"))
    dies = subprocess.run([sys.executable, "-c", script.replace("KIND", "os.abort()")], capture_output=True,
                          text=True, env=one_thread())  # fmt: skip
    assert dies.returncode < 0 and (tmp_path / "jsonl.current").read_text().endswith("rows.jsonl")
