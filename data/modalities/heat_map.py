"""Numbers as colours: a picture of what is none."""

from __future__ import annotations

import io

import numpy as np

MAX_SIDE = 512  # pixels
# Anchors of the "magma" colour map (perceptually even, dark to light).
MAGMA = np.array(
    [
        [0, 0, 4],
        [28, 16, 68],
        [79, 18, 123],
        [129, 37, 129],
        [181, 54, 122],
        [229, 80, 100],
        [251, 135, 97],
        [254, 194, 135],
        [252, 253, 191],
    ]
)


def magma(level: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of levels from 0 to 1."""
    place = level * (len(MAGMA) - 1)
    below = np.minimum(place.astype(int), len(MAGMA) - 2)
    share = (place - below)[..., None]
    return (MAGMA[below] * (1 - share) + MAGMA[below + 1] * share).astype(np.uint8)


def heat_map(values: np.ndarray) -> bytes:
    """PNG of ``values`` (H, W): a pixel an element, the least dark; of large ones every n-th."""
    from PIL import Image

    x = values[tuple(slice(None, None, -(-n // MAX_SIDE)) for n in values.shape)].astype(np.float64)
    low, high = x.min(), x.max()
    out = io.BytesIO()
    Image.fromarray(magma((x - low) / max(high - low, 1e-30))).save(out, "PNG")
    return out.getvalue()
