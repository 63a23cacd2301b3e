"""Images to grids of ids and back, by a trained `ImageVq` network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import TOKENIZERS
from mm.specs import Encoded, ModalityTokenizer, TokenSpec
from mm.tokenizers.image.vq import ImageVq, ImageVqConfig
from mm.tokenizers.image.vqgan import ImageVqgan
from mm.tokenizers.load import load_tokenizer

# Every pass has exactly this many images: kernels choose their order of summation by shape, and a
# last-bit difference next to a decision boundary would make a batch and a loop disagree.
CHUNK = 16


class ImageVqTokenizer(ModalityTokenizer):
    """uint8 images of any size to ``h * w`` ids in reading order, and back.

    Decoding gives ``(size, size, 3)`` uint8.
    """

    def __init__(self, config: ImageVqTokenizerConfig, net: ImageVq | ImageVqgan):
        self.config, self.net = config, net.eval()
        quantizer = net.quantizer
        self.spec = TokenSpec(
            config.modality,
            quantizer.codebook_size,
            quantizer.n_codebooks,
            grid=net.config.grid,
            fingerprint=net.fingerprint(config),
        )

    @torch.no_grad()
    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Ids of each image, ``(H, W)`` or ``(H, W, 1, 3 or 4)`` uint8.

        Short side resized to ``size``, middle kept.

        Raises:
            UserError: something is no uint8 image.
        """
        Q, K = self.spec.n_codebooks, self.spec.vocab_size
        out: list[Encoded] = []
        for some in _chunks(raws):
            images = torch.stack([fit(raw, self.net.config.size) for raw in some])
            ids = self.net.quantizer(self.net.encode(self._padded(images))).ids[: len(some)]
            flat = ids.cpu() + torch.arange(Q) * K
            out += [Encoded(row) for row in flat.reshape(len(some), -1).to(torch.int32).numpy()]
        return out

    @torch.no_grad()
    def decode(self, codes: Sequence[Encoded]) -> list[np.ndarray]:
        """Images ``(size, size, 3)`` uint8.

        Missing ids are filled with code 0, surplus ones are dropped.
        """
        h, w = self.net.config.grid
        Q, K = self.spec.n_codebooks, self.spec.vocab_size
        out: list[np.ndarray] = []
        for some in _chunks(codes):
            ids = np.zeros((len(some), h * w * Q), np.int64)
            for row, code in zip(ids, some, strict=True):
                given = np.asarray(code.ids, np.int64).reshape(-1)[: h * w * Q]
                # an id of another book means its code: a generated frame may come in disorder
                row[: len(given)] = given % K
            padded = self._padded(torch.from_numpy(ids))
            image = self.net.decode(self.net.quantizer.decode(padded.view(-1, h, w, Q)))[
                : len(some)
            ]
            pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
            out += list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        return out

    def code_vectors(self) -> np.ndarray:
        return self.net.quantizer.code_vectors().detach().float().cpu().numpy()

    def save(self, folder: str | Path) -> None:
        self.net.save_pretrained(folder, card=self.config)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)

    def _padded(self, x: Tensor) -> Tensor:
        """``(n, ...)`` to ``(CHUNK, ...)`` on the network's device."""
        rest = x.new_zeros(CHUNK - len(x), *x.shape[1:])
        return torch.cat([x, rest]).to(next(self.net.parameters()).device)


def as_pixels(raw: Any) -> Tensor:
    """A uint8 image as ``(3, H, W)`` float32 in [0, 1], alpha over white.

    Raises:
        UserError: no uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
    """
    x = np.asarray(raw)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or x.dtype != np.uint8 or 0 in x.shape:
        raise UserError(f"image tokenizer: expected uint8 (H, W, 3), got {x.dtype} {np.shape(raw)}")
    image = torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255
    if len(image) == 4:
        image = image[:3] * image[3:] + (1 - image[3:])
    return image.expand(3, -1, -1)


def fit(raw: Any, size: int) -> Tensor:
    """A uint8 image as ``(3, size, size)`` float32 in [0, 1].

    Alpha over white, short side resized, middle kept.

    Raises:
        UserError: no uint8 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
    """
    image = as_pixels(raw)
    if image.shape[1:] != (size, size):
        h, w = image.shape[1:]
        scale = size / min(h, w)
        to = (max(size, round(h * scale)), max(size, round(w * scale)))
        small = torch.nn.functional.interpolate(
            image[None], size=to, mode="bilinear", antialias=True, align_corners=False
        )[0]
        top, left = (to[0] - size) // 2, (to[1] - size) // 2
        image = small[:, top : top + size, left : left + size]
    return image.contiguous()


def _chunks(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]


@TOKENIZERS.register("image_vq")
class ImageVqTokenizerConfig(Config):
    """A trained `image_vq` network as a tokenizer.

    Its settings are in the network's own config.json.
    """

    kind: Literal["image_vq"] = "image_vq"
    modality: str = "image"

    def build(self, folder: str | Path) -> ImageVqTokenizer:
        """Load the network of a tokenizer folder.

        Raises UserError when its files are missing or do not fit.
        """
        return ImageVqTokenizer(self, ImageVq.from_pretrained(folder))

    @classmethod
    def smallest_tokenizer(cls) -> ImageVqTokenizer:
        """An untrained instance for the laws."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = ImageVqConfig.smallest().build()
            init_weights(net)
        return ImageVqTokenizer(cls(), net)

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws: several sizes, gray, alpha, noise and flat."""
        rng = np.random.default_rng(0)
        shapes = [(8, 8, 3), (8, 8, 1), (8, 8), (16, 12, 3), (9, 40, 4), (1, 1, 3)]
        images = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        return [*images, np.full((8, 8, 3), 255, np.uint8)]
