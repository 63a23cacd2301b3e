"""Image VQ network.

Patches and convolutions down to a small grid, a quantizer, and the mirror image back up.

G items, C colours, H and W pixels, h and w grid cells, D latent, Q codebooks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mm.batch import Batch
from mm.config import Config
from mm.errors import UserError
from mm.model.layer import ModelOut
from mm.registry import NETWORKS, QuantizerField
from mm.tokenizers.network import TokenizerNetwork
from mm.tokenizers.quantizers.base import Quantizer

NONE: Mapping[str, Any] = {}


class Residual(nn.Module):
    """Norm, convolution, SiLU, convolution, added to the input; ``(G, D, h, w)`` to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(self.norm(x))))


class ImageVq(TokenizerNetwork):
    """Images to a grid of codes and back; sides are multiples of the total stride.

    Source: van den Oord et al. 2017, arXiv:1711.00937. The strides are space-to-depth and pixel
    shuffle (Shi et al. 2016, arXiv:1609.05158): on a CPU they cost far less than convolutions at
    full resolution.
    """

    kind = "image_vq"

    def __init__(self, config: ImageVqConfig):
        super().__init__()
        self.config = config
        self.quantizer: Quantizer = config.quantizer.build()
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        c = config.channels
        for stride, width, blocks in zip(config.down, config.widths, config.blocks, strict=True):
            down += [nn.PixelUnshuffle(stride), nn.Conv2d(c * stride**2, width, 3, padding=1)]
            down += [Residual(width) for _ in range(blocks)]
            back = [Residual(width) for _ in range(blocks)]
            up = [
                *back,
                nn.Conv2d(width, c * stride**2, 3, padding=1),
                nn.PixelShuffle(stride),
                *up,
            ]
            c = width
        d = self.quantizer.d
        self.encoder = nn.Sequential(*down, nn.GroupNorm(1, c), nn.Conv2d(c, d, 1))
        self.decoder = nn.Sequential(nn.Conv2d(d, c, 3, padding=1), *up)

    def init_weights(self) -> None:
        """Fill convolutions and norms (the quantizer did its own)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.in_channels * math.prod(module.kernel_size)
                nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Residual):
                # starts as the identity, so that a high rate is stable from the first step
                nn.init.zeros_(module.second.weight)

    def encode(self, image: Tensor) -> Tensor:
        """``(G, 1 or 3, H, W)`` in [0, 1] to ``(G, h, w, D)`` latents, before the quantizer.

        Raises:
            UserError: a side is no multiple of the total stride.
        """
        stride = math.prod(self.config.down)
        if image.shape[-2] % stride or image.shape[-1] % stride:
            raise UserError(
                f"image_vq: images of {image.shape[-2]}x{image.shape[-1]} do not divide into cells "
                f"of {stride}; set the stream's size to a multiple of {stride}"
            )
        return self.encoder(2 * colours(image, self.config.channels) - 1).permute(0, 2, 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        """``(G, h, w, D)`` quantised latents to ``(G, C, H, W)``; about [0, 1], not clamped."""
        return (self.decoder(z.permute(0, 3, 1, 2)) + 1) / 2

    def forward(
        self,
        batch: Batch,
        *,
        scheduled: Mapping[str, float] = NONE,
        return_intermediates: frozenset[str] = frozenset(),
        seed: Tensor | int = 0,
        **_: Any,
    ) -> ModelOut:
        """Reconstruct ``batch.values["image"]``, data ``(G, 1 or 3, H, W)`` float in [0, 1].

        An item of length 0 is the zero item of a rank without images: it runs, and counts nowhere.
        Knob "bypass" 1 skips the quantizer (warm-up).

        Returns:
            hidden: (G, h, w, D) latents. intermediates: "image" (G, C, H, W), C the network's
            colours; "ids"
                (G, h, w, Q)
            int64. aux: the quantizer's.
        """
        values = batch.values[self.config.modality]
        z = self.encode(values.data)
        valid = (values.length > 0)[:, None, None].expand(z.shape[:-1])
        out = self.quantizer(z, valid=valid, bypass=bool(scheduled.get("bypass", 0)), seed=seed)
        return ModelOut(z, {}, None, {"image": self.decode(out.z), "ids": out.ids}, out.aux)


def colours(image: Tensor, channels: int) -> Tensor:
    """``(G, 1 or 3, H, W)`` as gray or RGB: the mean of the colours, or three equal ones."""
    if image.shape[1] == channels:
        return image
    return (
        image.mean(1, keepdim=True) if channels == 1 else image[:, :1].expand(-1, channels, -1, -1)
    )


@NETWORKS.register("image_vq")
class ImageVqConfig(Config):
    """Convolutional image tokenizer.

    A ``size`` of 32 and strides 4, 2 give a grid of 4 x 4 tokens.
    """

    kind: Literal["image_vq"] = "image_vq"
    modality: str = "image"
    size: Annotated[int, Field(gt=0, description="side in pixels of what is encoded")] = 32
    channels: Annotated[Literal[1, 3], Field(description="1: gray, 3: RGB")] = 3
    down: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="strides")
    ] = (4, 2)
    widths: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...], Field(description="of each level")
    ] = (32, 64)
    blocks: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="residual blocks of each level, each way"),
    ] = (0, 2)
    quantizer: QuantizerField = Field(default="fsq", validate_default=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.down) == len(self.widths) == len(self.blocks):
            raise ValueError(
                "down, widths and blocks name the same levels, but have "
                f"{len(self.down)}, {len(self.widths)} and {len(self.blocks)} entries"
            )
        stride = math.prod(self.down)
        if self.size % stride:
            raise ValueError(f"size {self.size} is no multiple of the total stride {stride}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.size // math.prod(self.down)
        return side, side

    def build(self, vocabulary: Any = None) -> ImageVq:
        """Allocate the network; `mm.model.layer.init_weights` fills it."""
        return ImageVq(self)

    @classmethod
    def smallest(cls) -> ImageVqConfig:
        return cls(
            size=8,
            down=(2, 2),
            widths=(8, 8),
            blocks=(0, 1),
            quantizer={"kind": "fsq", "levels": (4, 3)},
        )
