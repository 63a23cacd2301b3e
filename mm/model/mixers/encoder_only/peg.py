"""Positions from a convolution over the grid.

B rows, T tokens, D model, G grids of Y rows and X columns, N = Y X cells.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.encoder_only.grid import GridMixer
from mm.registry import MIXERS


class PEG(GridMixer):
    """Depthwise convolution of each grid of `Layout.grids` over rows and columns, zeros around it.

    The other positions of a document are a line, with zeros where its grids are. The block adds it
    to its input.

    What a border looks like tells cells where they are, so a grid may be larger than any in
    training. As the second mixer of an encoder it takes the place of absolute positions.

    Source: Chu et al. 2021, Conditional positional encodings (arXiv:2102.10882), section 3.3 (PEG);
    a line for what is no grid is a choice of this file (there, the class token passes by).
    """

    caps = Caps(causal=False, step=False)  # local: it does not bring all positions together

    def __init__(self, d_model: int, config: PEGConfig, linear: LinearFactory):
        super().__init__()
        conv_size = config.conv_size
        if conv_size % 2 == 0:
            raise UserError(
                f"peg: conv_size {conv_size} is even; a cell needs as many on either side"
            )
        self.conv_size = conv_size
        self.weight = nn.Parameter(torch.empty(conv_size, conv_size, d_model))
        self.bias = nn.Parameter(torch.empty(d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=1 / self.conv_size)
        nn.init.zeros_(self.bias)

    def mix_line(self, x_RLD: Tensor, length_R: Tensor, passed_RL: Tensor, ctx: Ctx) -> Tensor:
        return self.mix_grid(x_RLD.masked_fill(passed_RL[..., None], 0), 1, x_RLD.shape[1], ctx)

    def mix_grid(self, cells_GND: Tensor, Y: int, X: int, ctx: Ctx) -> Tensor:
        D, dtype = cells_GND.shape[-1], cells_GND.dtype
        weight = self.weight.permute(2, 0, 1)[:, None].to(dtype)
        cells = cells_GND.unflatten(1, (Y, X)).permute(0, 3, 1, 2)
        y = F.conv2d(cells, weight, self.bias.to(dtype), padding=self.conv_size // 2, groups=D)
        return y.permute(0, 2, 3, 1).flatten(1, 2)


@MIXERS.register("peg")
class PEGConfig(LayerConfig):
    """Conditional positions of grids by a depthwise convolution; bidirectional."""

    kind: Literal["peg"] = "peg"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    conv_size: Annotated[int, Field(gt=1, description="rows and columns of the kernel, odd")] = 3

    layer = PEG
