"""Which files are of which split: by names, by a card; what is left of a folder, and said."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_rows import GOOD, write

from ldalign.data.file_splits import (
    by_names,
    card_configs,
    missing_shards,
    named_splits,
    of_split,
    pattern_regex,
    read_card,
    twice,
)
from ldalign.data.reading import read_rows
from ldalign.data.sources import described, files_of, find_files
from ldalign.system.errors import InputError


def folder_of(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, GOOD)
    return folder


def read(folder, key="data"):
    return [str(path.relative_to(folder)) for path in files_of(folder, key=key)]


def said(spec, key="data"):
    return described(find_files(spec, key=key), key)


# ---------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train-00000-of-00002.parquet", {"train"}),
        ("data/training.jsonl", {"train"}),
        ("TRAIN.jsonl", {"train"}),
        ("math_train2.jsonl", {"train"}),
        ("train_sft-0.jsonl", {"train"}),
        ("train/a.jsonl", {"train"}),
        ("dev.jsonl", {"validation"}),
        ("val/0.jsonl", {"validation"}),
        ("eval.jsonl", {"test"}),
        ("train-test.jsonl", {"train", "test"}),
        ("validation/train.jsonl", {"train", "validation"}),
        ("trained.jsonl", set()),
        ("latest.jsonl", set()),
        ("devices-contest.jsonl", set()),
        ("evaluated.jsonl", set()),
    ],
)
def test_words_of_splits(name, splits):
    assert named_splits(name) == splits


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "validation/train.jsonl", "train-test.jsonl"], "train", ["train.jsonl"]),
        (["train/test.jsonl", "test/a.jsonl"], "test", ["test/a.jsonl"]),
        (["train.jsonl", "train_gen.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "train_gen.jsonl"], "train_gen", ["train_gen.jsonl"]),
        (["train_sft.jsonl", "test_sft.jsonl"], "train", ["train_sft.jsonl"]),
        (["dev.jsonl", "train.jsonl"], "validation", ["dev.jsonl"]),
        (["train.jsonl"], "test", []),
        (["prefs.jsonl", "train.jsonl"], "prefs", ["prefs.jsonl"]),
    ],
)
def test_the_names_of_a_split(names, split, expected):
    assert of_split(names, split) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "test.jsonl", "x.jsonl"], ["train.jsonl"]),
        (["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"]),  # one kind: all
        (["a.jsonl", "test.jsonl"], ["a.jsonl"]),
        (["train-test.jsonl", "train.jsonl"], ["train.jsonl"]),
    ],
)
def test_a_split_by_names_alone(names, expected):
    assert by_names(names, ["train"], "data=x", "give a file") == expected


def test_no_split_to_train_on():
    with pytest.raises(InputError, match="data=x: .* no train split .dev.jsonl, test.jsonl.; give"):
        by_names(["dev.jsonl", "test.jsonl"], ["train"], "data=x", "give a file")


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.jsonl", ["a.jsonl"], ["test/a.jsonl", "a.jsonl.gz"]),
        ("**/train*", ["train.jsonl", "x/train-0", "x/y/train"], ["x/a-train", "train/a.jsonl"]),
        ("data/**", ["data/a", "data/b/c"], ["a", "xdata/a"]),
        ("**", ["a", "b/c"], []),
        ("**/*.json", ["a.json", "b/c.json"], ["a.jsonl"]),
        ("./data/train-*", ["data/train-0.parquet"], ["data/train/x", "data/train-0/x"]),
        ("a?[0-9].x", ["ab1.x"], ["a/1.x", "abc.x", "ab1yx"]),
        ("[!a].x", ["b.x"], ["a.x", "/.x"]),
        ("a+(b)[.x", ["a+(b)[.x"], ["aab[.x"]),
    ],
)
def test_patterns_of_a_card(pattern, matching, others):
    found = pattern_regex(pattern)
    assert [n for n in [*matching, *others] if found.fullmatch(n)] == matching


def test_files_of_one_name():
    names = ["b.json.gz", "b.jsonl", "b.parquet", "c.jsonl", "x/c.jsonl", "b.md", "d.PQ", "d.json"]
    assert twice(names) == [["b.parquet", "b.jsonl", "b.json.gz"], ["d.PQ", "d.json"]]


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["t-00000-of-00003.x", "t-00002-of-00003.x"], ["t-00001-of-00003.x"]),
        (["t-1-of-2.x", "t-2-of-2.x"], []),
        (["t-2-of-2.x"], ["t-1-of-2.x"]),
        (["t-0-of-1.x", "s-1-of-2.x", "t-0-of-2.y"], ["s-0-of-2.x", "t-1-of-2.y"]),
        (["part-9-of-3.x", "best-of-5.x"], []),
    ],
)
def test_missing_shards(names, missing):
    assert missing_shards(names) == missing


# --------------------------------------------------------------------------------------- the folder


def test_a_folder_of_splits(tmp_path):
    folder_of(tmp_path, "train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "README.md")
    assert read(tmp_path) == ["train-00000-of-00001.jsonl"]
    assert said(tmp_path) == [
        f"data: 1 file: {tmp_path}/train-00000-of-00001.jsonl",
        f"data: {tmp_path}: 1 of 2 files are read, the train split by their names; not read: "
        f"test-00000-of-00001.jsonl (give data={tmp_path}/test*)",
    ]
    assert read(tmp_path, "heldout") == ["test-00000-of-00001.jsonl"]
    assert said(tmp_path, "heldout")[1].endswith(f"(give heldout={tmp_path}/train*)")
    assert [p.name for p in files_of(f"{tmp_path}/test*")] == ["test-00000-of-00001.jsonl"]


@pytest.mark.parametrize(
    ("names", "train", "heldout"),
    [
        (["train/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"], ["test/a.jsonl"]),
        (["data/train-0.jsonl", "data/dev-0.jsonl"], ["data/train-0.jsonl"], ["data/dev-0.jsonl"]),
        (["train.jsonl", "more/test.jsonl"], ["train.jsonl"], ["train.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    ],
)
def test_splits_of_folders(tmp_path, names, train, heldout):
    folder_of(tmp_path, *names)
    assert read(tmp_path) == train and read(tmp_path, "heldout") == heldout


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - {split: train, path: data/main-*}
  - {split: test, path: "**/train*"}
---
# Rows
"""


def test_a_folders_own_card(tmp_path):
    folder_of(tmp_path, "data/main-0.jsonl", "data/train-0.jsonl", "train.jsonl", "data/main.csv")
    (tmp_path / "README.md").write_text(CARD)
    assert read(tmp_path) == ["data/main-0.jsonl"]
    assert "1 of 3 files are read, as README.md says; not read: data/train-0." in said(tmp_path)[1]
    assert read(tmp_path, "heldout") == ["data/train-0.jsonl", "train.jsonl"]
    (tmp_path / "README.md").write_text(CARD.replace("data/main-*", "data/*.csv"))
    with pytest.raises(InputError, match=r"none of the files .* can be read \(data/main.csv\)"):
        files_of(tmp_path)
    (tmp_path / "README.md").write_text(CARD.replace("train,", "a,").replace("test,", "b,"))
    with pytest.raises(InputError, match=rf"has several of split; .*={tmp_path}/PATTERN, .* a, b"):
        files_of(tmp_path)
    (tmp_path / "README.md").write_text(CARD.replace("]", "").replace("{", "{{"))  # no YAML
    assert read(tmp_path) == ["train.jsonl"]


def test_cards():
    assert read_card(b"# no head") is None and read_card(b"---\r\na: 1\r\n---\r\n") == {"a": 1}
    folders = card_configs({"configs": [{"config_name": "x", "data_dir": "a/b"}]})
    assert folders["x"].folder == "a/b" and folders["x"].splits is None
    assert card_configs({"configs": 3}) == card_configs({}) == card_configs({"configs": [4]}) == {}


# -------------------------------------------------------------------------- what is not passed over


def test_other_folders_are_named(tmp_path):
    folder_of(tmp_path, "a.jsonl", "x.parquet/part-0.parquet", ".git/z.jsonl")
    assert read(tmp_path) == ["a.jsonl"]
    line = f"1 of 2 files are read; not read: x.parquet/part-0.parquet (give data={tmp_path}/x.parq"
    assert line in said(tmp_path)[1]
    line = f"data: {tmp_path}/*: not read, by their names: {tmp_path}/x.parquet/"
    assert said(f"{tmp_path}/*") == [f"data: 1 file: {tmp_path}/a.jsonl", line]


def test_what_a_glob_leaves_and_reads(tmp_path):
    folder_of(tmp_path, "train.jsonl", "test.jsonl", "c.csv", "rows.txt")
    lines = said(f"{tmp_path}/*")
    assert lines[0] == f"data: 2 files: {tmp_path}/test.jsonl, {tmp_path}/train.jsonl"
    assert lines[1].endswith(f"not read, by their names: {tmp_path}/c.csv, {tmp_path}/rows.txt")
    assert "WARNING" in lines[2] and "several splits (test, train)" in lines[2]
    assert [path.name for path in files_of(f"{tmp_path}/*.txt")] == ["rows.txt"]
    assert len(said(f"{tmp_path}/t*", "heldout")) == 1


def test_many_files_are_counted(tmp_path):
    folder_of(tmp_path, *(f"{i}.jsonl" for i in range(6)))
    assert said(tmp_path) == [f"data: 6 files: {tmp_path}/0.jsonl to {tmp_path}/5.jsonl"]
    assert said([tmp_path / "1.jsonl", tmp_path / "3.jsonl"])[0].startswith("data: 2 files: ")


@pytest.mark.parametrize("spec", ["", "/*"])
def test_one_name_in_two_forms(tmp_path, spec):
    folder_of(tmp_path, "rows.jsonl", "rows.jsonl.gz")
    with pytest.raises(InputError, match="rows.jsonl and rows.jsonl.gz have one name .* or a list"):
        files_of(f"{tmp_path}{spec}")
    both = [tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"]
    assert files_of(both) == both


@pytest.mark.parametrize("spec", ["", "/*"])
def test_a_missing_shard(tmp_path, spec):
    folder_of(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    with pytest.raises(InputError, match=f"missing, .*: {tmp_path}/train-00001-of-00003.jsonl; "):
        files_of(f"{tmp_path}{spec}")
    folder_of(tmp_path, "train-00001-of-00003.jsonl")
    assert len(files_of(f"{tmp_path}{spec}")) == 3
    assert len(files_of(f"{tmp_path}/*[02]-of-00003.jsonl")) == 2  # the other one is there


def test_links(tmp_path):
    folder_of(tmp_path, "a.jsonl")
    (tmp_path / "self").symlink_to(".")
    assert read(tmp_path) == ["a.jsonl"] and len(said(tmp_path)) == 1
    assert files_of(f"{tmp_path}/**/*.jsonl") == [tmp_path / "a.jsonl"]
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert read(tmp_path) == ["a.jsonl"] and "by links, not read: " in said(tmp_path)[1]


@pytest.mark.parametrize("spec", ["x.jsonl", "", "*", "*.jsonl"])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to("/nowhere/x"), "a link to /nowhere/x, which is not there"),
        (lambda path: path.symlink_to(path.name), "a link that leads back to itself"),
        (os.mkfifo, "a named pipe, not a file"),
        (lambda path: path.symlink_to("/dev/null"), "a device, not a file"),
    ],
    ids=["dangling", "loop", "pipe", "device"],
)
def test_what_is_no_file_is_named(tmp_path, make, what, spec):
    folder_of(tmp_path, "a.jsonl")
    make(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=f"data: {tmp_path}/x.jsonl: is {what}"):
        files_of(tmp_path / spec)


def test_parquet_within_gzip(tmp_path):
    folder_of(tmp_path, "x.parquet.gz")
    with pytest.raises(InputError, match="x.parquet.gz: parquet in a compressed file"):
        files_of(tmp_path / "x.parquet.gz")


@contextmanager
def nobody():
    """As a user who may not read everything, where the tests are run by one who may."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["x.jsonl", "in", "."])
@pytest.mark.parametrize("spec", ["x.jsonl", "", "*.jsonl", "in", "in/a.jsonl"])
def test_what_may_not_be_read(closed, spec):
    reads = {"x.jsonl": ("x.jsonl", "", "*.jsonl"), "in": ("in", "in/a.jsonl")}
    with tempfile.TemporaryDirectory() as place:  # all may look into it
        folder = folder_of(Path(place), "x.jsonl", "in/a.jsonl")
        os.chmod(folder, 0o755)
        os.chmod(folder / closed, 0)
        try:
            with nobody():
                if spec in reads.get(closed, (spec,)):
                    message = f"^data={folder / spec}.* cannot be read: Permission denied$".replace(
                        "*.jsonl", r"\*.jsonl"
                    )
                    with pytest.raises(InputError, match=message):
                        files_of(f"{folder}/{spec}".rstrip("/"))
                else:
                    assert files_of(f"{folder}/{spec}")
        finally:
            os.chmod(folder / closed, 0o755)


def test_a_folder_below_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as place:
        folder = folder_of(Path(place), "x.jsonl", "in/a.jsonl")
        os.chmod(folder, 0o755)
        os.chmod(folder / "in", 0)
        with nobody():
            assert "in/ (may not be read)" in said(folder)[1]
        os.chmod(folder / "in", 0o755)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x" * 300, "cannot be read: File name too long"),
        ("/".join(["x" * 200] * 30), "cannot be read: File name too long"),
        ("no.jsonl", "data=no.jsonl: no such file or folder; give a file or folder of rows$"),
        ("a.jsonl,b.jsonl", r"; several are a list: data=\[a.jsonl,b.jsonl\]$"),
        (["embedded", "x"], "data: embedded stands alone"),
        ("", "data: '' is not a path"),
        ("  ", "data: '  ' is not a path"),
        ([], "the list of files is empty"),
        ("~nobody-of-this-name/x", "no such file or folder"),
        (
            "my/missing.csv",
            "data=my/missing.csv: no such file or folder; give a file or folder of ",
        ),
        ("my/missing.jsonl.xz", "no such file or folder; give a file"),
    ],
)
def test_what_is_not_there(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        files_of(spec, tmp_path)


@pytest.mark.parametrize("name", ["row.jsonl", "rows.json", "my_rows"])
def test_a_file_of_nearly_that_name_is_named(tmp_path, monkeypatch, name):
    """By the name without its ending, which says what all have in common."""
    for other in ("rows.jsonl", "other.jsonl", "rows.txt"):
        (tmp_path / other).touch()
    for source in (name, tmp_path / name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError) as caught:
            files_of(str(source), tmp_path)
        meant = str(source).replace(name, "rows.jsonl")
        assert str(caught.value).endswith(f"folder; did you mean data={meant}?")


def test_the_key_is_named(tmp_path):
    with pytest.raises(InputError, match="^heldout=no.jsonl: no such file"):
        files_of("no.jsonl", tmp_path, "heldout")
    with pytest.raises(InputError, match=r"heldout=o/n: .* heldout=o/n:test"):
        files_of("o/n", tmp_path, "heldout")


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"donn\xe9es.jsonl")
    write(path, GOOD)
    assert read(tmp_path) == [path.name]
    assert said(tmp_path)[0].encode("utf-8", "backslashreplace").endswith(b"donn\\udce9es.jsonl")
    assert [row.response for row in read_rows(tmp_path)]
    for name in (b"\xe9.parquet", b"\xe9.jsonl.zst", b"\xe9.arrow"):
        other = tmp_path / os.fsdecode(name)
        other.touch()
        with pytest.raises(InputError, match="its name is no UTF-8"):
            files_of(other)
