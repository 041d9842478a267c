"""The files of a model folder, read as a stranger's data: within bounds, within the folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

from ldalign.system.errors import InputError, cannot_be_read

# A config or a header: a hundred times the largest real one. Parsed, it takes many times that.
MAX_JSON_BYTES = 10**7
MAX_TOKENIZER_BYTES = 10**8  # tokenizer.json of 250,000 entries has 35 MB
# What a file begins with that Git LFS has not fetched: a text of three lines in its place.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
READ_LATER = (".json", ".jinja", ".safetensors", ".txt", ".model")  # files that stages use


def is_inside(path: Path, folder: Path) -> bool:
    """Says whether `path` stays in the model folder `folder` when its links are followed.

    A hub's cache (models--ORGANISATION--NAME/snapshots/COMMIT) links every file to one in blobs/ of
    the same model: such a link is followed, there alone.
    """
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(root):
        return True
    cached = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    return cached and target.parent == root.parents[1] / "blobs"


def refuse_link_out(path: Path, folder: Path) -> None:
    """Raises InputError where `path` is a link out of the model folder `folder`."""
    if not is_inside(path, folder):
        raise InputError(f"{path}: is a link out of the model folder; put the file itself there")


def refuse_links_out(folder: Path, *subfolders: str) -> None:
    """Raises InputError where a link leads out of the model folder.

    What counts are the subfolders and the files that a later stage reads, copies or hashes.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_LATER or path.name in subfolders:
            refuse_link_out(path, folder)


def read_bytes(path: Path, most: int = MAX_JSON_BYTES, folder: Path | None = None) -> bytes:
    """Reads a file of a model folder, of at most `most` bytes.

    folder: the model folder, where the file lies in a subfolder of it; None: the folder it lies in.
    Raises InputError for a link out, a device, a Git LFS pointer, or too large a file;
    FileNotFoundError where there is none.
    """
    refuse_link_out(path, folder or path.parent)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no ordinary file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_be_read(path, error) from None
    refuse_lfs_pointer(content, path)
    if len(content) > most:
        raise InputError(
            f"{path}: has more than {most} bytes, which no such file needs; is it the right one?"
        )
    return content


def refuse_lfs_pointer(content: bytes, path: Path) -> None:
    """Raises InputError where `content`, the beginning of a file, is a Git LFS pointer's."""
    if content.startswith(LFS_POINTER):
        raise InputError(
            f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull' in its folder"
        )


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object. Raises InputError for anything else, and as `parse_any` does."""
    raw = parse_any(text, path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def parse_any(text: bytes, path: Path) -> Any:
    """Parses JSON.

    Raises InputError for what is none, and for a key given twice, of which one would be lost.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"key {twice!r} is given twice")
        return found

    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{path}: not valid JSON ({broken}); download it again") from None
    if re.search(rb"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(raw, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            raise InputError(
                f"{path}: holds half of a surrogate pair, which is no text; download it again"
            ) from None
    return raw


def read_json(
    path: Path,
    missing: dict[str, Any] | None = None,
    most: int = MAX_JSON_BYTES,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Reads the JSON object in `path`; with no such file, returns a copy of `missing`, if given.

    folder: as in `read_bytes`. Raises InputError as `parse_json` does, and for an absent file
    without `missing`.
    """
    try:
        return parse_json(read_bytes(path, most, folder), path)
    except FileNotFoundError:
        if missing is not None:
            return dict(missing)
        raise InputError(f"{path}: is missing; download the model again") from None


def read_text(path: Path, folder: Path | None = None) -> str:
    """Reads a UTF-8 text file of the folder. Raises InputError as `read_bytes` does.

    folder: as in `read_bytes`.
    """
    try:
        return read_bytes(path, folder=folder).decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte {error.start}"
        raise InputError(f"{path}: not UTF-8 text ({at}); download it again") from None
