"""Images as patches of their own pixels: values in place of ids, for an adapter to read.

H, W pixels; R, C rows and columns of patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mm.config import Config
from mm.registry import TOKENIZERS
from mm.specs import Encoded, TokenSpec
from mm.tokenizers.image.tokenizer import as_pixels
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of
from mm.tokenizers.patches import from_patches, to_patches


class ImagePatches(ConfigTokenizer):
    """uint8 images of any shape to uint8 values (R, C, patch * patch * 3), and back.

    Source: Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1; shapes as they are: Dehghani et
    al. 2023 (arXiv:2307.06304), section 2.
    """

    def __init__(self, config: ImagePatchesConfig):
        self.config = config
        side = math.isqrt(config.max_patches)
        self.spec = TokenSpec(
            config.modality,
            0,
            grid=(config.size // config.patch,) * 2 if config.size else (side, side),
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=3 * config.patch**2,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Patches of each image, ``(H, W)`` or ``(H, W, 1, 3 or 4)`` uint8, in reading order.

        Raises:
            UserError: something is no uint8 image.
        """
        return [Encoded(values=self._patches(as_pixels(raw))) for raw in raws]

    def _patches(self, image: torch.Tensor) -> np.ndarray:
        pixels = self._pixels(image).permute(1, 2, 0).numpy()
        return to_patches(pixels, (self.config.patch,) * 2)

    def _pixels(self, image: torch.Tensor) -> torch.Tensor:
        """`(3, H, W)` in [0, 1] to uint8 of whole patches."""
        p = self.config.patch
        height, width = (n * p for n in self._shape(*image.shape[1:]))
        if image.shape[1:] != (height, width):
            image = torch.nn.functional.interpolate(
                image[None], (height, width), mode="bilinear", antialias=True
            )[0]
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches: the image's own, scaled down where they are too many."""
        p, most = self.config.patch, self.config.max_patches
        if self.config.size:
            side = self.config.size // p
            return side, side
        scale = min(1.0, math.sqrt(most * p * p / (height * width)))
        rows = min(most, max(1, round(height * scale / p)))
        return rows, max(1, min(most // rows, round(width * scale / p)))

    def decode(self, codes: Sequence[Encoded]) -> list[np.ndarray]:
        """Images ``(R * patch, C * patch, 3)`` uint8; of no values one grey patch."""
        return [self._image(code.values) for code in codes]

    def _image(self, values: Any) -> np.ndarray:
        p = self.config.patch
        if values is None or np.size(values) == 0:
            return np.full((p, p, 3), 127, np.uint8)
        values = np.asarray(values, np.uint8)
        if values.ndim == 2:
            values = values[:, None]
        return from_patches(values, (p, p), (3,))


@TOKENIZERS.register("image_patches")
class ImagePatchesConfig(Config):
    """Pixels of square patches; nothing is trained."""

    kind: Literal["image_patches"] = "image_patches"
    modality: Annotated[
        str, Field(description="image, or pixels where a tokenizer of image codes is beside it")
    ] = "image"
    patch: Annotated[int, Field(gt=0, le=1024, description="pixels of a patch's side")] = 4
    size: Annotated[
        int | None,
        Field(gt=0, le=2**16, description="side that all images get; default their own shape"),
    ] = None
    max_patches: Annotated[
        int, Field(gt=0, le=2**20, description="of one image; a larger one is scaled down")
    ] = 1024

    def fit(self, images: Iterable[Any] = ()) -> ImagePatches:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> ImagePatches:
        """Make it; its folder holds nothing but this config."""
        return ImagePatches(self)

    @classmethod
    def smallest_tokenizer(cls) -> ImagePatches:
        """An instance for the laws."""
        return cls(max_patches=16).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        rng = np.random.default_rng(0)
        shapes = ((8, 8, 3), (8, 16, 3), (5, 7, 1), (1, 1, 3), (40, 9, 4), (12, 12))
        return [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
