"""The files of a model folder, read as data from a stranger: inside the folder only, of bounded
size, JSON as JSON.
"""

import json
import re
from pathlib import Path
from typing import Any

from ldalign.system.errors import InputError

MAX_JSON_BYTES = (
    10**7
)  # of a config or a header: a hundred times the largest real one; parsed, it takes many times that
MAX_TOKENIZER_BYTES = 10**8  # tokenizer.json of 250,000 entries has 35 MB


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` stays in the model folder `folder` when its links are followed.

    A hub's cache (models--ORGANISATION--NAME/snapshots/COMMIT) links every file to one in blobs/ of
    the same model: such a link is followed, there alone.
    """
    target, root = path.resolve(), folder.resolve()
    if target.is_relative_to(root):
        return True
    cached = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    return cached and target.parent == root.parents[1] / "blobs"


def refuse_link_out(path: Path, folder: Path) -> None:
    """InputError where `path` is a link out of the model folder `folder`."""
    if not is_inside(path, folder):
        raise InputError(f"{path}: is a link out of the model folder; put the file itself there")


def refuse_links_out(folder: Path, *subfolders: str) -> None:
    """InputError where a file that a later stage reads, copies or hashes, or a subfolder, is a link
    out of it.
    """
    for path in sorted(folder.iterdir()):
        read = (
            path.suffix in (".json", ".jinja", ".safetensors", ".txt", ".model")
            or path.name in subfolders
        )
        if read:
            refuse_link_out(path, folder)


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file of the model folder it lies in. InputError for a link out, a device, or
    too large a file.

    Raises FileNotFoundError where there is none.
    """
    refuse_link_out(path, path.parent)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no ordinary file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > most:
        raise InputError(
            f"{path}: has more than {most} bytes, which no such file needs; is it the right one?"
        )
    return content


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else, and for a key given twice, of which one
    would be lost.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(
                f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice"
            )
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
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def read_json(
    path: Path, missing: dict[str, Any] | None = None, most: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in `path`; a copy of `missing` if there is no such file and a default is
    given.
    """
    try:
        return parse_json(read_bytes(path, most), path)
    except FileNotFoundError:
        if missing is not None:
            return dict(missing)
        raise InputError(f"{path}: is missing; download the model again") from None


def read_text(path: Path) -> str:
    """A text file of the folder."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); download it again"
        ) from None
