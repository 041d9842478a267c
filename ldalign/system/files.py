"""Files: wholly there or not there at all, with errors that name path and bytes; JSON and hashes.

`writing` turns what the file system refuses into one line; `write_text` and
`save_tensors` leave nothing half written; below them are our JSON and JSON Lines files,
and the hash that manifests hold.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from ldalign.system.errors import (
    FILE_SYSTEM,
    EnvironmentProblem,
    InputError,
    LdalignError,
    cannot_be_read,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

PARTIAL = ".partial"  # a file or folder being made is called NAME.partial
# A file's name that is no UTF-8 has half surrogates, which no UTF-8 file holds: written as \udce9,
# which in JSON is what stands for them.
UNNAMEABLE = "backslashreplace"
HALF_WRITTEN = ".tmp*"  # what safetensors calls a file that it has not finished

# What the machine is to blame for, not the program.
_MACHINE_ERRORS = (
    *FILE_SYSTEM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,  # more than the file system, or ulimit -f, allows a file
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)

# What a file system says of names and kinds of files, by which it is not to blame.
_OF_THE_FILE = (
    None,  # of a library, which says it in words
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENODEV,  # a folder is mapped into memory
    errno.ENXIO,
    errno.EOVERFLOW,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
# What texts, numbers and tensors of another kind than ours end in.
_MISREAD = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StopIteration,
    TypeError,
    ValueError,
)


def is_misread(error: BaseException) -> bool:
    """Says whether this may be what the content of a file has led to, which may be a stranger's:
    neither the machine's fault, nor an error that says already what is wrong.
    """
    if isinstance(error, LdalignError | BrokenPipeError):
        return False
    if isinstance(error, OSError):
        return error.errno in _OF_THE_FILE
    if "torch" in sys.modules and isinstance(error, RuntimeError):  # importing it takes seconds
        from ldalign.system.memory import is_out_of_memory

        return not is_out_of_memory(error)
    return isinstance(error, _MISREAD)


def again(folder: Path) -> str:
    """What to do where a stage's files are damaged."""
    return f"delete {folder} to make it again"


@contextlib.contextmanager
def reading(where: object, instead: str) -> Iterator[None]:
    """Turns what reading files of ours ends with, where somebody else has made them, into an
    InputError: the hashes of a stage say that it is as it was made, not that ldalign made it.

    where: the file or folder. instead: what to do. What the file system itself fails with is an
    EnvironmentProblem.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FILE_SYSTEM:
            raise cannot_be_read(where, error) from error
        if not is_misread(error):
            raise
        kind = type(error).__name__
        raise InputError(f"{where}: damaged: {kind}: {error!s:.200}; {instead}") from error


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Turns what the file system refuses within it into an EnvironmentProblem that names the path.

    path: what is written, or the folder of it where the error itself does not say.
    size: in bytes, where known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        where = error.filename2 or error.filename or path  # a file half written, by its name to be
        raise EnvironmentProblem(
            f"{where}: cannot be written: {error.strerror}{_space(error, path, size)}; mend that "
            "and run the same command again: what is finished is kept"
        ) from error


def _space(error: OSError, path: Path, size: int | None) -> str:
    """Says what was to be written and what there is room for, the latter where room is missing."""
    parts = [] if size is None else [f"{size} bytes to write"]
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        parts.append(f"{shutil.disk_usage(folder).free} bytes free")
    return f" ({', '.join(parts)})" if parts else ""


@contextlib.contextmanager
def open_to_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing bytes. Raises EnvironmentProblem naming it where it cannot be
    written, also where that shows only when it is closed, and OSError as it is from elsewhere.
    """
    with writing(path), path.open("wb") as file:
        yield file


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Writes an array as a .npy file, the bytes that `numpy.save` writes.

    numpy's own way loses the system's error, and would tell a full disk as a bug. Raises
    EnvironmentProblem naming the file where it cannot be written.
    """
    array = np.ascontiguousarray(array)
    with writing(path, array.nbytes), path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def temporary_folder(prefix: str) -> Path:
    """Makes a folder for what is not kept, among the machine's temporary files.

    Raises EnvironmentProblem where there is no place for it.
    """
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError as error:  # where no folder takes a file, it is said to be missing
        raise EnvironmentProblem(
            f"temporary files: no folder can be made: {error.strerror or error}; make room, or "
            "give TMPDIR a folder that can be written"
        ) from error


def sync(path: Path) -> None:
    """Puts a file's content on disk (fsync), or, of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; their names are on disk when this returns.

    Raises NotADirectoryError where something above it is a file,
    FileExistsError where `path` is one.
    """
    if path.is_dir():
        return
    if not os.path.lexists(path.parent):
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file: the new one is wholly on disk, or what was there before stays.

    Raises EnvironmentProblem naming the file where it cannot be written; so do all writers here.
    """
    write_bytes(path, text.encode("utf-8", UNNAMEABLE))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`. A link in the place of the unfinished file is not followed, but removed."""
    temporary = path.with_name(path.name + PARTIAL)
    with writing(path, len(content)):
        if temporary.is_symlink():
            temporary.unlink()
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file of contiguous CPU tensors; it is on disk when this returns.

    Raises EnvironmentProblem naming the file where it cannot be written.
    """
    from safetensors.torch import save_file  # with torch, which a process that reads rows needs not

    size = sum(tensor.nbytes for tensor in tensors.values())
    with writing(path, size):
        try:
            save_file(dict(tensors), path, metadata={"format": "pt"})
        except SafetensorError as error:  # it tells the system's error number in words
            found = re.search(r"(?:os error |code: )(\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        path.chmod(0o666 & ~_umask())  # safetensors' temporary file is the owner's alone
        sync(path)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def remove(path: Path) -> None:
    """Removes a folder with all in it, or a file; a link itself, and not what it leads to. Where
    nothing is, nothing happens.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, most: int) -> bytes:
    """Reads a file of at most `most` bytes. Raises ValueError for a larger one, before it is read
    (a hole of any size takes no room on a disk), and OSError as it is.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"more than {most} bytes")
        return file.read()


def read_json(path: Path, most: int) -> Any:
    """Reads a file of JSON of at most `most` bytes. Raises as `read_bounded`, ValueError for other
    content, and RecursionError for one that is too deep.
    """
    return json.loads(read_bounded(path, most).decode("utf-8"))


def holds(path: Path, content: bytes) -> bool:
    """Says whether a file has this content; one of another size is not read."""
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Writes one JSON value a line."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    with writing(path, len(text)):
        path.write_text(text, encoding="utf-8", errors=UNNAMEABLE)


def read_jsonl(path: Path) -> list[Any]:
    """Returns the values of a JSON Lines file of ours."""
    return list(iter_jsonl(path))


def iter_jsonl(path: Path) -> Iterator[Any]:
    """Yields the values of a JSON Lines file of ours, one after the other."""
    # newline: a text may hold U+2028 and the like, which JSON leaves as it is.
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (json.loads(line) for line in file if line != "\n")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; a stage does so in a folder that is renamed when whole."""
    text = json.dumps(value, indent=1) + "\n"
    with writing(path, len(text)):
        path.write_text(text, encoding="utf-8")
