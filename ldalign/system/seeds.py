"""Random numbers as a function of what they are for, a seed and a key, and not of rank or time.

A key names stage, iteration and row. The generator is Philox (Salmon et al. 2011).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """Draws `count` float64 numbers in [0, 1): the beginning of the stream of (seed, key)."""
    return _stream(seed, key).random(count)


def normals(seed: int, key: str, *shape: int) -> torch.Tensor:
    """Draws normal numbers of mean 0 and deviation 1: `shape` float32, the stream of (seed, key).

    Each tensor that is drawn for a model has a key of its own: of two that shared a stream, one
    would be the beginning of the other.
    """
    import torch  # which processes that only read rows do without

    return torch.from_numpy(_stream(seed, key).standard_normal(shape, dtype=np.float32))


def permutation(seed: int, key: str, count: int) -> np.ndarray:
    """Draws a random order of `count` things: (count,) int64."""
    return _stream(seed, key).permutation(count)


def _stream(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\x00{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
