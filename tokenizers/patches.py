"""Patches of arrays: what tokenizers of pictures, videos, series and float arrays share.

n cells of p elements along each of k axes; C channels, the product of the axes behind those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FLAT = 1e-4  # spread, relative to the size of the numbers, below which they count as equal


def to_patches(x: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """``x`` (n_1 * p_1, .., n_k * p_k, ...) to (n_1, .., n_k, p_1 * .. * p_k * C), contiguous."""
    k = len(patch)
    cells = [n // p for n, p in zip(x.shape, patch, strict=False)]
    split = [m for pair in zip(cells, patch, strict=True) for m in pair]
    order = (*range(0, 2 * k, 2), *range(1, 2 * k, 2), *range(2 * k, x.ndim + k))
    return np.ascontiguousarray(x.reshape(*split, *x.shape[k:]).transpose(order)).reshape(
        *cells, -1
    )


def from_patches(
    values: np.ndarray, patch: Sequence[int], channels: tuple[int, ...] = ()
) -> np.ndarray:
    """What `to_patches` was given: (n_1 * p_1, .., n_k * p_k, *channels), contiguous."""
    k = len(patch)
    cells = values.shape[:k]
    order = [axis for i in range(k) for axis in (i, k + i)]
    x = values.reshape(*cells, *patch, *channels)
    x = x.transpose(*order, *range(2 * k, 2 * k + len(channels)))
    sides = (n * p for n, p in zip(cells, patch, strict=True))
    return np.ascontiguousarray(x).reshape(*sides, *channels)


def scale_of(loc: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Standard deviations (C,) to divide by; of what is flat the size of its mean, 1 at least."""
    flat = std <= FLAT * np.maximum(np.abs(loc), 1e-30)
    return np.where(flat, np.maximum(np.abs(loc), 1.0), std)
