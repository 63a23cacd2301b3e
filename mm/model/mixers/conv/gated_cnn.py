"""Gated convolution.

B rows, T tokens, D model, W width, C conv size, N slots.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import TokenTail
from mm.registry import MIXERS
from mm.state import State


class GatedCNN(Mixer):
    """``out((X * W + b) . sigmoid(X * V + c))`` with full causal convolutions of width C.

    Source: Dauphin et al. 2017 (arXiv:1612.08083), eq. 1.
    """

    caps = Caps(causal=True, step=True, shard="halo")

    def __init__(self, d_model: int, config: GatedCNNConfig, linear: LinearFactory):
        super().__init__()
        width, conv_size = config.width or d_model, config.conv_size
        self.tail = TokenTail(d_model, conv_size - 1)
        self.inner = linear(conv_size * d_model, 2 * width, "inner")  # newest token first
        self.bias = nn.Parameter(torch.empty(2 * width))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        back, after = self.tail(x_BTD, ctx, state)
        u = self.inner(torch.cat(back, dim=-1), ctx)
        a, b = (u + self.bias.to(u.dtype)).chunk(2, dim=-1)
        return Out(self.out(a * b.sigmoid(), ctx), after)


@MIXERS.register("gated_cnn")
class GatedCNNConfig(LayerConfig):
    """Causal convolution with a gated linear unit."""

    kind: Literal["gated_cnn"] = "gated_cnn"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    conv_size: Annotated[int, Field(gt=1, description="width of the convolution")] = 4

    layer = GatedCNN
    small = {"width": 6, "conv_size": 3}
