"""Pictures as another model's image processor makes them, in patches, for an adapter to read.

H, W pixels, S of a side; R rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mm.config import Config
from mm.registry import TOKENIZERS
from mm.tokenizers.image.patches import ImagePatches, ImagePatchesConfig
from mm.tokenizers.image.tokenizer import as_pixels
from mm.tokenizers.load import fingerprint_of, write_folder


class ProcessedPatches(ImagePatches):
    """uint8 images of any shape to uint8 values (R, R, patch * patch * 3), and back.

    Eight bits are resized by torchvision, then the middle is cut out: the steps, and the rounding,
    of `transformers`' image processors. Mean and standard deviation of the channels are the
    adapter's (`linear`: ``mean``, ``std``), so that a shard holds bytes.
    """

    def __init__(self, config: ProcessedPatchesConfig):
        super().__init__(
            ImagePatchesConfig(modality=config.modality, patch=config.patch, size=config.size)
        )
        self.processed = config
        self.spec = self.spec._replace(fingerprint=fingerprint_of(config), inline=config.inline)

    def picture(self, raw: Any) -> Tensor:
        """`(3, S, S)` uint8 of an image, rows and columns that fill no patch among them."""
        return self._whole(as_pixels(raw))

    def _pixels(self, image: Tensor) -> Tensor:
        whole = self.processed.size // self.processed.patch * self.processed.patch
        return self._whole(image)[:, :whole, :whole]

    def _whole(self, image: Tensor) -> Tensor:
        c = self.processed
        pixels, (height, width) = (image * 255).round().to(torch.uint8), image.shape[1:]
        shape = (c.size, c.size)
        if c.shorter is not None:
            longer = int(c.shorter * max(height, width) / min(height, width))
            shape = (longer, c.shorter) if width <= height else (c.shorter, longer)
        return _middle(_resize(pixels, shape, c.resample), c.size)

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.processed)


def _resize(pixels: Tensor, shape: tuple[int, int], resample: str) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize_image

    return resize_image(pixels[None], list(shape), InterpolationMode(resample))[0]


def _middle(pixels: Tensor, size: int) -> Tensor:
    """`(3, S, S)`; of an odd rest the smaller half is left out above and on the left."""
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


@TOKENIZERS.register("image_processed")
class ProcessedPatchesConfig(Config):
    """Pixels of square patches of pictures of one size; nothing is trained."""

    kind: Literal["image_processed"] = "image_processed"
    modality: str = "image"
    patch: Annotated[int, Field(gt=0, le=1024, description="pixels of a patch's side")] = 14
    size: Annotated[int, Field(gt=0, le=2**14, description="pixels of a picture's side")] = 224
    shorter: Annotated[
        int | None,
        Field(
            gt=0,
            le=2**14,
            description="what the shorter side becomes before the middle is cut out; default both "
            "sides become `size`",
        ),
    ] = None
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    inline: Annotated[
        bool, Field(description="stands inside the text around it, without a begin and an end")
    ] = False

    @model_validator(mode="after")
    def _fits(self) -> ProcessedPatchesConfig:
        if self.patch > self.size or (self.shorter or self.size) < self.size:
            raise ValueError("size must be at least patch, and at most shorter")
        return self

    def fit(self, images: Iterable[Any] = ()) -> ProcessedPatches:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> ProcessedPatches:
        """Make it; its folder holds nothing but this config."""
        return ProcessedPatches(self)

    @classmethod
    def smallest_tokenizer(cls) -> ProcessedPatches:
        """An instance for the laws."""
        return cls(patch=4, size=10, shorter=12).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        rng = np.random.default_rng(0)
        shapes = ((8, 8, 3), (20, 16, 3), (5, 7, 1), (1, 1, 3), (40, 9, 4), (12, 12))
        return [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
