"""Patches of pixels through convolutions over the whole picture, one vector a patch.

G items, L patches, R rows and C columns of patches, p pixels of a patch's side, N channels of a
pixel, W width, D model.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Values
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Adapter, AdapterOutput
from mm.registry import ADAPTERS


class Stage(nn.Module):
    """A convolution of stride 2, then ``blocks`` residual ones: each sees zeros outside."""

    def __init__(self, d_in: int, d_out: int, blocks: int):
        super().__init__()
        self.down = nn.Conv2d(d_in, d_out, 3, 2, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(1, d_out) for _ in range(2 * blocks))
        self.convs = nn.ModuleList(
            nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False) for _ in range(2 * blocks)
        )

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        """``x`` (G, W, h, w) and where its pictures are, (G, 1, h, w); returns half the size."""
        inside = inside[..., ::2, ::2]
        x = self.down(x) * inside
        pairs = list(zip(self.norms, self.convs, strict=True))
        for (norm, conv), (norm_2, conv_2) in zip(pairs[::2], pairs[1::2], strict=True):
            y = conv(nn.functional.gelu(_norm(x, inside, norm)) * inside)
            x = x + conv_2(nn.functional.gelu(_norm(y, inside, norm_2)) * inside) * inside
        return x


def _norm(x: Tensor, inside: Tensor, norm: Any) -> Tensor:
    """Normalise over the channels of every pixel: a picture does not see how large others are."""
    y = nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], norm.weight, norm.bias)
    return y.movedim(-1, 1)


class PatchesAdapter(Adapter):
    """Pictures, each of its own shape, to vectors of their patches.

    All pictures of a batch lie on one canvas, zero outside of them after every layer, so that one
    is read as it would be alone. Source: Xiao et al. 2021 (arXiv:2106.14881), section 4.
    """

    keeps_length = True

    def __init__(self, patch: int, width: int, blocks: int, d_model: int, channels: int = 3):
        super().__init__()
        self.patch, self.channels = patch, channels
        depth = int(math.log2(patch))
        widths = [channels, *(width * 2**i for i in range(depth))]
        pairs = enumerate(zip(widths, widths[1:], strict=False))
        # At half the picture's size a block costs four times what it does in the next stage.
        self.stages = nn.ModuleList(Stage(a, b, blocks if i else 0) for i, (a, b) in pairs)
        self.out = nn.Linear(widths[-1], d_model)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def zero_item(self, device: torch.device) -> Tensor:
        """`(1, 1, p * p * N)`: the item that a batch without pictures runs through the module."""
        size = self.channels * self.patch**2
        return torch.zeros(1, 1, size, device=device, dtype=self.out.weight.dtype)

    def forward(self, values: Values, ctx: Ctx) -> AdapterOutput:
        rows, columns = values.grids()
        G, L = values.data.shape[:2]
        R, C, p, N = int(rows.max()), int(columns.max()), self.patch, self.channels
        # Patch l of an item stands in row l // columns; what lies past its end on a spare cell.
        device = values.data.device
        at = torch.arange(L)
        cell = (at // columns[:, None]) * C + at % columns[:, None]
        cell = torch.where(at < (rows * columns)[:, None], cell, R * C).to(device)
        data = values.floats(self.out.weight.dtype)
        canvas = data.new_zeros(G, R * C + 1, data.shape[-1])
        canvas = canvas.scatter(1, cell[..., None].expand_as(data), data)[:, :-1]
        pixels = canvas.view(G, R, C, p, p, N).permute(0, 5, 1, 3, 2, 4)
        there = torch.arange(R)[:, None] < rows[:, None, None]
        there = (there & (torch.arange(C) < columns[:, None, None])).to(device)
        inside = there[:, None].to(data.dtype)
        inside = inside.repeat_interleave(p, 2).repeat_interleave(p, 3)
        x = pixels.reshape(G, N, R * p, C * p)
        for stage in self.stages:
            x = stage(x, inside)
            inside = inside[..., ::2, ::2]
        x = self.out(x.flatten(2).transpose(1, 2))
        spare = torch.cat((x, x.new_zeros(G, 1, x.shape[-1])), 1)
        back = spare.gather(1, cell[..., None].expand(G, L, x.shape[-1]))
        return AdapterOutput(back, None, values.length)


@ADAPTERS.register("patches")
class PatchesAdapterConfig(Config):
    """Convolutions over what `image_patches` cut, or `array_patches` along two axes."""

    kind: Literal["patches"] = "patches"
    patch: Annotated[int, Field(ge=2, le=64, description="pixels of a side: a power of two")] = 4
    width: Annotated[
        int, Field(gt=0, le=2**16, description="channels of the first stage; doubled by each")
    ] = 32
    blocks: Annotated[
        int,
        Field(
            ge=0,
            le=16,
            description="residual blocks of two convolutions in each stage but the first",
        ),
    ] = 1

    channels: Annotated[
        int, Field(gt=0, le=65536, description="numbers of a pixel: 3 colours, or of an array")
    ] = 3

    @model_validator(mode="after")
    def _power_of_two(self) -> PatchesAdapterConfig:
        if self.patch & (self.patch - 1):
            raise ValueError(
                f"patch {self.patch} is no power of two: each stage halves the picture"
            )
        return self

    @property
    def d_in(self) -> int:
        return self.channels * self.patch**2

    def build(self, d_model: int) -> PatchesAdapter:
        return PatchesAdapter(self.patch, self.width, self.blocks, d_model, self.channels)

    small = {"patch": 2, "width": 4}
