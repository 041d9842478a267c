"""Which files are data: in folders with metadata, in saved datasets, by names on the hub."""

import json
import sys

import pytest
from fake_hub import FakeHub
from made_rows import GOOD, parquet, write
from test_records import arrow

from ldalign.data.hub import folder_name
from ldalign.data.reading import read_rows
from ldalign.data.sources import described, files_of, find_files
from ldalign.system.errors import EnvironmentProblem, InputError


def said(spec, key="data"):
    return described(find_files(spec, key=key), key)


PLAIN = [{"prompt": f"q{i}", "response": "r"} for i in range(5)]


def test_metadata_of_a_folder_is_no_data(tmp_path):
    path = parquet(tmp_path / "train-0.parquet", {"prompt": ["q"] * 20, "response": ["r"] * 20})
    for name in ("dataset_infos.json", "croissant.json", "README.md", ".gitattributes"):
        (tmp_path / name).write_text('{\n "default": {}\n}')
    write(tmp_path / "._train-0.jsonl", GOOD)
    (tmp_path / ".cache").mkdir()
    assert files_of(tmp_path) == [path] and len(read_rows(tmp_path)) == 20


def test_endings_of_data(tmp_path):
    names = ["a.jsonl", "b.ndjson.gz", "c.json.zst", "d.PARQUET", "e.arrow", "f.jsonl.zst"]
    names += ["g.jsonlines", "h.pq", "i.JSONLINES.GZ"]
    unread = ["x.csv", "x.txt.gz", "x.gz", "y.jsonl.bz2", "y.jsonl.xz", "z.parquet.gz"]
    for name in [*names, *unread, "x.py", "README.txt", "LICENSE.txt", "_SUCCESS"]:
        (tmp_path / name).touch()
    assert [path.name for path in files_of(tmp_path)] == sorted(names)
    assert said(tmp_path)[1:] == [
        f"data: {tmp_path}: not of a kind that is read: x.csv, x.gz, x.txt.gz, y.jsonl.bz2, "
        "y.jsonl.xz and 1 more"
    ]


def test_a_folder_whose_data_lie_deeper(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "x.jsonl", GOOD)
    with pytest.raises(InputError, match=rf"holds no .*; its folder data does: give {tmp_path}/da"):
        files_of(tmp_path)
    (tmp_path / "data" / "x.jsonl").rename(tmp_path / "data" / "train-0.jsonl")
    assert files_of(tmp_path) == [tmp_path / "data/train-0.jsonl"]


def saved(folder, names):
    """As `datasets.save_to_disk` leaves it."""
    folder.mkdir()
    for name in names:
        arrow(folder / name, PLAIN)
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_saved_dataset(tmp_path):
    folder = saved(tmp_path / "x", ["data-1.arrow", "data-0.arrow"])
    arrow(folder / "cache-17.arrow", PLAIN)  # the same rows again
    assert [path.name for path in files_of(folder)] == ["data-1.arrow", "data-0.arrow"]
    assert [row.response for row in read_rows(folder)] == ["r"] * 10


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "lists no files"),
        ({"_data_files": [], "_fingerprint": "x"}, "names no files"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, r"names '../x.arrow', which is no file"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: is missing"),
        ({"_data_files": [3]}, "names None"),
        ({"_data_files": [], "_indices_data_files": [{}]}, "lists no files of rows in their order"),
    ],
)
def test_a_saved_dataset_that_is_damaged(tmp_path, state, message):
    folder = saved(tmp_path / "x", [])
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=message):
        files_of(folder)


def test_a_saved_dataset_of_splits(tmp_path):
    saved(tmp_path / "train", ["data-0.arrow"])
    saved(tmp_path / "test", ["data-0.arrow"])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert files_of(tmp_path) == [tmp_path / "train/data-0.arrow"]
    assert files_of(tmp_path, key="heldout") == [tmp_path / "test/data-0.arrow"]


# ------------------------------------------------------------------------------------------ the hub


NAMES = [
    *("README.md", "script.py", "data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"),
    *("data/train_gen-0.jsonl", "de/train.jsonl", "de/train.csv"),
]
FILES = {name: json.dumps({"prompt": name, "response": "r"}) for name in NAMES}
CONFIGS = [
    {
        "config_name": "en",
        "default": True,
        "data_files": [
            {"split": "train", "path": "data/train-*"},
            {"split": "test", "path": ["data/test-*"]},
        ],
    },
    {"config_name": "de", "data_files": "de/*"},
]


@pytest.mark.parametrize(
    ("name", "configs", "expected"),
    [
        ("org/name", CONFIGS, ["data/train-0.jsonl", "data/train-1.jsonl"]),
        ("org/name:test", CONFIGS, ["data/test-0.jsonl"]),
        ("org/name:en:test", CONFIGS, ["data/test-0.jsonl"]),
        ("org/name:de:train", CONFIGS, ["de/train.jsonl"]),
        ("org/name", None, ["data/train-0.jsonl", "data/train-1.jsonl", "de/train.jsonl"]),
        ("org/name:train_gen", None, ["data/train_gen-0.jsonl"]),
        ("org/name:de:train", None, ["de/train.jsonl"]),
        ("org/name@v1.0:test", [{"broken": 3}, 4], ["data/test-0.jsonl"]),
    ],
)
def test_a_split_of_the_hub(tmp_path, monkeypatch, name, configs, expected):
    hub = FakeHub(monkeypatch, FILES, configs)
    rows = read_rows(name, cache=tmp_path)
    assert [row.history[0]["content"] for row in rows] == expected
    assert hub.calls == [("dataset", "org/name", "v1.0" if "@" in name else None), expected]
    (folder,) = (tmp_path / "hub-data").iterdir()
    kept = json.loads((folder / "ldalign_source.json").read_text())
    assert kept["commit"] == "c0ffee" and list(kept["files"]) == expected
    assert all(len(sha256) == 64 for _, sha256 in kept["files"].values())
    assert files_of(name, tmp_path) == [folder / one for one in expected] and len(hub.calls) == 2
    (folder / expected[0]).write_text("{}")  # has another size now: fetched again
    assert len(read_rows(name, cache=tmp_path)) == len(expected) and len(hub.calls) == 4


@pytest.mark.parametrize(
    ("name", "configs", "message"),
    [
        ("org/name:dev", CONFIGS, "has no split 'dev'; .* of test, train"),
        ("org/name:fr:train", CONFIGS, "has no config 'fr'; .* of de, default, en"),
        ("org/name", [{**CONFIGS[1], "config_name": "b"}, CONFIGS[1]], "has several of config"),
        ("org/name", [{"config_name": "default", "data_files": "x/*"}], "and no file matches"),
        (
            "org/name",
            [{"config_name": "default", "data_files": "**/*.csv"}],
            "none of its files can",
        ),
        ("org/name:dev", None, "no file is named after the split 'dev'; found README.md"),
        ("org/name:fr:train", None, "has no folder 'fr'"),
    ],
)
def test_a_split_that_is_not_there(tmp_path, monkeypatch, name, configs, message):
    FakeHub(monkeypatch, FILES, configs)
    with pytest.raises(InputError, match=f"data '{name}': .*{message}"):
        read_rows(name, cache=tmp_path)


def fetched(tmp_path, monkeypatch, names, configs, name):
    hub = FakeHub(monkeypatch, {one: json.dumps({"prompt": one, "response": "r"}) for one in names})
    hub.configs = configs
    return [row.history[0]["content"] for row in read_rows(name, cache=tmp_path)]


def config(**keys):
    return [{"config_name": "default", **keys}]


@pytest.mark.parametrize(
    ("names", "configs", "expected"),
    [
        (["a.jsonl", "test/b.jsonl"], config(data_files="*.jsonl"), ["a.jsonl"]),
        (["train-0.jsonl", "x/train-1.jsonl"], config(data_files="**/train*"), None),
        (["train.jsonl", "validation/train.jsonl", "train-test.jsonl"], None, ["train.jsonl"]),
        (["train/test.jsonl", "train/a.jsonl", "test/b.jsonl"], None, ["train/a.jsonl"]),
        (["x.jsonl", "de/x.jsonl"], config(data_dir="de"), ["de/x.jsonl"]),
        (
            ["de/train.jsonl", "de/test.jsonl", "train.jsonl"],
            config(data_dir="de"),
            ["de/train.js"],
        ),
        (["x-0.jsonl", "de/x-0.jsonl"], config(data_dir="de", data_files="x-*"), ["de/x-0.jsonl"]),
        (["alpaca.json", "README.md"], None, ["alpaca.json"]),
        (["train.jsonl", "train.json.gz", "other/train.json"], None, ["train.jsonl", "other"]),
    ],
)
def test_files_of_the_hub(tmp_path, monkeypatch, names, configs, expected):
    found = fetched(tmp_path, monkeypatch, names, configs, "org/name")
    wanted = names if expected is None else [n for n in names if n.startswith(tuple(expected))]
    assert sorted(found) == sorted(wanted)


def test_other_forms_and_kinds_of_the_hub_are_named(tmp_path, monkeypatch, caplog):
    names = ["train.jsonl", "train.ndjson", "train-1.jsonl.xz"]
    assert fetched(tmp_path, monkeypatch, names, None, "org/name:train") == ["train.jsonl"]
    assert "train.ndjson: not read, train.jsonl has the same rows in another form" in caplog.text
    assert "data org/name:train: of this split, not read: train-1.jsonl.xz" in caplog.text


def test_every_name_of_the_hub_has_a_folder(tmp_path, monkeypatch):
    names = ["org/n", "org/n@train", "org/n:train", "org/n@a/b", "org/n@a--b", "org/n:a:b"]
    names += ["org/n@a:b", "org/n@a:b:c", "org/n:a--b", "org-/n"]
    folders = {folder_name(name) for name in names}
    assert len(folders) == len(names) and not any("/" in folder for folder in folders)
    FakeHub(monkeypatch, {"train.jsonl": json.dumps({"prompt": "p", "response": "r"})})
    rows = [files_of(name, tmp_path) for name in ("org/n@train", "org/n:train")]
    assert rows[0] != rows[1]


def test_a_kept_folder_of_another_name(tmp_path, monkeypatch, caplog):
    hub = FakeHub(monkeypatch, FILES, CONFIGS)
    (path, _) = files_of("org/name", tmp_path)
    source = path.parents[1] / "ldalign_source.json"
    source.write_text(source.read_text().replace('"org/name"', '"org/other"'))
    assert files_of("org/name", tmp_path)[0] == path and len(hub.calls) == 4
    assert "holds org/other, not org/name; fetching it again" in caplog.text


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("GatedRepoError", InputError, "HF_TOKEN"),
        ("RepositoryNotFoundError", InputError, "no such file or folder, and no such data set"),
        ("RevisionNotFoundError", InputError, "no such data set"),
        ("Other", EnvironmentProblem, "failed .ConnectionError: no route to host.; check the ne"),
    ],
)
def test_hub_failures(tmp_path, monkeypatch, error, expected, message):
    FakeHub(monkeypatch, FILES, error=error)
    with pytest.raises(expected, match=message):
        read_rows("org/name", cache=tmp_path)


def test_a_download_that_is_not_whole(tmp_path, monkeypatch):
    FakeHub(monkeypatch, FILES)
    sys.modules["huggingface_hub"].snapshot_download = lambda *args, **kwargs: None
    with pytest.raises(EnvironmentProblem, match="is incomplete"):
        read_rows("org/name:test", cache=tmp_path)


def test_a_name_without_the_hubs_client(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EnvironmentProblem, match=r"'org/name': .* pip install 'huggingface"):
        read_rows("org/name", cache=tmp_path)


@pytest.mark.parametrize("name", ["org/name.jsonl", "org/name.parquet", "a/b/c", "org/*.none"])
def test_paths_are_not_looked_up(tmp_path, monkeypatch, name):
    hub = FakeHub(monkeypatch, FILES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file or folder|no file matches"):
        read_rows(name, cache=tmp_path)
    assert not hub.calls
    (tmp_path / "org").mkdir()
    write(tmp_path / "org/name", GOOD)  # a path that is there always wins
    assert len(read_rows("org/name", cache=tmp_path)) == 1 and not hub.calls
