"""`~` in every key that names a file or a folder, of every command."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldalign.run.compare_settings import CompareConfig
from ldalign.run.keys import ColumnsKeys
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config, split_argv
from ldalign.system.errors import InputError
from ldalign.train.generate import GenerateConfig
from ldalign.train.inspect_data import InspectConfig
from ldalign.train.report import ReportConfig

CONFIGS = (RunConfig, CompareConfig, GenerateConfig, InspectConfig, ReportConfig)
# The keys that hold text and name no file. A new key of text must be here, or be a path.
NO_PATHS = {"sampling.stop", "judge.endpoint", "benchmarks.tasks", "compare.methods"}
NO_PATHS |= {"compare.primary", "rows", "hub.push"}
NO_PATHS |= {"ignore_columns"} | {f"columns.{key.name}" for key in dataclasses.fields(ColumnsKeys)}


def text_keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, bool, bool]]:
    """Of every key that can hold text: its dotted name, whether it is a path, and may be a list."""
    hints = typing.get_type_hints(cls)
    for declared in dataclasses.fields(cls):
        kind, key = hints[declared.name], prefix + declared.name
        if dataclasses.is_dataclass(kind):
            yield from text_keys(kind, f"{key}.")
            continue
        members = typing.get_args(kind) or (kind,)
        if str in members or list[str] in members:
            yield key, bool(declared.metadata.get("path")), list[str] in members


# CompareConfig's are RunConfig's, and it asks for more keys.
CASES = [
    (cls, key, several)
    for cls in (RunConfig, GenerateConfig, ReportConfig)
    for key, is_path, several in text_keys(cls)
    if is_path
]


def value_of(config: object, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_every_key_of_text_is_a_path_or_known_to_be_none() -> None:
    for cls in CONFIGS:
        keys = {key: is_path for key, is_path, _ in text_keys(cls)}
        others = {key for key, is_path in keys.items() if not is_path}
        assert others == NO_PATHS & keys.keys()
    found = {key for _, key, _ in CASES}
    assert {"run", "policy", "data", "guide.folder", "agreement.policy", "output"} <= found
    assert len(found) >= 14


@pytest.mark.parametrize(("cls", "key", "several"), CASES)
def test_the_home_directory_stands_for_a_tilde(
    cls: Any, key: str, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a file, alone and in a list; inside a path it is a character."""
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = f"{tmp_path}/a~b"
    more = ["run=x"] if cls is ReportConfig and key != "run" else []
    if key == "judge.folder":
        more += ["judge.model=embedding"]
    assert value_of(load_config(cls, None, [f"{key}=~/a~b", *more]), key) == asked
    file = tmp_path / "file.yaml"
    file.write_text(f"{key.replace('.', ': {')}: ~/a~b{'}' * key.count('.')}\n")
    assert value_of(load_config(cls, file, more), key) == asked
    if several:
        config = load_config(cls, None, [f"{key}=[~/a~b, c/~]"])
        assert value_of(config, key) == [asked, "c/~"]


def test_config_files_and_their_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/file.yaml").write_text("base: ~/base.yaml\n")
    path, _, _ = split_argv(["--config=~/deep/file.yaml"])
    assert load_config(RunConfig, path).seed == 7


def test_somebody_unknown_is_one_line() -> None:
    config = load_config(RunConfig, None, ["policy=~no-such-user/model"])
    assert config.policy == "~no-such-user/model"
    with pytest.raises(InputError, match="x.yaml: No such file"):
        load_config(RunConfig, split_argv(["--config=~no-such-user/x.yaml"])[0])
