"""Which files `data=` stands for: files, folders, globs, names on the hub, and lists of these."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldalign.data.hub import HUB_DATA, hub_files
from ldalign.system.errors import InputError
from ldalign.system.untrusted import read_json

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")  # what is read from a folder
COMPRESSED = (".gz", ".zst")  # behind one of these
# What lies in data folders beside the data.
METADATA_FILES = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "ldalign_source.json",
    "croissant.json",
)


def files_of(spec: Any, cache: Path | None = None) -> list[Path]:
    """Returns the files that `spec` stands for, in the order in which they are read.

    cache: where data from the hub are kept; None: hub names are refused. A name whose files are
    there already is not looked up again. Raises InputError where there is nothing to read, and as
    `hub_files` does.
    """
    return [path for source in _sources(spec) for path in _files(source, cache)]


def is_data_file(path: Path) -> bool:
    """Says whether a file has a name of data: a known ending, and no file that describes data."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        del suffixes[-1]
    known = bool(suffixes) and suffixes[-1] in KINDS
    return known and path.name not in METADATA_FILES and not path.name.startswith(".")


def _sources(spec: Any) -> list[str]:
    """`spec` as a list of paths, folders, globs and names."""
    entries = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not entries:
        raise InputError("data: the list of files is empty")
    for path in entries:
        if not isinstance(path, str | Path) or not str(path):
            raise InputError(
                f"data: {path!r} is not a path; expected a file, a folder, a glob, a name on the "
                "hub, or a list of these"
            )
    return list(map(str, entries))


def _files(source: str, cache: Path | None) -> list[Path]:
    """The files that one source stands for, sorted by name."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path)
    if glob.has_magic(source):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise InputError(f"{source}: no file matches")
        return files
    if cache is not None and HUB_DATA.fullmatch(source) and not is_data_file(path):
        return hub_files(source, cache, is_data_file)
    raise InputError(f"{path}: no such file or folder")


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder."""
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if (folder / "dataset_dict.json").is_file():
        raise InputError(
            f"{folder}: holds several splits ({', '.join(p.name for p in inner)}); give the folder "
            "of one"
        )
    files = sorted(p for p in folder.iterdir() if is_data_file(p) and p.is_file())
    if files:
        return files
    deeper = [p.name for p in inner if any(map(is_data_file, p.iterdir()))]
    hint = f"; its folder {deeper[0]} does: give {folder / deeper[0]}" if deeper else ""
    raise InputError(f"{folder}: the folder holds no {', '.join(KINDS)} file{hint}")


def _saved_dataset(folder: Path) -> list[Path]:
    """The files of a folder that `datasets.save_to_disk` wrote: those that its state names.

    Others are caches, which hold the same rows again.
    """
    state = read_json(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list) or state.get("_indices_data_files"):
        raise InputError(
            f"{folder / 'state.json'}: lists no files of rows in their order; save the data again "
            "with save_to_disk, or as parquet"
        )
    files = []
    for entry in listed:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{folder / 'state.json'}: names {name!r}, which is no file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: is missing, and state.json names it")
        files.append(folder / name)
    if not files:
        raise InputError(f"{folder}: its state.json names no files, so it holds no rows")
    return files
