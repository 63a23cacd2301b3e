"""Images to grids of ids and back, by a trained `ImageVqgan` network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from mm.model.layer import init_weights
from mm.registry import TOKENIZERS
from mm.tokenizers.image.tokenizer import ImageVqTokenizer, ImageVqTokenizerConfig
from mm.tokenizers.image.vqgan import ImageVqgan, ImageVqganConfig


@TOKENIZERS.register("image_vqgan")
class ImageVqganTokenizerConfig(ImageVqTokenizerConfig):
    """A trained `image_vqgan` network as a tokenizer."""

    kind: Literal["image_vqgan"] = "image_vqgan"  # type: ignore[assignment]

    def build(self, folder: str | Path) -> ImageVqTokenizer:
        """Load the network of a tokenizer folder.

        Raises UserError when its files are missing or do not fit.
        """
        return ImageVqTokenizer(self, ImageVqgan.from_pretrained(folder))

    @classmethod
    def smallest_tokenizer(cls) -> ImageVqTokenizer:
        """An untrained instance for the laws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = ImageVqganConfig.smallest().build()
            init_weights(net)
        return ImageVqTokenizer(cls(), net)
