"""A run's rows, prepared into its folder once; again only where nothing was made of them."""

import json
from pathlib import Path

import pytest
from runs import ROOT, run_script
from toy_context import open_toy, rows_file

from ldalign.run import prepared
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file

OPTIONS = ("max_rows=20", "evaluation.rows=7", "heldout_fraction=0.5", "sft.epochs=0")
OPTIONS += ("continual_sft.epochs=0", "global_batch=4")


@pytest.fixture
def options(tmp_path: Path, in_process: None) -> list[str]:
    return [f"data={rows_file(tmp_path / 'rows.jsonl', 90)}", *OPTIONS]


def test_a_later_start_opens_what_is_there(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_toy(tmp_path, *options)
    assert [len(s.rows) for s in (first.train, first.heldout, first.validation)] == [20, 7, 32]
    assert first.counts["rows/read"] == 90 and first.counts["rows/unused"] == 31
    dropped = (tmp_path / "run/data/dropped.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["rows"] for line in dropped) == 31
    monkeypatch.setattr(prepared, "prepare_files", None)
    again = open_toy(tmp_path, *options)
    assert list(again.train.pairs) == list(first.train.pairs)
    assert list(again.heldout.rows) == list(first.heldout.rows)
    assert list(again.validation.rows) == list(first.validation.rows)
    assert again.used_hash == first.used_hash
    looked = open_toy(tmp_path, *options, write=False)
    assert list(looked.train.rows) == list(first.train.rows)


def test_rows_of_other_settings_are_prepared_anew_until_something_is_made_of_them(
    tmp_path: Path, options: list[str]
) -> None:
    open_toy(tmp_path, *options)
    assert len(open_toy(tmp_path, *options, "max_rows=30").train.rows) == 30
    assert len(open_toy(tmp_path, *options, "max_rows=25", write=False).train.rows) == 25
    (tmp_path / "run/iteration_0").mkdir()
    with pytest.raises(InputError, match="rows used was 30, now 20"):
        open_toy(tmp_path, *options)
    with pytest.raises(InputError, match="shuffle was True, now False"):
        open_toy(tmp_path, *options, "max_rows=30", "shuffle=false")
    assert len(open_toy(tmp_path, *options, "max_rows=30").train.rows) == 30


def test_a_look_writes_nothing(tmp_path: Path, options: list[str]) -> None:
    ctx = open_toy(tmp_path, *options, write=False)
    assert len(ctx.train.rows) == 20 and ctx.train.pairs[3].prompt
    assert not (tmp_path / "run").exists()


def test_the_files_order_where_it_is_asked_for(tmp_path: Path, options: list[str]) -> None:
    ctx = open_toy(tmp_path, *options, "shuffle=false", "evaluation.rows=0")
    asked = [row.history[-1]["content"] for row in ctx.train.rows]
    assert asked == [f"Say {i}." for i in range(20)]


def test_ranks_see_the_same_rows(tmp_path: Path, toy_cache: Path) -> None:
    """One, two and four processes prepare the same files; two are opened by four."""
    rows = rows_file(tmp_path / "rows.jsonl", 90)
    files = {}
    for ranks in (1, 2, 4):
        run = tmp_path / f"run{ranks}"
        done = run_script(
            ROOT / "train/sft.py", "--config", ROOT / "configs/toy.yaml", f"data={rows}",
            f"run={run}", f"cache={toy_cache}", "sft.epochs=1", "sft.rows=8", "sft.global_batch=8",
            "evaluation.rows=3", "evaluation.samples=0", "report=table", ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        names = sorted(path.name for path in (run / "data").iterdir())
        names = [name for name in names if name.startswith(("train", "heldout"))]
        files[ranks] = {name: hash_file(run / "data" / name) for name in names}
    assert len(files[1]) == 6 and files[1] == files[2] == files[4]
