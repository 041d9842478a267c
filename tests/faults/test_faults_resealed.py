"""The matrix's rows on a stranger's run folder that is gone on with: each stage's manifest fits its
files, but ldalign did not make them.

Expected of each: one line that names the file or its stage and says what to do, and exit code 2.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import seal
from toy_context import open_toy

from ldalign.data.pairs import Pairs, with_losers
from ldalign.data.store import COLUMNS, open_split
from ldalign.run.context import Context
from ldalign.run.folder import RunFolder
from ldalign.run.stages.distances import distances_stage
from ldalign.run.stages.reference import reference_stage
from ldalign.run.stages.responses import responses_stage
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import is_misread, reading, save_tensors, write_jsonl

OPTIONS = ("max_rows=6", "global_batch=2", "evaluation.rows=0", "sft.epochs=0", "max_new_tokens=3")
OPTIONS += ("validation.rows=0", "weights=uniform", "continual_sft.epochs=0")
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """A toy run with three stages of an iteration, in the process of the test."""
    distributed.start("cpu")
    ctx = open_toy(tmp_path_factory.mktemp("resealed"), *OPTIONS)
    go_on(ctx)
    yield ctx
    distributed.stop()


def go_on(ctx: Context) -> Pairs:
    responses = responses_stage(ctx, 0, ctx.start)
    pairs = with_losers(ctx.used[1], responses.tokens, ctx.config.max_length)
    pairs = distances_stage(ctx, 0, None, ctx.start, pairs)
    return reference_stage(ctx, 0, ctx.start, pairs, {})


def lines(*records: Any) -> Damage:
    return lambda path: write_jsonl(path, records)


def each(key: str, value: Any) -> Damage:
    """Another value in every line."""

    def damage(path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, ({**record, key: value} for record in records))

    return damage


def tensors(*shape: int) -> Damage:
    import torch

    return lambda path: save_tensors({"logps": torch.zeros(shape)}, path)


def junk(path: Path) -> None:
    path.write_bytes(b"\xff" * 64)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


RESPONSES = "responses/responses.jsonl"
DISTANCES = "distances/distances.jsonl"
REFERENCE = "reference/reference.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (RESPONSES, lines([1])),
        (RESPONSES, lines()),
        (RESPONSES, junk),
        (RESPONSES, os.unlink),
        (RESPONSES, each("token_ids", [10**9])),
        (RESPONSES, each("token_ids", [-1])),
        (RESPONSES, each("token_ids", [2**40])),
        (RESPONSES, each("token_ids", [[1]])),
        (DISTANCES, lines([1])),
        (DISTANCES, lines({"weight": 1.0})),
        (DISTANCES, each("weight", "x")),
        (REFERENCE, junk),
        (REFERENCE, os.unlink),
        (REFERENCE, folder),
        (REFERENCE, tensors(3)),
        (REFERENCE, tensors(1, 2)),
    ],
)
def test_C3_stages_that_are_not_ours(context: Context, name: str, damage: Damage) -> None:
    """What a later stage reads of a finished stage has another kind, number or range, and its
    manifest fits it.

    Expected: one line with the file, exit code 2.
    """
    iteration = context.run.path / "iteration_0"
    kept = iteration.with_name("kept")
    shutil.copytree(iteration, kept)
    try:
        damage(iteration / name)
        seal(context.run.path)
        for stage in iteration.iterdir():  # which were made of what is there now
            if stage.name != Path(name).parent.name:
                shutil.rmtree(stage)
        with pytest.raises(InputError, match=re.escape(name)) as refused:
            go_on(context)
        assert "delete " in str(refused.value)
    finally:
        shutil.rmtree(iteration)
        kept.rename(iteration)


def with_index(change: Callable[[np.ndarray], Any]) -> Damage:
    def damage(path: Path) -> None:
        index = np.load(path)
        changed = change(index)
        np.save(path, index if changed is None else changed)

    return damage


def entry(row: int, column: str, value: int) -> Damage:
    def change(index: np.ndarray) -> None:
        index[row, COLUMNS.index(column)] = value

    return with_index(change)


def promising(path: Path) -> None:
    """A header that promises more than there is memory."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (10**13, 5)}
        )


def with_ids(value: int) -> Damage:
    def damage(path: Path) -> None:
        ids = np.load(path)
        ids[-1] = value
        np.save(path, ids)

    return damage


def pickled(path: Path) -> None:
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.index.npy", pickled),
        ("train.index.npy", promising),
        ("train.index.npy", junk),
        ("train.index.npy", os.unlink),
        ("train.index.npy", with_index(lambda index: index[:, :4])),
        ("train.index.npy", with_index(lambda index: index.astype(np.float64))),
        ("train.index.npy", with_index(lambda index: index[:-1])),
        ("train.index.npy", entry(3, "text", -(10**6))),
        ("train.index.npy", entry(3, "text", 2**62)),
        ("train.index.npy", entry(3, "id", 10**6)),
        ("train.index.npy", entry(3, "prompt", 10**9)),
        ("train.index.npy", entry(3, "response", -1)),
        ("train.index.npy", entry(3, "rejected", -2)),
        ("train.tokens.npy", with_ids(10**9)),
        ("train.tokens.npy", with_ids(-1)),
    ],
)
def test_C3_prepared_rows_that_do_not_fit(
    context: Context, tmp_path: Path, name: str, damage: Damage
) -> None:
    """The index, tokens and texts of prepared rows do not fit each other, or are of another kind.

    Expected: one line with the file, and which stage to delete.
    """
    data = shutil.copytree(context.run.path / "data", tmp_path / "data")
    damage(data / name)
    with pytest.raises(InputError, match=rf"data/{re.escape(name)}: damaged: .*; delete .*data"):
        open_split(data, "train", context.tokenizer.vocab_size)


@pytest.mark.parametrize("line", [b"[1]", b'{"id": 7', b"\xff", b'{"id": "a", "messages": [3]}'])
def test_C3_a_row_that_is_none(context: Context, tmp_path: Path, line: bytes) -> None:
    """A prepared row that is no row; it is read when it is asked for.

    Expected: one line with the file and the row; the others are read.
    """
    data = shutil.copytree(context.run.path / "data", tmp_path / "data")
    first = int(np.load(data / "train.index.npy")[0, 0])
    text = (data / "train.jsonl").read_bytes()
    (data / "train.jsonl").write_bytes(line.ljust(first - 1) + text[first - 1 :])
    split = open_split(data, "train", context.tokenizer.vocab_size)
    with pytest.raises(InputError, match=r"data/train\.jsonl: row 1: damaged: .*; delete .*data"):
        split.rows[0]
    assert split.rows[1].id == split.pairs.ids[1]
    if not line.startswith(b'{"id": "'):
        with pytest.raises(InputError, match=r"data/train\.jsonl: row 1: damaged"):
            split.pairs.ids[0]


def test_C3_a_time_that_no_calendar_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest's time of change is far away, as few file systems keep it.

    Expected: the run goes on.
    """
    with RunFolder(tmp_path / "run", "seed: 1\n") as run:
        run.stage("sft/policy", {}, lambda folder: {})
        stat = Path.stat

        class Far:
            def __init__(self, path: Path, **options: Any) -> None:
                self._found = stat(path, **options)
                self.st_mtime = 2.0**40

            def __getattr__(self, name: str) -> Any:
                return getattr(self._found, name)

        monkeypatch.setattr(Path, "stat", lambda path, **options: Far(path, **options))
        assert run.stage("sft/policy", {}, lambda folder: {})["seconds"] >= 0


def test_what_is_no_fault_of_a_file() -> None:
    """Memory, a broken pipe, a full disk and a bug's assertion keep their own ends."""
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        BrokenPipeError(32, "Broken pipe"),
        OSError(28, "No space left on device"),
        AssertionError(),
        KeyboardInterrupt(),
    ):
        assert not is_misread(error)
        with pytest.raises(type(error)), reading("FILE", "delete it"):
            raise error
    for error in (StopIteration(), RecursionError(), FileNotFoundError("none"), KeyError("a")):
        with pytest.raises(InputError, match="FILE: damaged: .*; delete it"):
            with reading("FILE", "delete it"):
                raise error
