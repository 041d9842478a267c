"""A short sample of `make fuzz`: mutants are read or refused, and the fuzzer sees failures."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest
from faults import forget_peak, peak
from runs import one_thread

# What each reader costs decides how many inputs: the whole sample is a few seconds.
SAMPLE = {
    "jsonl": 150,
    "array": 60,
    "parquet": 60,
    "arrow": 60,
    "safetensors": 40,
    "gguf": 8,
    "template": 40,
    "tokenizer": 20,
    "config": 40,
    "losers": 60,
    "manifest": 60,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_every_reader(name: str, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    words: Counter[str] = Counter()
    fuzz.examine(
        name,
        7,
        range(SAMPLE[name]),
        tmp_path / "input",
        tmp_path,
        float("inf"),
        lambda number, word, file: words.update([word]),
    )
    assert words["failed"] == 0, [path.read_text() for path in tmp_path.glob("*.txt")]
    assert (
        words["begins"] == words["read"] + words["refused"] == SAMPLE[name] and words["refused"] > 0
    )


def test_an_input_is_a_function_of_seed_reader_and_number() -> None:
    rows = b'{"prompt": "q", "response": "r"}\n' * 3
    one, two = (fuzz.change_bytes(rows, random.Random("0/jsonl/5")) for _ in range(2))
    assert one == two != fuzz.change_bytes(rows, random.Random("0/jsonl/6"))


PLANTED = """
import json, os, sys, time, fuzz
from pathlib import Path
from ldalign.system.errors import InputError
fuzz.SECONDS, fuzz.MEMORY = 2, 100 * 2**20
class Draw(fuzz.random.Random):
    def __init__(self, seed):
        super().__init__(seed)
        self.name = f"jsonl-{str(seed).split('/')[-1]}"
fuzz.random.Random = Draw
def make(folder):
    (folder / "rows.jsonl").write_bytes(b"sound")
    return [folder / "rows.jsonl"]
def read(folder, draw):
    name = (folder / "rows.jsonl").read_bytes().decode()
    number = int(name.split("-")[-1]) if name != "sound" else 0
    if number == 3: raise KeyError("x")
    if number == 5: os.abort()
    if number == 8: time.sleep(1000)
    if number == 9: os._exit(0)
    if number == 12: b"x" * (200 * 2**20)
    if number % 2: raise InputError("no")
fuzz.READERS["jsonl"] = fuzz.Reader(make, read, (lambda data, draw: draw.name.encode(),))
print(json.dumps(fuzz.fuzz("jsonl", 15, 1, 1, Path(sys.argv[1]), 2)))
"""


def test_the_fuzzer_finds_what_it_should(tmp_path: Path) -> None:
    """A reader that raises, crashes, hangs, exits or takes memory at certain inputs: each is
    counted once, and kept.
    """
    done = subprocess.run(
        [sys.executable, "-c", PLANTED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=one_thread(),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {key: result[key] for key in ("inputs", "read", "refused", "failed")} == {
        "inputs": 15,
        "read": 6,
        "refused": 4,
        "failed": 5,
    }
    why = {path.stem: path.read_text() for path in tmp_path.glob("*.txt")}
    expected = {
        "jsonl-3": "KeyError: 'x'",
        "jsonl-5": "ended with -6",
        "jsonl-8": "no end after 2 s",
        "jsonl-9": "ended with 0",
        "jsonl-12": "MB more memory",
    }
    assert why.keys() == expected.keys() and all(
        text in why[name] for name, text in expected.items()
    )
    assert all((tmp_path / f"{name}-rows.jsonl").read_bytes() == name.encode() for name in expected)


def test_a_peak_before_does_not_hide_one_after() -> None:
    """What tests of bounded memory measure by: a process's own maximum would not see the second."""
    kept = b"x" * (300 * 2**20)
    del kept
    before = forget_peak()
    assert peak() - before < 20 * 2**20
    kept = b"x" * (150 * 2**20)
    del kept
    assert peak() - before > 140 * 2**20
