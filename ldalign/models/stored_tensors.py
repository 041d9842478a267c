"""Tensors in safetensors files: names and shapes from the headers, bytes in bounded pieces."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldalign.system.errors import InputError
from ldalign.system.untrusted import (
    LFS_POINTER,
    MAX_JSON_BYTES,
    parse_json,
    read_json,
    refuse_lfs_pointer,
    refuse_link_out,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ_BYTES = 4 * 2**20  # tensors are read, cast and checked in pieces of this size
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


# What a header may raise whose entries are of other types than they should be.
MALFORMED = (SafetensorError, OSError, TypeError, LookupError, AttributeError, ValueError)


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, as the file's header describes it."""

    path: Path
    name: str
    dtype: str  # safetensors' name, F32 for float32
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    pitch: int = 0  # bytes from one row to the next, where not all columns are wanted; 0: row_bytes

    def rows(self, start: int, stop: int) -> "Stored":
        """Returns rows [start, stop) of it."""
        offset = self.offset + start * self.row_bytes
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)

    def columns(self, start: int, stop: int) -> "Stored":
        """Returns columns [start, stop) of a whole matrix."""
        if (start, stop) == (0, self.shape[1]):
            return self
        offset = self.offset + start * FLOATS[self.dtype].itemsize
        shape = (self.shape[0], stop - start)
        return replace(self, shape=shape, offset=offset, pitch=self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """The bytes of one step along the first axis."""
        return max(1, math.prod(self.shape[1:]) * FLOATS[self.dtype].itemsize)

    @property
    def where(self) -> str:
        """The file and the tensor, as errors name them."""
        return f"{self.path}: tensor {self.name}"


def read_config(folder: str | Path) -> dict[str, Any]:
    """Returns the parsed config.json of a model folder.

    Raises InputError when it is missing, broken or asks to run code.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{path}: not found; a model folder needs a config.json (Hugging Face layout)"
        )
    raw = read_json(path)
    if "auto_map" in raw:
        raise InputError(
            f"{path}: auto_map asks to run code from the model folder; ldalign runs none"
        )
    return raw


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Returns all tensors of a model folder by name, from the headers of its files alone.

    Raises InputError: no safetensors, a shard missing, damaged, a Git LFS pointer or outside the
    folder, one tensor in two shards, an index that has it in another shard or not at all, an
    adapter beside the weights.
    """
    files, weight_map = _weight_files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        path = folder / file
        if weight_map is not None and not path.exists():
            raise InputError(
                f"{path}: shard not found, but {INDEX} names it; download the model again"
            )
        for name, stored in read_header(path).items():
            if name in tensors:
                raise InputError(
                    f"{stored.where} is in {tensors[name].path.name} too; one of the shards is "
                    "stale"
                )
            tensors[name] = stored
    held = {name: stored.path.name for name, stored in tensors.items()}
    # A name in the index that no shard holds is no matter here: if the network needs it, it is
    # missed by name; files that were once saved with buffers still list these.
    odd = [] if weight_map is None else sorted(n for n in held if held[n] != weight_map.get(n))
    if odd:
        raise InputError(
            f"{folder / INDEX}: disagrees with the shards about {first_few(odd)}; download the "
            "model again"
        )
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the files that hold a folder's weights, whether or not they are there.

    Those of its index; without an index the one file. Raises InputError for an index that names
    what is no plain file of the folder.
    """
    if not (folder / INDEX).is_file():
        return [SINGLE]
    return sorted(set(_read_index(folder).values()))


def _read_index(folder: Path) -> dict[str, str]:
    """The index's {tensor name: file name}, its file names checked."""
    index = folder / INDEX
    refuse_link_out(index, folder)
    weight_map = read_json(index).get("weight_map")
    names_files = isinstance(weight_map, dict) and all(
        isinstance(file, str) for file in weight_map.values()
    )
    if not names_files or not weight_map:
        raise InputError(
            f"{index}: no weight_map from tensor names to file names; download the file again"
        )
    for file in sorted(set(weight_map.values())):
        # 255 bytes are what file systems allow.
        if not re.fullmatch(r"[\w.-]+\.safetensors", file) or len(file.encode()) > 255:
            raise InputError(
                f"{index}: shard {file[:80]!r} is not a plain safetensors file name inside the "
                "folder"
            )
    return dict(weight_map)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The names of the files with the weights, and the index's {tensor name: file name}.

    Where the weights are one file there is no index: None.
    """
    single, index = (folder / SINGLE).is_file(), folder / INDEX
    _refuse_adapter(folder)
    if not index.is_file():
        if single:
            return [SINGLE], None
        patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt")
        pickles = sorted(p.name for pattern in patterns for p in folder.glob(pattern))
        found = "no weights"
        if pickles:
            found = f"only pickles ({first_few(pickles, 3)}), which can run code"
        raise InputError(f"{folder}: {found}; ldalign reads {SINGLE} or shards with {INDEX}")
    weight_map = _read_index(folder)
    files = sorted(set(weight_map.values()))
    if single and SINGLE not in files:
        raise InputError(
            f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is out of date"
        )
    return files, weight_map


def _refuse_adapter(folder: Path) -> None:
    """Raises InputError for an adapter (LoRA and its like), which would be passed over."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise InputError(
                f"{folder / name}: is an adapter to the weights, which is not applied here; merge "
                "it into them (peft's merge_and_unload, then save_pretrained), or remove it"
            )


def read_header(path: Path) -> dict[str, Stored]:
    """Returns the tensors of one safetensors file.

    Raises InputError where the header or the file's size is wrong.
    """
    refuse_link_out(path, path.parent)
    if not path.is_file():
        raise InputError(f"{path}: not found; download the model again")
    size = path.stat().st_size
    with path.open("rb") as file:
        refuse_lfs_pointer(file.read(len(LFS_POINTER)), path)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
            raise InputError(
                f"{path}: not a whole safetensors file: its header should take {length} bytes, the "
                f"file has {size}; download it again"
            )
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    try:
        begin = 8 + length  # of the data; offsets in the header count from here
        expected = begin + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != expected:
            raise InputError(f"{path}: {expected} bytes expected, {size} found; download it again")
        # The library's own check: gaps, overlaps, sizes against shapes.
        with safe_open(path, framework="pt"):
            pass
        tensors = {}
        for name, entry in header.items():
            offset = begin + entry["data_offsets"][0]
            tensors[name] = Stored(path, name, entry["dtype"], tuple(entry["shape"]), offset)
        return tensors
    except InputError:
        raise
    except MALFORMED as broken:
        raise InputError(
            f"{path}: broken safetensors header ({broken!r}); download it again"
        ) from None


def fill(target: Tensor, stored: Stored, buffer: Tensor) -> None:
    """Reads a tensor into `target`, of its shape; of any dtype, strides and device.

    buffer: of `new_buffer`. Raises InputError for NaN and Inf.
    """
    for start, piece in _pieces(stored, buffer):
        part = target[start : start + len(piece)]
        part.copy_(piece)
        if not finite(part):
            kind = DTYPE_NAMES[part.dtype]
            raise InputError(
                f"{stored.where} holds NaN or Inf as {kind}; the file is damaged or the dtype too "
                "narrow"
            )


def finite(tensor: Tensor) -> bool:
    """Says whether no value is NaN or infinite."""
    # A finite sum proves finite terms at a fifth of the cost of asking each; an infinite one may
    # be mere overflow, so then each is asked.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def same(a: Stored, b: Stored) -> bool:
    """Says whether two stored tensors are equal, bit by bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs = zip(_pieces(a, new_buffer(a)), _pieces(b, new_buffer(b)), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for (_, x), (_, y) in pairs)


def new_buffer(*tensors: Stored) -> Tensor:
    """Returns a buffer (bytes,) uint8 through which these tensors can be read."""
    # One for all tensors: buffers made and freed between the weights would leave holes in the
    # heap, in all as large as half a model.
    return torch.empty(max(READ_BYTES, *(t.row_bytes for t in tensors)), dtype=torch.uint8)


def _pieces(stored: Stored, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(index of the first row, some rows) of a stored tensor, from front to back.

    Each piece overwrites the last one in `buffer`.
    """
    dtype, rest = FLOATS[stored.dtype], stored.shape[1:]
    rows = len(buffer) // stored.row_bytes
    with stored.path.open("rb", buffering=0) as file:
        for start in range(0, stored.shape[0], rows):
            part = buffer[: min(rows, stored.shape[0] - start) * stored.row_bytes]
            # Whole rows lie end to end and are read at once; of cut ones each by itself.
            lines = part.view(-1, stored.row_bytes) if stored.pitch else [part]
            for i, line in enumerate(lines):
                file.seek(stored.offset + (start + i) * (stored.pitch or stored.row_bytes))
                _read(file, line, stored)
            yield start, part.view(dtype).view(-1, *rest)


def _read(file: FileIO, target: Tensor, stored: Stored) -> None:
    """Fills `target` (n,) uint8 from where the file stands."""
    read = 0
    # One call of the system gives 2 GB at most, and may give less than asked for.
    while read < len(target):
        got = file.readinto(target[read:].numpy().data)
        if not got:
            raise InputError(
                f"{stored.where}: the file ends inside it; it was changed while being read"
            )
        read += got


def first_few(names: list[str], most: int = 5) -> str:
    """Returns the names in one line, `most` of them, and how many more there are."""
    rest = f", ... {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
