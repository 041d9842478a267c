"""A run's rows, prepared into its folder once; again only where nothing was made of them."""

import json
import shutil
from pathlib import Path

import pytest
from runs import ROOT, run_script
from toy_context import open_toy, rows_file

from ldalign.data import embedded, preparation
from ldalign.data.problems import PROBLEMS
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


def test_the_start_says_which_files_are_read(
    tmp_path: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a data set's folder, the training split and, as held-out rows, the test split; at every
    start, also one that only looks.
    """
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, rows in (("train", 90), ("test", 20)):
        rows_file(folder / f"{split}-00000-of-00001.jsonl", rows)
    for write in (False, True, True):
        ctx = open_toy(tmp_path, f"data={folder}", *OPTIONS, write=write)
        assert ctx.counts["rows/read"] == 90
        said = capfd.readouterr().err
        assert f"data: 1 file: {folder}/train-00000-of-00001.jsonl" in said
        assert "1 of 2 files are read, the train split by their names; not read: test-" in said
    sources = json.loads((tmp_path / "run/data/sources.json").read_text())
    assert [one["path"] for one in sources] == [f"{folder}/train-00000-of-00001.jsonl"]
    ctx = open_toy(tmp_path, f"data={folder}", f"heldout={folder}", *OPTIONS, write=False)
    assert ctx.counts["rows/read"] == 110
    assert f"heldout: 1 file: {folder}/test-00000-of-00001.jsonl" in capfd.readouterr().err


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


def test_the_part_that_a_file_plays_counts(
    tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that was held out is not trained on by a later start, nor are shares kept of another
    order, nor a file given once where it is given twice.
    """
    one, other = (rows_file(tmp_path / f"{name}.jsonl", 40) for name in "ab")
    other.write_text(other.read_text().replace("Say", "Tell"))
    started = [*OPTIONS, f"data={one}", f"heldout={other}"]
    open_toy(tmp_path, *started)
    (tmp_path / "run/iteration_0").mkdir()
    assert len(open_toy(tmp_path, *started).heldout.rows) == 7
    for data in (
        (f"data={other}", f"heldout={one}"),
        (f"data=[{one},{other}]",),
        (f"data=[{one},{one}]", f"heldout={other}"),
        (f"data=[{other},{one}]", "data_shares=[3,1]"),
        (),
    ):
        with pytest.raises(InputError) as caught:
            open_toy(tmp_path, *OPTIONS, *data)
        was = f"this run began with data={one}, heldout={other}, now "
        now = ", ".join(data[:2]) if len(data) == 2 and "shares" not in data[1] else "data="
        assert was + (now if "[" not in now else "data=") in str(caught.value)
        assert str(caught.value).endswith("or start another run (run=NAME)")


def test_end_tokens_count(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(open_toy(tmp_path, *options).start, policy)
    options = [*options, f"policy={policy}"]
    first = open_toy(tmp_path, *options)
    calls, make = [], prepared.prepare_files
    monkeypatch.setattr(prepared, "prepare_files", lambda *args: calls.append(1) or make(*args))
    open_toy(tmp_path, *options)
    settings = json.loads((policy / "generation_config.json").read_text())
    ends = [*first.tokenizer.end_ids, 0]
    (policy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    assert not calls and open_toy(tmp_path, *options).tokenizer.end_ids == tuple(ends)
    assert calls


def test_a_file_among_the_prepared_rows_is_not_deleted(tmp_path: Path, options: list[str]) -> None:
    open_toy(tmp_path, *options)
    mine = rows_file(tmp_path / "run/data/mine.jsonl", 40)
    with pytest.raises(InputError, match=r"mine.jsonl: lies where this run keeps its prepared row"):
        open_toy(tmp_path, *OPTIONS, f"data={mine}")
    assert mine.is_file()


@pytest.mark.parametrize("change", ["other", "shorter", "bad", "same"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Between the passes: what is prepared would be of neither."""
    path = tmp_path / "rows.jsonl"
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    new = {"other": lines[::-1], "shorter": lines[:9], "bad": ["x\n"], "same": lines}[change]
    divide = preparation.divide

    def changed(*args: object, **options: object) -> object:
        if path.read_text() == text:
            path.write_text("".join(new))
        return divide(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(preparation, "divide", changed)
    with pytest.raises(InputError, match=r"changed while (it was|they were) read; start again"):
        open_toy(tmp_path, *options)
    monkeypatch.undo()
    path.write_text(text)
    ctx = open_toy(tmp_path, *options)
    fresh = open_toy(tmp_path, *options, f"run={tmp_path / 'fresh'}")
    assert list(ctx.train.rows) == list(fresh.train.rows)


def test_what_a_user_may_not_expect_is_said(
    tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::3]:
        row["response"] += " and so on" * 60
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    open_toy(tmp_path, *options)
    assert "training responses are longer than max_length=160 leaves room" in capfd.readouterr().err
    path.write_text("".join(json.dumps({**row, "prompt": "Go on."}) + "\n" for row in rows))
    open_toy(tmp_path, *options, "max_rows=30")
    assert "WARNING: 0 rows are held out of 39 that are asked for" in capfd.readouterr().err
    open_toy(tmp_path, *options, "heldout_fraction=0")
    assert "nothing is held out (heldout_fraction=0): no policy" in capfd.readouterr().err


def test_a_look_writes_nothing(tmp_path: Path, options: list[str]) -> None:
    ctx = open_toy(tmp_path, *options, write=False)
    assert len(ctx.train.rows) == 20 and ctx.train.pairs[3].prompt
    assert not (tmp_path / "run").exists()


def test_the_files_order_where_it_is_asked_for(tmp_path: Path, options: list[str]) -> None:
    ctx = open_toy(tmp_path, *options, "shuffle=false", "evaluation.rows=0")
    asked = [row.history[-1]["content"] for row in ctx.train.rows]
    assert asked == [f"Say {i}." for i in range(20)]


def test_the_two_embedded_sets_are_told_apart(tmp_path: Path, in_process: None) -> None:
    options = ("max_rows=60", "evaluation.rows=18", *OPTIONS[2:])
    first = open_toy(tmp_path, "data=embedded-wordings", *options)
    rows = [*first.train.rows, *first.heldout.rows]
    assert {str(row.kind) for row in rows} == {f"{kind}-any" for kind in PROBLEMS}
    assert all(embedded.check(str(row.kind), row.answer, row.response) for row in rows)
    assert first.counts["rows/read"] == 4600
    (tmp_path / "run/iteration_0").mkdir()
    with pytest.raises(InputError, match="data was 'embedded-wordings', now 'embedded'"):
        open_toy(tmp_path, "data=embedded", *options)


def test_dpo_on_the_wordings_rejects_what_is_wrong(tmp_path: Path, in_process: None) -> None:
    options = ("method=dpo", "iterations=1", "max_rows=40", "evaluation.rows=9", *OPTIONS[2:])
    ctx = open_toy(tmp_path, "data=embedded-wordings", *options)
    for row in ctx.train.rows:
        assert embedded.check(str(row.kind), row.answer, row.response)
        assert not embedded.check(str(row.kind), row.answer, str(row.rejected))


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
