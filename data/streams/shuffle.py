"""Counter-based permutations and random numbers: pure functions of (seed, counter).

A sample's position in an epoch, its crop and its augmentation depend on its number alone, never on
how many ranks, threads or restarts there were. Seeking is O(1).
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np

_ROUNDS = 4
U64 = np.uint64
_GOLDEN = U64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd


def key_of(*parts: object) -> int:
    """A 64-bit key from any printable parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers; a bijection. Source: Steele et al. 2014, SplitMix64 finalizer."""
    with np.errstate(over="ignore"):
        return _scramble(x)


def _scramble(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def fold_seed(*parts: int) -> int:
    """Hash integers to one seed of 62 bits: SplitMix64's finalizer over their running sum.

    Called for every micro-batch: Python's integers are 40 times faster here than arrays of one.
    """
    state, mask = 0, 0xFFFFFFFFFFFFFFFF
    for part in parts:
        x = (state + 0x9E3779B97F4A7C15 + (part & mask)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        state = x ^ (x >> 31)
    return state >> 2


def uniform(key: int, counters: np.ndarray, draw: int = 0) -> np.ndarray:
    """Draw one float64 in [0, 1) for each counter.

    ``draw`` numbers independent values of the same counter.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(counters).astype(U64) * _GOLDEN + splitmix64(np.array([key], U64))
        x = splitmix64(splitmix64(x) + U64(draw + 1) * U64(0xD1B54A32D192ED03))
    return (x >> U64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Permute range(n) without storing it: the images of ``index`` under permutation ``key``.

    ``index`` has any shape and holds integers in [0, n).

    A four-round Feistel network on the smallest even-bit domain that holds n; values outside [0, n)
    walk on until they fall inside, which keeps it a bijection. Source: Black & Rogaway 2002, cycle
    walking.
    """
    if n <= 1:
        return np.zeros_like(np.asarray(index, np.int64))
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low, shift = U64((1 << half) - 1), U64(half)
    keys = splitmix64(U64(key) + np.arange(1, _ROUNDS + 1, dtype=U64) * _GOLDEN)
    x = np.asarray(index).astype(U64)
    inside = np.zeros(x.shape, bool)
    while not inside.all():
        left, right = x >> shift, x & low
        for k in keys:
            left, right = right, left ^ (splitmix64(right + k) & low)
        x = np.where(inside, x, (left << shift) | right)
        inside = x < U64(n)
    return x.astype(np.int64)


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy Generator of its own for these parts (seed, source, epoch, index, ...)."""
    return np.random.Generator(np.random.Philox(key=key_of(*parts)))


class Reseeded(threading.local):
    """`generator` without making one: the draws are the same, an eighth of the time is spent.

    A new generator asks the system for entropy, which its key then replaces. Each thread has one,
    set anew by every call, so what it gave before must not be drawn from again.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._state: Any = self._bits.state  # as a new one's, but for the key

    def __call__(self, *parts: int | str) -> np.random.Generator:
        self._state["state"]["key"][0] = key_of(*parts)
        self._bits.state = self._state
        return self._generator
