"""Files: a full disk in every way of writing, names that are no UTF-8, arrays as numpy's own."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ldalign.data.encoding import FittedRow
from ldalign.data.rows import Row
from ldalign.data.store import Part, PartWriter, write_split
from ldalign.system import files
from ldalign.system.errors import EnvironmentProblem
from ldalign.system.files import (
    open_to_write,
    read_jsonl,
    save_array,
    temporary_folder,
    write_json,
    write_jsonl,
    write_text,
)

ROW = Row("a", ({"role": "user", "content": "q"},), "r")
FITTED = FittedRow(ROW, [1, 2], [3], None, [], [], 2)
FULL = "No space left on device"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10, dtype=np.int64).reshape(2, 5),
        np.zeros((0, 5), dtype=np.int64),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array(3, dtype=np.int32),
    ],
    ids=["plain", "empty", "transposed", "scalar"],
)
def test_arrays_are_those_of_numpy(tmp_path, array):
    save_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(array))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def full(path: Path) -> Path:
    """A file on a full disk: it can be opened, and nothing can be written into it."""
    path.symlink_to("/dev/full")
    return path


@pytest.mark.parametrize("size", [1, 10**6])  # within a buffer, and beyond it
def test_a_full_disk_is_named(tmp_path, size):
    path = full(tmp_path / "x")
    message = f"{path}: cannot be written: {FULL} .* bytes free"
    with pytest.raises(EnvironmentProblem, match=message), open_to_write(path) as file:
        file.write(bytes(size))
    with pytest.raises(EnvironmentProblem, match=message):
        save_array(path, np.zeros(size, dtype=np.uint8))
    with pytest.raises(EnvironmentProblem, match=message):
        write_jsonl(path, ["x" * size])
    with pytest.raises(EnvironmentProblem, match=message):
        write_json(path, "x" * size)


@pytest.mark.parametrize("kind", ["lines", "tokens", "index.npy"])
@pytest.mark.parametrize("rows", [1, 20_000])
def test_a_full_disk_while_rows_are_prepared(tmp_path, kind, rows):
    full(tmp_path / f"000.{kind}")
    with (
        pytest.raises(EnvironmentProblem, match=f"{tmp_path}/000.*: cannot be written: {FULL}"),
        PartWriter(tmp_path / "000") as part,
    ):
        for _ in range(rows):
            part.add(FITTED)


@pytest.mark.parametrize("name", ["train.jsonl", "train.tokens.npy", "train.index.npy"])
def test_a_full_disk_while_a_split_is_written(tmp_path, name):
    with PartWriter(tmp_path / "000") as part:
        chosen = [(0, part.add(FITTED))]
    full(tmp_path / name)
    with pytest.raises(EnvironmentProblem, match=f"{name}: cannot be written: {FULL}"):
        write_split(tmp_path, "train", [(Part(tmp_path / "000"), i) for _, i in chosen])


def test_no_place_for_temporary_files(tmp_path, monkeypatch):
    def refused(**_):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    assert temporary_folder("x-").is_dir()
    monkeypatch.setattr(files.tempfile, "mkdtemp", refused)
    with pytest.raises(EnvironmentProblem, match="No usable temporary directory .*TMPDIR"):
        temporary_folder("x-")


def test_a_name_that_is_no_utf8_is_written_escaped(tmp_path):
    name = os.fsdecode(b"donn\xe9es.jsonl:2")
    write_jsonl(tmp_path / "dropped.jsonl", [{"reason": name}])
    assert (tmp_path / "dropped.jsonl").read_bytes() == b'{"reason": "donn\\udce9es.jsonl:2"}\n'
    assert read_jsonl(tmp_path / "dropped.jsonl") == [{"reason": name}]
    write_text(tmp_path / "text", name)
    assert (tmp_path / "text").read_text() == "donn\\udce9es.jsonl:2"
