"""Random numbers as a function of what they are for: a seed and a key (stage, iteration, row), not
of rank or time.
"""

import hashlib

import numpy as np


def _stream(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\x00{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """count float64 numbers in [0, 1): the beginning of the stream of (seed, key), Philox (Salmon
    et al. 2011).
    """
    return _stream(seed, key).random(count)


def permutation(seed: int, key: str, count: int) -> np.ndarray:
    """(count,) int64: a random order of count things."""
    return _stream(seed, key).permutation(count)
