"""VQGAN: residual convolutions and attention down to a grid of codes, and the mirror image back.

G items, C colours, H and W pixels, h and w grid cells, D latent, Q codebooks.
"""

from __future__ import annotations

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
from mm.tokenizers.image.vq import colours
from mm.tokenizers.network import TokenizerNetwork
from mm.tokenizers.quantizers.base import Quantizer

NONE: Mapping[str, Any] = {}


class Residual(nn.Module):
    """Twice norm, SiLU and convolution; a 1x1 convolution beside them where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.first_norm = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.first = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.second_norm = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x)))
        skip = x if self.shortcut is None else self.shortcut(x)
        return skip + self.second(F.silu(self.second_norm(h)))


class GridAttention(nn.Module):
    """Every cell sees every cell, with one head."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        seen = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(seen.transpose(1, 2).view_as(x))


class Down(nn.Module):
    """Half as many rows and columns; zeros are added below and at the right."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Twice as many rows and columns: each pixel four times, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Sequential):
    """Residual blocks, on the coarsest level with attention behind each, then ``change``."""

    def __init__(self, widths: list[int], attends: bool, groups: int, change: nn.Module | None):
        layers: list[nn.Module] = []
        for c_in, c_out in zip(widths, widths[1:], strict=False):
            layers.append(Residual(c_in, c_out, groups))
            if attends:
                layers.append(GridAttention(c_out, groups))
        super().__init__(*layers, *([] if change is None else [change]))


class ImageVqgan(TokenizerNetwork):
    """Images to a grid of codes and back; sides are multiples of the total stride.

    Source: Esser et al. 2021 (arXiv:2012.09841), section 3.1 and appendix; Sun et al. 2024,
    "LlamaGen" (arXiv:2406.06525), section 3.1.
    """

    kind = "image_vqgan"

    def __init__(self, config: ImageVqganConfig):
        super().__init__()
        self.config = c = config
        self.quantizer: Quantizer = c.quantizer.build()
        widths, top, n = c.widths, len(c.widths) - 1, c.blocks
        middle = lambda: nn.Sequential(
            Residual(widths[-1], widths[-1], c.groups),
            GridAttention(widths[-1], c.groups),
            Residual(widths[-1], widths[-1], c.groups),
        )
        end = lambda width, out: nn.Sequential(
            nn.GroupNorm(c.groups, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, out, 3, padding=1),
        )
        self.first = nn.Conv2d(c.channels, c.width, 3, padding=1)
        before = (c.width, *widths[:-1])
        self.down = nn.Sequential(
            *(
                Level([a, *[b] * n], i == top, c.groups, Down(b) if i < top else None)
                for i, (a, b) in enumerate(zip(before, widths, strict=True))
            )
        )
        self.encoder_middle, self.encoder_end = middle(), end(widths[-1], c.latent)
        self.to_code = nn.Conv2d(c.latent, self.quantizer.d, 1)
        self.from_code = nn.Conv2d(self.quantizer.d, c.latent, 1)
        self.widen = nn.Conv2d(c.latent, widths[-1], 3, padding=1)
        self.decoder_middle = middle()
        behind = (widths[-1], *reversed(widths))
        self.up = nn.Sequential(
            *(
                Level([a, *[b] * (n + 1)], i == 0, c.groups, Up(b) if i < top else None)
                for i, (a, b) in enumerate(zip(behind, reversed(widths), strict=False))
            )
        )
        self.decoder_end = end(widths[0], c.channels)

    def init_weights(self) -> None:
        """Fill convolutions and norms (the quantizer did its own); blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            last = getattr(module, "second", None) or (
                module.out if isinstance(module, GridAttention) else None
            )
            if last is not None:
                nn.init.zeros_(last.weight)

    def encode(self, image: Tensor) -> Tensor:
        """``(G, 1 or 3, H, W)`` in [0, 1] to ``(G, h, w, D)`` latents, before the quantizer.

        Raises:
            UserError: a side is no multiple of the total stride.
        """
        stride = 2 ** (len(self.config.widths) - 1)
        if image.shape[-2] % stride or image.shape[-1] % stride:
            raise UserError(
                f"image_vqgan: images of {image.shape[-2]}x{image.shape[-1]} do not divide into "
                f"cells of {stride}; set the stream's size to a multiple of {stride}"
            )
        h = self.down(self.first(2 * colours(image, self.config.channels) - 1))
        return self.to_code(self.encoder_end(self.encoder_middle(h))).permute(0, 2, 3, 1)

    def decode(self, z: Tensor) -> Tensor:
        """``(G, h, w, D)`` quantised latents to ``(G, C, H, W)``; about [0, 1], not clamped."""
        z = F.normalize(z, dim=-1) if self.config.unit_codes else z
        h = self.widen(self.from_code(z.permute(0, 3, 1, 2)))
        return (self.decoder_end(self.up(self.decoder_middle(h))) + 1) / 2

    def forward(
        self,
        batch: Batch,
        *,
        scheduled: Mapping[str, float] = NONE,
        return_intermediates: frozenset[str] = frozenset(),
        seed: Tensor | int = 0,
        **_: Any,
    ) -> ModelOut:
        """Reconstruct ``batch.values["image"]``; all as in `ImageVq.forward`."""
        values = batch.values[self.config.modality]
        z = self.encode(values.data)
        valid = (values.length > 0)[:, None, None].expand(z.shape[:-1])
        out = self.quantizer(z, valid=valid, bypass=bool(scheduled.get("bypass", 0)), seed=seed)
        return ModelOut(z, {}, None, {"image": self.decode(out.z), "ids": out.ids}, out.aux)


@NETWORKS.register("image_vqgan")
class ImageVqganConfig(Config):
    """VQGAN. Janus: size 384, width 128, widths 128, 128, 256, 256, 512: 24 x 24 tokens."""

    kind: Literal["image_vqgan"] = "image_vqgan"
    modality: str = "image"
    size: Annotated[int, Field(gt=0, description="side in pixels of what is encoded")] = 64
    channels: Annotated[Literal[1, 3], Field(description="1: gray, 3: RGB")] = 3
    width: Annotated[int, Field(gt=0, description="of the first convolution")] = 32
    widths: Annotated[
        tuple[Annotated[int, Field(gt=0)], ...],
        Field(min_length=1, description="of each level; each but the last halves the sides"),
    ] = (32, 64, 64)
    blocks: Annotated[int, Field(gt=0, description="of each level of the encoder")] = 1
    latent: Annotated[int, Field(gt=0, description="channels before and behind the codes")] = 64
    groups: Annotated[int, Field(gt=0, description="of each norm")] = 32
    unit_codes: Annotated[bool, Field(description="the decoder reads codes of unit length")] = False
    quantizer: QuantizerField = Field(default="vq", validate_default=True)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        stride = 2 ** (len(self.widths) - 1)
        if self.size % stride:
            raise ValueError(f"size {self.size} is no multiple of the total stride {stride}")
        if any(c % self.groups for c in (self.width, *self.widths)):
            raise ValueError(f"widths {self.widths} are no multiples of groups {self.groups}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.size // 2 ** (len(self.widths) - 1)
        return side, side

    def build(self, vocabulary: Any = None) -> ImageVqgan:
        """Allocate the network; `mm.model.layer.init_weights` fills it."""
        return ImageVqgan(self)

    @classmethod
    def smallest(cls) -> ImageVqganConfig:
        return cls(
            size=8,
            width=4,
            widths=(4, 8),
            latent=8,
            groups=4,
            quantizer={"kind": "vq", "codebook_size": 12, "d": 4},
        )
