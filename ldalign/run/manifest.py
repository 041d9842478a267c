"""Stages whose output can be trusted.

A stage's folder appears under its own name only when it is whole: it is filled under a temporary
name, synced, described by a manifest written last, and renamed. The manifest holds the hash of
every file and of everything the stage was made from (its parents), so running the same command
again skips what is done, redoes what was cut short, and refuses what was made from something else.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ldalign.run.stranger import MAX_BYTES, read_object
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.files import (
    HALF_WRITTEN,
    PARTIAL,
    hash_file,
    make_folder,
    read_json,
    remove,
    sync,
    write_text,
    writing,
)
from ldalign.system.metrics import Bar
from ldalign.system.partial_rows import FOLDER as PARTS

Parents = Mapping[str, str | int | float]

MANIFEST = "manifest.json"
PARENTS = "parents.json"  # in the temporary folder of a stage that can be gone on with
CHECKPOINTS = "checkpoint"  # there too, of a stage that trains
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "sentence_bert_config.json",
)

# What all ranks must have alike: beside these, every stage's parents.
SAME_SETTINGS = "start the same command, with the same config file, on every host"
SAME_FILES = "give every host the same files, and the same kind of machine (docs/gpu.md)"

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------ hashing


def hash_settings(settings: Any) -> str:
    """sha256 of a config, dict, list or plain value: equal for equal content,
    whatever the order of dict keys.

    Raises TypeError for what has no canonical text (a set, an arbitrary object) and ValueError for
    NaN and infinity.
    """
    text = json.dumps(
        _canonical(settings),
        sort_keys=True,
        ensure_ascii=True,
        allow_nan=False,
        separators=(",", ":"),
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _canonical(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            # JSON would make 1 and "1" the same key
            raise TypeError("settings can only be hashed with text as keys")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"settings can only be hashed as plain values, not {type(value).__name__}")


def hash_model_folder(folder: Path) -> str:
    """sha256 over a model folder's weights, configuration, tokenizer and template (see
    MODEL_FILES), names included.

    Other files in the folder do not count. A file unchanged since this process last read it is not
    read again. Raises InputError if there are no weights.
    """
    paths = sorted(
        {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    )
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError(f"{folder}: not a model folder: it has no .safetensors file")
    versions = {path: _version_of(path) for path in paths}
    with _hashing(folder, sum(size for size, _ in versions.values())) as progress:
        hashes = {}
        for path, version in versions.items():
            hashes[path.name] = _hash_unchanged(path, *version)
            progress(version[0])
    return hash_settings(hashes)


@contextlib.contextmanager
def _hashing(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of so many bytes are read; gives what takes the bytes that are."""
    with Bar(f"{folder}: files read", size >> 20, "MiB") as progress:
        yield lambda done: progress(done >> 20, 0)


def _version_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _hash_unchanged(path: Path, _size: int, _mtime_ns: int) -> str:
    return hash_file(path)


# ------------------------------------------------------------------------------------------- stages


def run_stage(
    folder: Path, parents: Parents, make: Callable[[Path], None], resume: bool = False
) -> bool:
    """Makes the stage `folder` with `make(temporary folder)`, unless it is there
    already. All ranks call this.

    `parents` names everything the output depends on: hashes of data, template, model and settings,
    or plain values. `make` runs on all ranks and may write files on each of them (different ones).
    An error in `make` on one rank ends that rank at once, without waiting for the others, which may
    be inside a collective operation of theirs. resume: `make` can go on from what a run left in the
    temporary folder when it was cut short.

    Returns True if the stage was made now, False if it was done before. Raises InputError if it was
    made, or begun, from other parents or if its files are not what the manifest says;
    EnvironmentProblem if it cannot be written, or if a rank has other parents.
    """
    parents = dict(parents)
    distributed.agree(lambda: parents, f"for {folder}, {SAME_FILES}")
    partial = folder.with_name(folder.name + PARTIAL)
    if on_rank0(lambda: _prepare(folder, partial, parents, resume)):
        return False
    with writing(folder):
        make(partial)
    distributed.barrier()  # every rank's files are written
    on_rank0(lambda: _finish(folder, partial, parents))
    return True


def _prepare(
    folder: Path, partial: Path, parents: dict[str, str | int | float], resume: bool
) -> bool:
    """Whether the stage is done; if not, a temporary folder is ready: empty, or
    what can be gone on from.
    """
    with writing(folder):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            with contextlib.suppress(OSError):
                remove(partial)
            check_stage(folder, parents)
            return True
        if (partial / MANIFEST).is_file():  # whole, but for its name
            check_stage(partial, parents)
            _name(folder, partial)
            return True
        if resume and (partial / PARENTS).is_file() and _holds_work(partial):
            _compare_parents(partial / PARENTS, _read_parents(partial / PARENTS), as_read(parents))
            log.info("%s: left over from a run that was cut short; gone on from", partial)
            for path in [*partial.rglob(HALF_WRITTEN), *partial.rglob(f"*{PARTIAL}")]:
                remove(path)
            return False
        if partial.exists():
            if any((partial / CHECKPOINTS).glob("*")):
                raise InputError(
                    f"{partial}: holds checkpoints, but {PARENTS}, which says what they were made "
                    "from, is gone; bring it back, or delete the folder to begin this stage again"
                )
            log.info("%s: left over from a run that was cut short; made again", partial)
            remove(partial)
        make_folder(partial)
        if resume:
            write_text(
                partial / PARENTS,
                json.dumps(parents, indent=1, sort_keys=True, allow_nan=False) + "\n",
            )
    return False


def _holds_work(partial: Path) -> bool:
    """Whether anything is in it but what a stage has before its first row or step;
    else it may be begun anew.
    """
    rows = (path for path in partial.rglob("*") if path.is_file() and path.name != PARENTS)
    return any(path.stat().st_size for path in rows) or any((partial / CHECKPOINTS).glob("*"))


def _read_parents(path: Path) -> dict[str, Any]:
    try:
        parents = read_json(path, MAX_BYTES)
        if not isinstance(parents, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise InputError(
            f"{path}: not readable; delete {path.parent} to begin this stage again"
        ) from None
    return parents


def as_read(parents: Parents) -> dict[str, Any]:
    """Returns parents as they come back from JSON."""
    out: dict[str, Any] = json.loads(json.dumps(dict(parents), allow_nan=False))
    return out


def stage_parents(folder: Path) -> dict[str, Any]:
    """What the stage `folder` was made from, or begun from; {} where it is not
    there. Raises InputError.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    if (folder / MANIFEST).is_file():
        parents: dict[str, Any] = _read_manifest(folder)["parents"]
        return parents
    return _read_parents(partial / PARENTS) if (partial / PARENTS).is_file() else {}


def check_stage(folder: Path, parents: Parents | None = None, unread: str | None = None) -> None:
    """Checks a finished stage: its files against its manifest and, if given, its parents.

    unread: the pattern of files whose size alone is compared. Raises InputError naming the damaged
    file, or each parent that differs with its old and its new value.
    """
    manifest = _read_manifest(folder)
    if parents is not None:
        _compare_parents(folder / MANIFEST, manifest["parents"], as_read(parents))
    files = {folder / name: expected for name, expected in manifest["files"].items()}
    whole = [path for path in files if unread is None or not fnmatch(path.name, unread)]
    with _hashing(folder, sum(p.stat().st_size for p in whole if p.is_file())) as progress:
        for path, expected in files.items():
            _check_size(folder, path, expected)
        for path in whole:
            _check_content(folder, path, files[path])
            progress(path.stat().st_size)


def _check_size(folder: Path, path: Path, expected: Mapping[str, Any]) -> None:
    """Compares a file of the finished stage `folder` with what its manifest expects."""
    again = f"delete {folder} to make it again"
    if not path.is_file():
        raise InputError(f"{path}: missing, though {MANIFEST} lists it; {again}")
    if path.stat().st_size != expected["size"]:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes, but {MANIFEST} says {expected['size']}; {again}"
        )


def _check_content(folder: Path, path: Path, expected: Mapping[str, Any]) -> None:
    if hash_file(path) != expected["sha256"]:
        raise InputError(
            f"{path}: damaged: its content is not what {MANIFEST} says; delete {folder} to make it "
            "again"
        )


def _compare_parents(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    missing = object()
    differing = [
        f"{key} was {old.get(key, 'absent')!r}, now {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
    if differing:
        raise InputError(
            f"{path}: made from something else: {', '.join(differing)}; use a new run folder "
            f"(run=NAME), or delete {path.parent} to make it again"
        )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path, again = folder / MANIFEST, f"delete {folder} to make it again"
    if not os.path.lexists(path):
        raise InputError(
            f"{folder}: has no {MANIFEST}, so it is no finished stage; move or delete it"
        )
    manifest = read_object(path, again)
    try:
        if not isinstance(manifest["parents"], dict):
            raise TypeError
        for name, expected in manifest["files"].items():
            parts = Path(name).parts
            if {"size", "sha256"} - expected.keys() or Path(name).is_absolute() or ".." in parts:
                raise ValueError
            # The longest path and name that Linux takes.
            whole = len(os.fsencode(folder / name))
            if whole > 4000 or max(len(os.fsencode(part)) for part in parts) > 255:
                raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{path}: damaged: not a manifest; delete {folder} to make it again"
        ) from None
    return manifest


def _finish(folder: Path, partial: Path, parents: dict[str, str | int | float]) -> None:
    """Syncs everything, writes the manifest, and gives the stage its name."""
    with writing(folder):
        files, paths = {}, _files(partial)
        with _hashing(folder, sum(path.stat().st_size for path in paths)) as progress:
            for path in paths:
                sync(path)
                name, size = path.relative_to(partial).as_posix(), path.stat().st_size
                files[name] = {"size": size, "sha256": hash_file(path)}
                progress(size)
        for inner in (path for path in partial.rglob("*") if path.is_dir()):
            sync(inner)
        manifest = {"parents": parents, "files": files}
        write_text(
            partial / MANIFEST,
            json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n",
        )
        _name(folder, partial)


def _name(folder: Path, partial: Path) -> None:
    """Removes what only an unfinished stage needs, now that it has a
    manifest; then gives it its name.
    """
    for inner in (CHECKPOINTS, PARTS):
        remove(partial / inner)
    (partial / PARENTS).unlink(missing_ok=True)
    partial.rename(folder)
    sync(folder.parent)


def _files(folder: Path) -> list[Path]:
    """All files of a stage, sorted. Raises InputError for a link, say."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    paths = [
        path
        for path in paths
        if path.relative_to(folder).parts[0] not in (PARENTS, CHECKPOINTS, PARTS)
    ]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise InputError(
                f"{path}: is no plain file, which alone a stage may hold; remove it and run the "
                "same command again"
            )
        if path == folder / MANIFEST:
            raise InputError(
                f"{path}: is there before the stage is finished; remove it and run the same "
                "command again"
            )
    return paths
