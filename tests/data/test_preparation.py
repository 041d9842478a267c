"""Rows prepared into files: the same for any number of processes, gone on with after a stop."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from made_tokenizers import CHATML_TEMPLATE

from ldalign.data import preparation, records
from ldalign.data.encoding import Fitting
from ldalign.data.ledger import Found
from ldalign.data.preparation import Plan, Source, prepare_files
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
        data: Source | None = None,
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
            data or Source((tuple(files),)),
            heldout,
            Reading(bad_rows=bad_rows),
            replace(plan, **change),  # type: ignore[arg-type]
            folder / "parts",
            lambda what, count: lambda done: None,
            processes,
        )

    return make


def splits(folder: Path) -> list[Split]:
    return [open_split(folder, name, 10**6) for name in ("train", "heldout")]


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


@pytest.mark.parametrize("processes", [1, 2])
def test_the_next_rows_come_in_the_place_of_those_that_are_too_long(
    prepare: Prepare, tmp_path: Path, files: list[Path], processes: int
) -> None:
    """As many as are asked for, and by their shares, while there are others."""
    for path in files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["prompt"] += " Say it." * (200 if number % 3 else 1)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare("most", most=15, heldout_rows=10, processes=processes)
    assert found.used == {"train": 15, "heldout": 10, "validation": 0}
    assert found.encoded == 25 + found.long < found.read and found.long > 20
    counted = sum(int(row.get("rows", 1)) for row in found.left_out)
    assert counted + 25 == found.read
    assert all(":" in str(row["where"]) for row in found.left_out if "id" in row)
    entries = Source(tuple((path,) for path in files))
    mixed = prepare("shares", data=entries, shares=(3.0, 1.0), heldout_rows=0, most=20)
    of_a = mixed.files[str(files[0])]["trained on"]
    assert mixed.used["train"] == 20 and 12 <= of_a <= 18
    whole = prepare("free", data=entries, shares=(3.0, 1.0), heldout_rows=0)
    fit = [sum(n % 3 == 0 for n in range(60)) + 1] * 2
    share = whole.files[str(files[0])]["trained on"] / whole.used["train"]
    assert fit[0] >= whole.used["train"] * 0.6 and 0.6 < share < 0.9
    for one in (found, mixed, whole):
        of_files = Counter[str]()
        for counts in one.files.values():
            of_files += counts
        assert of_files.total() == one.read and of_files["trained on"] == one.used["train"]


def test_prompts_that_the_template_makes_equal_are_on_one_side(
    prepare: Prepare, tmp_path: Path, files: list[Path]
) -> None:
    """A blank at the end is another text, and the same prompt to a template that trims."""
    rows = [
        {"prompt": f"Say {i}.{' ' * j}", "response": f"Said {i}, {j}."}
        for i in range(40)
        for j in range(2)
    ]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    trims = CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim")
    assert trims != CHATML_TEMPLATE
    for template, equal in ((None, False), (trims, True)):
        name = f"equal {equal}"
        found = prepare(name, template=template, heldout_fraction=0.2)
        train, heldout = splits(tmp_path / name)
        asked = {tuple(pair.prompt) for pair in heldout.pairs}
        assert not asked & {tuple(pair.prompt) for pair in train.pairs}
        assert bool(found.files[str(files[0])]["its prompt or conversation is held out"]) == equal
        assert found.used["heldout"] == round(0.2 * found.read)
        counted = sum(int(row.get("rows", 1)) for row in found.left_out)
        assert counted + sum(found.used.values()) == found.read


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
    assert found.used == {"train": 122 - 5, "heldout": 2, "validation": 0}
    assert {"rows": 3, "reason": "held-out rows beyond those that are used"} in found.left_out
    counted = sum(int(row.get("rows", 1)) for row in found.left_out)
    assert counted + sum(found.used.values()) == found.read == 123 + 5


def split_rows(
    folder: Path, data: list[dict[str, object]], heldout: list[dict[str, object]], policy: Path
) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of two files; without `heldout`, a tenth is held out."""
    sources: list[Source | None] = []
    for name, rows in (("data", data), ("held", heldout)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(Source(((path,),)) if rows else None)
    plan = Plan(
        policy, None, date(2026, 1, 1), Fitting(200), heldout_fraction=0.1, heldout_rows=200
    )
    assert sources[0] is not None
    rows, _ = preparation.read_splits(sources[0], sources[1], Reading(), plan)
    return rows["train"], rows["heldout"]


def test_turns_of_a_conversation_in_rows_of_their_own(tmp_path: Path, chatml_folder: Path) -> None:
    """By the conversation's name, or by how it begins: nothing of it is on both sides."""
    flat: list[dict[str, object]] = [
        {"conversation_id": f"c{i // 3}", "prompt": f"q{i}", "response": f"a{i}"}
        for i in range(300)
    ]
    grown: list[dict[str, object]] = []
    for i in range(100):
        talk = [
            {"role": role, "content": f"{role} {i}-{j}"}
            for j in range(3)
            for role in ("user", "assistant")
        ]
        grown += [{"id": len(grown) + j, "messages": talk[: 2 * j + 2]} for j in range(3)]
    for rows, of in (
        (flat, lambda row: int(row.history[0]["content"][1:]) // 3),
        (grown, lambda row: row.history[0]["content"]),
    ):
        train, heldout = split_rows(tmp_path, rows, [], chatml_folder)
        assert (len(train), len(heldout)) == (270, 30)
        assert not {of(row) for row in train} & {of(row) for row in heldout}


@pytest.mark.parametrize("names", [["dolly"], ["a", "b", "c", "d"]])
def test_an_id_that_repeats_is_no_conversation(
    tmp_path: Path, chatml_folder: Path, names: list[str]
) -> None:
    rows: list[dict[str, object]] = [
        {"id": names[i % len(names)], "prompt": f"q{i}", "response": "r"} for i in range(100)
    ]
    train, heldout = split_rows(tmp_path, rows, [], chatml_folder)
    assert (len(train), len(heldout)) == (90, 10)


@pytest.mark.parametrize("key", ["id", "conversation_id", "session_id"])
def test_files_that_number_their_rows_share_nothing(
    tmp_path: Path, chatml_folder: Path, key: str
) -> None:
    data, held = (
        [{key: i, "prompt": f"{name} {i}", "response": "r"} for i in range(50)] for name in "ab"
    )
    train, heldout = split_rows(tmp_path, data, held, chatml_folder)
    assert (len(train), len(heldout)) == (50, 50)
    named = [{**row, "conversation_id": f"talk {row[key]}"} for row in [*data, *held]]
    train, heldout = split_rows(tmp_path, named[:50], named[50:90], chatml_folder)
    assert (len(train), len(heldout)) == (10, 40)


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
