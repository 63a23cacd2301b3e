"""Short depthwise convolution between two gates.

B rows, T tokens, D model, C conv size, N slots.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import ShortConv
from mm.registry import MIXERS
from mm.state import State


class GatedShortConv(Mixer):
    """``out(c * conv(b * u))`` with ``b, c, u = inner(x)``; without gates ``out(conv(inner(x)))``.

    The convolution is causal and by channel.

    Source: LFM2 (Liquid AI 2025, arXiv:2511.23404), the gated short convolution block.
    """

    caps = Caps(causal=True, step=True, shard="halo")

    def __init__(self, d_model: int, config: ShortConvConfig, linear: LinearFactory):
        super().__init__()
        self.gates = gates = config.gates
        self.inner = linear(d_model, 3 * d_model if gates else d_model, "inner")
        self.conv = ShortConv(d_model, config.conv_size)
        self.out = linear(d_model, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        u = self.inner(x_BTD, ctx)
        if not self.gates:
            y, after = self.conv(u, ctx, state)
            return Out(self.out(y, ctx), after)
        b, c, u = u.chunk(3, dim=-1)
        y, after = self.conv(b * u, ctx, state)
        return Out(self.out(c * y, ctx), after)


@MIXERS.register("short_conv")
class ShortConvConfig(LayerConfig):
    """Causal depthwise convolution over a few tokens, between two gates."""

    kind: Literal["short_conv"] = "short_conv"
    renamed: ClassVar[dict[str, str]] = {"taps": "conv_size"}
    conv_size: Annotated[int, Field(gt=1, description="width of the convolution")] = 3
    gates: Annotated[bool, Field(description="input-dependent gates before and after")] = True

    layer = GatedShortConv
