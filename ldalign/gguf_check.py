"""Is a file whole GGUF? Asked before the gguf package reads it, which believes every count and
length it finds.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic, version,
number of tensors, number of key/value pairs; the pairs (key, type, value); for each tensor name,
dimensions, type, offset; then, aligned, the tensors' data. Every count here is held against the
bytes that are left in the file.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from ldalign.system.errors import InputError

# value type -> bytes
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


def check_gguf(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raises InputError naming the file and the byte where it is not whole, well-formed GGUF of
    version 2 or 3.

    block_sizes: tensor type -> (elements a block, bytes a block), as the gguf package lists them.
    """
    with path.open("rb") as file:
        scan = _Scan(path, file)
        magic, version = scan.take(4), scan.number("<I")
        if magic != b"GGUF" or version not in (2, 3):
            raise scan.broken("not a GGUF file of version 2 or 3")
        tensors, pairs = scan.count("<Q", least=24), scan.count("<Q", least=13)
        for _ in range(pairs):
            scan.text()
            scan.value(scan.number("<I"))
        ends = [0]
        for _ in range(tensors):
            scan.text()
            dimensions = [scan.number("<Q") for _ in range(scan.number("<I", most=MAX_DIMENSIONS))]
            kind, offset = scan.number("<I"), scan.number("<Q")
            if kind not in block_sizes:
                raise scan.broken(f"tensor type {kind} is not known")
            elements, size = block_sizes[kind]
            ends.append(offset + math.prod(dimensions) // elements * size)
        if scan.file.tell() + max(ends) > scan.size:
            raise scan.broken(
                f"the tensors end at byte {scan.file.tell() + max(ends)} or later, the file has "
                f"{scan.size}"
            )


class _Scan:
    """Where the reading stands in the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def broken(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: byte {self.file.tell()}: broken GGUF: {what}; download the file again"
        )

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.broken(f"{count} bytes should follow, {self.size - self.file.tell()} do")
        return self.file.read(count)

    def number(self, form: str, most: int = 2**64) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if value > most:
            raise self.broken(f"{value} is more than {most}")
        return value

    def count(self, form: str, least: int) -> int:
        """A number of things that each take `least` bytes or more."""
        value = self.number(form)
        if value * least > self.size - self.file.tell():
            raise self.broken(
                f"{value} entries cannot be in the {self.size - self.file.tell()} bytes that follow"
            )
        return value

    def text(self) -> None:
        self.take(self.number("<Q"))

    def value(self, kind: int) -> None:
        if kind in SCALARS:
            self.take(SCALARS[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner = self.number("<I")
            # the gguf package reads no arrays of arrays rightly
            if inner not in SCALARS and inner != STRING:
                raise self.broken(f"array of type {inner}")
            length = self.count("<Q", least=SCALARS.get(inner, 8))
            for _ in range(length if inner == STRING else 0):
                self.text()
            self.take(SCALARS.get(inner, 0) * length)
        else:
            raise self.broken(f"value type {kind} is not known")
