"""The files of a run folder, which may be a stranger's: read within bounds, within the folder."""

import os
import stat
from pathlib import Path
from typing import Any

from ldalign.system.errors import FILE_SYSTEM, InputError, cannot_be_read
from ldalign.system.files import read_json

MAX_BYTES = 10**7  # a summary, a manifest, environment.json: a hundred times the largest real one
# What the libraries of the key `log` keep in a run folder, and only there. ldalign itself reads
# and writes nothing there, and wandb's has links to its own logs elsewhere.
SINKS = ("tensorboard", "trackio", "wandb")


def refuse_outside(run: Path) -> None:
    """Raises InputError where a link in the run folder leads out of it, or to what is not looked at
    here, or something in it is neither file nor folder: before anything there is read or written,
    which would follow it.
    """
    root = os.path.realpath(run)

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a stage that has just got its name
            raise cannot_be_read(f"{error.filename:.200}", error) from None

    for folder, inner, files in os.walk(run, onerror=refuse):
        for name in (*inner, *files):
            _refuse(os.path.join(folder, name), root)
        if folder == os.fspath(run):
            inner[:] = [name for name in inner if name not in SINKS]


def _refuse(path: str, root: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # a tree of folders that is deeper than any path can say
        raise cannot_be_read(f"{path[:200]}...", error) from None
    if stat.S_ISLNK(mode):
        target = os.path.join(os.path.realpath(path), "")
        if not target.startswith(os.path.join(root, "")):
            raise InputError(
                f"{path}: is a link out of the run folder; remove it, or put the file itself there"
            )
        if target.startswith(tuple(os.path.join(root, name, "") for name in SINKS)):
            raise InputError(
                f"{path}: is a link to what a library of the key log keeps, whose own links "
                "are not looked at; remove it, or put the file itself there"
            )
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is neither a file nor a folder; remove it")


def read_object(path: Path, instead: str) -> dict[str, Any]:
    """Reads a JSON object that ldalign wrote, of at most MAX_BYTES.

    instead: what to do where there is something else. Raises InputError naming the file.
    """
    try:
        found = read_json(path, MAX_BYTES)
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} in place of an object")
    except OSError as error:
        if error.errno in FILE_SYSTEM:
            raise cannot_be_read(path, error) from None
        raise InputError(f"{path}: damaged: {error.strerror}; {instead}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}; {instead}") from None
    return found


def read_if_there(path: Path, instead: str) -> dict[str, Any]:
    """As `read_object`; {} where there is nothing of that name."""
    return read_object(path, instead) if os.path.lexists(path) else {}
