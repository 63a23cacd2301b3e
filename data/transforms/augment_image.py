"""Pictures of values in other places: mirrored and shifted, as a sample is read.

R rows and C columns of patches, p pixels of a patch's side.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform

COLOURS = 3


@TRANSFORMS.register("augment_image")
class AugmentImageConfig(Config):
    """Mirror and shift the pictures of a continuous modality, whose patches hold their pixels."""

    kind: Literal["augment_image"] = "augment_image"
    modality: Annotated[str, Field(description="made by a tokenizer image_patches")] = "image"
    mirror: Annotated[
        float, Field(ge=0, le=1, description="share of pictures with left and right exchanged")
    ] = 0.5
    shift: Annotated[
        int,
        Field(ge=0, le=4096, description="most pixels up, down and to the sides; edges repeat"),
    ] = 4

    def build(self) -> AugmentImage:
        return AugmentImage(self.modality, self.mirror, self.shift)


class AugmentImage(Transform):
    """See `AugmentImageConfig`. What it draws does not depend on the pixels."""

    by_length = True

    def __init__(self, modality: str, mirror: float, shift: int):
        self.modality, self.mirror, self.shift = modality, mirror, shift

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        return [self._moved(s, rng) if s.modality == self.modality else s for s in segments]

    def _moved(self, s: Segment, rng: Any) -> Segment:
        flips = rng.random() < self.mirror
        down, right = rng.integers(-self.shift, self.shift + 1, 2)
        if s.values is None:  # its length alone is asked for
            return s
        rows, columns = s.grid if len(s.grid) == 2 else (1, len(s.values))
        p = round((s.values.shape[1] / COLOURS) ** 0.5)
        parts = s.values.reshape(rows, columns, p, p, COLOURS)
        pixels = parts.transpose(0, 2, 1, 3, 4).reshape(rows * p, columns * p, COLOURS)
        if flips:
            pixels = pixels[:, ::-1]
        y = np.clip(np.arange(rows * p) + down, 0, rows * p - 1)
        x = np.clip(np.arange(columns * p) + right, 0, columns * p - 1)
        parts = pixels[y][:, x].reshape(rows, p, columns, p, COLOURS).transpose(0, 2, 1, 3, 4)
        return s._replace(values=np.ascontiguousarray(parts.reshape(s.values.shape)))
