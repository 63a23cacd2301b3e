"""Pictures of values otherwise each time that they are read: moved, recoloured, in part hidden.

R rows and C columns of patches, p pixels of a patch's side.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import TRANSFORMS
from mm.specs import Segment, Transform

COLOURS = 3


@TRANSFORMS.register("augment_image")
class AugmentImageConfig(Config):
    """Change the pictures of a continuous modality, whose patches hold their pixels.

    In this order: mirrored, a part shown larger, moved, lighter or darker, with more or less
    contrast and colour, a square hidden.

    Source of the square: DeVries and Taylor 2017, Cutout (arXiv:1708.04552), section 3.2; of the
    part shown larger: Szegedy et al. 2014 (arXiv:1409.4842), section 6, of an unchanged shape here.
    """

    kind: Literal["augment_image"] = "augment_image"
    modality: Annotated[str, Field(description="made by a tokenizer image_patches")] = "image"
    mirror: Annotated[
        float, Field(ge=0, le=1, description="share of pictures with left and right exchanged")
    ] = 0.5
    shift: Annotated[
        int,
        Field(ge=0, le=4096, description="most pixels up, down and to the sides; edges repeat"),
    ] = 4
    zoom: Annotated[
        float,
        Field(ge=0, lt=1, description="a part is shown, of a side smaller by up to this share"),
    ] = 0.0
    colour: Annotated[
        float,
        Field(ge=0, le=1, description="light, contrast and saturation change by up to this share"),
    ] = 0.0
    erase: Annotated[
        float, Field(ge=0, le=1, description="side of the square that is hidden, of the picture's")
    ] = 0.0

    def build(self) -> AugmentImage:
        return AugmentImage(self)


class AugmentImage(Transform):
    """See `AugmentImageConfig`. What it draws does not depend on the pixels."""

    by_length = True

    def __init__(self, config: AugmentImageConfig):
        self.config = config

    def __call__(self, segments: list[Segment], rng: Any) -> list[Segment] | None:
        wanted = self.config.modality
        return [self._changed(s, rng) if s.modality == wanted else s for s in segments]

    def _changed(self, s: Segment, rng: Any) -> Segment:
        c = self.config
        flips = rng.random() < c.mirror
        down, right = rng.integers(-c.shift, c.shift + 1, 2)
        # Drawn where they are asked for, so that a run without them has the order that it had.
        part = rng.random(3) if c.zoom else np.zeros(3)
        factors = 1 + c.colour * rng.uniform(-1, 1, 3) if c.colour else np.ones(3)
        hidden = rng.random(2) if c.erase else np.zeros(2)
        if s.values is None:  # its length alone is asked for
            return s
        rows, columns = s.grid if len(s.grid) == 2 else (1, len(s.values))
        p = round((s.values.shape[1] / COLOURS) ** 0.5)
        parts = s.values.reshape(rows, columns, p, p, COLOURS)
        pixels = parts.transpose(0, 2, 1, 3, 4).reshape(rows * p, columns * p, COLOURS)
        if flips:
            pixels = pixels[:, ::-1]
        if c.colour and s.values.dtype != np.uint8:
            raise UserError(
                f"augment_image: colour of '{c.modality}' cannot be changed, its values are no "
                "bytes; use a tokenizer image_patches, or colour: 0"
            )
        if c.zoom:
            pixels = part_of(pixels, 1 - c.zoom * part[0], part[1:])
        y = np.clip(np.arange(rows * p) + down, 0, rows * p - 1)
        x = np.clip(np.arange(columns * p) + right, 0, columns * p - 1)
        pixels = pixels[y][:, x]
        if c.colour:
            pixels = recolour(pixels, *factors)
        if c.erase:
            pixels = hide_square(pixels, c.erase, hidden)
        parts = pixels.reshape(rows, p, columns, p, COLOURS).transpose(0, 2, 1, 3, 4)
        if s.values.dtype == np.uint8 and parts.dtype != np.uint8:
            parts = parts.round()  # between bytes, so within them
        values = np.ascontiguousarray(parts.reshape(s.values.shape), s.values.dtype)
        return s._replace(values=values)


def part_of(pixels: np.ndarray, side: float, corner: np.ndarray) -> np.ndarray:
    """The part `(side H, side W)` of a picture `(H, W, C)`, as large as the picture, bilinear.

    ``corner`` in [0, 1): where it begins, of what is free above and to the left.
    """
    for axis, begin in enumerate(corner):
        n = pixels.shape[axis]
        at = (begin * (1 - side) + (np.arange(n) + 0.5) / n * side) * n - 0.5
        low = np.clip(np.floor(at), 0, n - 1).astype(int)
        high = np.minimum(low + 1, n - 1)
        share = np.clip(at - low, 0, 1).reshape(-1, *[1] * (2 - axis))
        pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
    return pixels


def recolour(pixels: np.ndarray, light: float, contrast: float, saturation: float) -> np.ndarray:
    """A picture `(H, W, 3)` of values from 0 (black) to 255, which they stay within.

    Light is a factor of all, contrast of the distance from the picture's mean, saturation from
    each pixel's own grey.
    """
    pixels = pixels * light
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    grey = pixels.mean(-1, keepdims=True)
    return np.clip((pixels - grey) * saturation + grey, 0, 255)


def hide_square(pixels: np.ndarray, side: float, centre: np.ndarray) -> np.ndarray:
    """A picture `(H, W, C)` with its mean colour in a square, whose centre may lie at the edge."""
    n_rows, n_columns = pixels.shape[:2]
    half = side * min(n_rows, n_columns) / 2
    rows = np.abs(np.arange(n_rows) + 0.5 - centre[0] * n_rows) < half
    columns = np.abs(np.arange(n_columns) + 0.5 - centre[1] * n_columns) < half
    hidden = (rows[:, None] & columns)[..., None]
    return np.where(hidden, pixels.mean((0, 1)), pixels)
