"""Rows prepared into files: the same for any number of processes, gone on with after a stop."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ldalign.data import preparation, records
from ldalign.data.encoding import Fitting
from ldalign.data.preparation import Found, Plan, Source, prepare_files
from ldalign.data.reading import Reading, read_rows
from ldalign.data.rows import Row
from ldalign.data.store import Split, data_hash, open_split
from ldalign.data.tokenizer import load_tokenizer
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.workers import spread

LONG = {"id": "long", "prompt": "Say it. " * 200, "response": "It."}
Prepare = Callable[..., Found]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of 60 rows, a long prompt in one, an id in both."""
    out = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"id": f"{name}{i}", "prompt": f"Say {i} of {name}.", "response": f"Said {i}."}
            for i in range(60)
        ]
        rows += [{**LONG, "prompt": LONG["prompt"] + name}] if name == "a" else []
        rows += [{"id": "twice", "prompt": f"Say it, {name}.", "response": "Said."}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out.append(path)
    return out


@pytest.fixture
def prepare(chatml_folder: Path, files: list[Path], tmp_path: Path) -> Prepare:
    """Prepares the two files into a new folder of this name."""

    def make(
        name: str,
        processes: int = 1,
        heldout: Source | None = None,
        bad_rows: Literal["error", "skip"] = "error",
        **change: object,
    ) -> Found:
        plan = Plan(
            chatml_folder,
            None,
            date(2026, 1, 1),
            Fitting(200),
            heldout_fraction=0.1,
            heldout_rows=200,
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return prepare_files(
            folder,
            Source((tuple(files),)),
            heldout,
            Reading(bad_rows=bad_rows),
            replace(plan, **change),  # type: ignore[arg-type]
            folder / "parts",
            lambda what, count: lambda done: None,
            processes,
        )

    return make


def splits(folder: Path) -> list[Split]:
    return [open_split(folder, name) for name in ("train", "heldout")]


def same_files(one: Path, other: Path) -> bool:
    names = [
        f"{s}.{end}" for s in ("train", "heldout") for end in ("jsonl", "tokens.npy", "index.npy")
    ]
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_every_row_is_used_or_accounted_for(
    prepare: Prepare, files: list[Path], tmp_path: Path, chatml_folder: Path
) -> None:
    found = prepare("whole")
    assert (found.read, found.long, found.bad, found.repeated) == (123, 1, 0, 1)
    assert found.used == {"train": 110, "heldout": 12, "validation": 0}
    assert [row["id"] for row in found.left_out] == ["long"]
    train, heldout = splits(tmp_path / "whole")
    rows = {row.id: row for row in read_rows(list(map(str, files)))}
    assert "twice#2" in rows
    tokenizer = load_tokenizer(chatml_folder)
    for split in (train, heldout):
        for row, pair in zip(split.rows, split.pairs, strict=True):
            assert row == replace(rows[row.id], where="", conversation="")
            assert (pair.id, pair.prompt, pair.real) == (row.id, *tokenizer.pair_ids(row))
    ids = [row.id for row in train.rows]
    assert len({*ids, *(row.id for row in heldout.rows)}) == 122 and ids != sorted(ids)


def test_processes_change_nothing(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare("one")
    monkeypatch.setattr(records, "CHUNK_BYTES", 500)
    prepare("three", processes=3)
    assert len(list((tmp_path / "three/parts").glob("*.json"))) > 6
    assert same_files(tmp_path / "one", tmp_path / "three")


def test_a_stop_in_the_middle_is_gone_on_with(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHUNK_BYTES", 1000)
    prepare("whole")
    fit, calls = preparation.fit_rows, []

    def stop_at_third(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(preparation, "fit_rows", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare("stopped")
    assert len(list((tmp_path / "stopped/parts").glob("*.json"))) == 2
    prepare("stopped")
    pieces_there = len(list((tmp_path / "whole/parts").glob("*.json")))
    assert len(calls) == 1 + pieces_there  # two were there, the third began twice
    assert same_files(tmp_path / "whole", tmp_path / "stopped")


def test_only_rows_that_are_used_are_encoded(prepare: Prepare, tmp_path: Path) -> None:
    found = prepare("few", most=20, heldout_rows=3)
    assert found.used == {"train": 20, "heldout": 3, "validation": 0} and found.read == 123
    used = sum(found.used.values()) + found.long
    assert sum(int(str(row["rows"])) for row in found.left_out if "rows" in row) == 123 - used
    assert len(splits(tmp_path / "few")[0].pairs) == 20


def test_held_out_rows_that_are_given(prepare: Prepare, tmp_path: Path, files: list[Path]) -> None:
    """Training rows with the same prompts are left out, and said to be."""
    given = [
        Row(f"h{i}", ({"role": "user", "content": f"Say {i} of b."},), "So.") for i in range(5)
    ]
    found = prepare("given", heldout=Source(rows=tuple(given)))
    train, heldout = splits(tmp_path / "given")
    assert {row.id for row in heldout.rows} == {f"h{i}" for i in range(5)}
    assert not {row.id for row in train.rows} & {f"b{i}" for i in range(5)}
    assert {"rows": 5, "reason": "its prompt or conversation is held out"} in found.left_out
    assert found.used["train"] == 122 - 5
    found = prepare("fewer", heldout=Source(rows=tuple(given)), heldout_rows=2)
    assert found.used["heldout"] == 2
    counted = sum(int(row.get("rows", 1)) for row in found.left_out)
    assert counted + sum(found.used.values()) == found.read == 123 + 5


def test_bad_rows(prepare: Prepare, files: list[Path]) -> None:
    files[1].write_text(files[1].read_text() + "[]\n")
    with pytest.raises(InputError, match=r"b\.jsonl:62: the row is a list"):
        prepare("bad")
    found = prepare("skipped", bad_rows="skip")
    assert found.bad == 1 and "b.jsonl:62" in str(found.left_out[0]["reason"])
    files[1].write_text(files[1].read_text() + "[]\n")
    with pytest.raises(InputError, match="2 of 125 rows are bad, more than the 1%"):
        prepare("too many", bad_rows="skip")


def test_preference_rows_need_a_rejected_response(prepare: Prepare, files: list[Path]) -> None:
    """Those that are trained on; held-out rows do not."""
    with pytest.raises(InputError, match=r"a\.jsonl:\d+: has no rejected response, which"):
        prepare("dpo", preference=True)
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [
            {"id": r["id"], "prompt": r["prompt"], "chosen": r["response"], "rejected": "No."}
            for r in rows
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = Row("h", ({"role": "user", "content": "Well?"},), "So.")
    found = prepare("pairs", preference=True, heldout=Source(rows=(given,)))
    assert found.bad == 0 and found.used == {"train": 122, "heldout": 1, "validation": 0}


def test_the_hash_of_stored_rows_is_that_of_the_rows(prepare: Prepare, tmp_path: Path) -> None:
    prepare("whole")
    train = splits(tmp_path / "whole")[0]
    assert data_hash(train.rows) == data_hash(list(train.rows))
    assert data_hash(train.rows[:7]) == data_hash(list(train.rows)[:7])
    assert np.unique(train.pairs.prompts.starts).size == len(train.rows)


# ------------------------------------------------------------------------------------------ workers


def _odd(x: int) -> int:
    if x == 3:
        raise InputError("three")
    if x == 4:
        import os

        os._exit(7)
    return 10 * x


def test_work_is_spread_and_its_results_keep_their_order() -> None:
    assert list(spread(abs, range(-20, 0), 3)) == list(range(20, 0, -1))
    assert list(spread(abs, [], 3)) == []


def test_an_error_in_a_worker_is_raised_and_a_death_is_named() -> None:
    with pytest.raises(InputError, match="three"):
        list(spread(_odd, [1, 2, 3], 2))
    with pytest.raises(EnvironmentProblem, match="a worker process ended by itself .*7"):
        list(spread(_odd, [1, 4], 2))
