"""Model folders that transformers runs (extra `reward`): checked before it sees them, then loaded.

It runs no code of a folder here and reads no pickle, but it trusts paths, may make up an empty
vocabulary, and draws tensors that are missing at random: all of that is refused.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ldalign.data.tokenizer_growth import check_growth
from ldalign.models.stored_tensors import read_config
from ldalign.models.weights import check_files
from ldalign.system.errors import EnvironmentProblem, InputError, how_to_install
from ldalign.system.memory import OutOfMemory, naming
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
PLAIN_NAME = re.compile(r"\w[\w.-]*")
NEEDED = {"*.safetensors*": "weights in safetensors", "tokenizer.json": "tokenizer.json"}


@dataclass(frozen=True)
class Kind:
    """A kind of model that transformers runs, in the words of its errors."""

    name: str  # with its article: "a reward model"
    key: str  # that gives its folder
    head: str  # the class of transformers that loads it
    otherwise: str  # where a needed file is lacking: what to do
    lower: str  # where memory does not suffice: what to do
    spare: tuple[str, ...] = ()  # what the names of tensors begin with that may be missing


def need_transformers(key: str) -> None:
    """Raises EnvironmentProblem naming the key where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise _no_transformers(key)


def _no_transformers(key: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{key}: transformers is missing; {how_to_install('reward')}")


def load(folder: Path, device: torch.device, kind: Kind) -> tuple[Any, Any]:
    """Returns a folder's tokenizer and model: float32 on `device`, in evaluation mode.

    Raises InputError as `check_folder` does, and for what cannot be loaded or tensors that are
    missing, NaN or Inf; EnvironmentProblem without transformers; OutOfMemory.
    """
    try:
        import transformers

        tokenizers, models = transformers.AutoTokenizer, getattr(transformers, kind.head)
    except ImportError:
        raise _no_transformers(kind.key) from None
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    check_folder(folder, kind)
    name = kind.name.partition(" ")[2]
    what = f"{folder}: the {name}'s float32 weights on {device}"
    try:
        with naming(lambda: what, kind.lower):
            tokenizer = tokenizers.from_pretrained(folder, **options)
            model, found = models.from_pretrained(
                folder,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
            model.eval().to(device)
    except OutOfMemory:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: not {kind.name} that can be read (safetensors only): {one_line(error)}"
        ) from None
    missing = sorted(n for n in found["missing_keys"] if not n.startswith(kind.spare))
    if missing:  # transformers would draw them at random
        raise InputError(
            f"{folder}: {len(missing)} tensors are missing, the first: {missing[0]}; is it "
            f"{kind.name}?"
        )
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(
                f"{folder}: tensor {name} holds NaN or Inf; the file is damaged ({kind.key})"
            )
    return tokenizer, model


def one_line(error: Exception) -> str:
    """Returns what a library said, at most 200 characters in one line."""
    return " ".join(str(error).split())[:200]


def check_folder(folder: Path, kind: Kind) -> None:
    """Raises InputError where the folder asks to run code, leads out of itself, or lacks a file.

    This comes before transformers reads any of them: it runs no code here, and reads no
    pickle, but trusts paths. Without tokenizer.json it may make up an empty vocabulary, and
    every result would be wrong.
    """
    for pattern, what in NEEDED.items():
        if not any(folder.glob(pattern)):
            raise InputError(f"{folder}: has no {what} ({kind.key}); {kind.otherwise}")
    read_config(folder)
    check_files(folder)
    tokenizer = folder / "tokenizer.json"
    check_growth(read_json(tokenizer, most=MAX_TOKENIZER_BYTES), tokenizer)
    settings = read_json(folder / TOKENIZER_CONFIG, missing={})
    if "auto_map" in settings:
        raise InputError(
            f"{folder / TOKENIZER_CONFIG}: auto_map asks to run code from the model folder; none "
            "is run"
        )
    for key, value in settings.items():
        # Older transformers open what these name; special_tokens_map_file alone is never read.
        if not key.endswith(("_file", "_files")) or key == "special_tokens_map_file":
            continue
        for name in value if isinstance(value, list) else [value]:
            if name is not None and not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
                raise InputError(
                    f"{folder / TOKENIZER_CONFIG}: {key} {name!r} is no plain file name inside the "
                    "folder; take it out"
                )


def batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Deals rows into batches, longest first; `most` bounds rows x the first one's length."""
    dealt: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if dealt and (len(dealt[-1]) + 1) * sizes[dealt[-1][0]] <= most:
            dealt[-1].append(i)
        else:
            dealt.append([i])
    return dealt
