"""Trellis network.

B rows, T tokens, D model, W width, N slots.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import TokenTail
from mm.registry import MIXERS
from mm.state import State, join_parts, parts_of


class Trellis(Mixer):
    """``depth`` convolutions of width two with the SAME weights and an LSTM's gates.

    The input is injected into each: depth i of token t reads depth i - 1 of tokens t and t - 1.

    It sees ``depth + 1`` tokens, and with block-sparse weights it is an LSTM over the last
    ``depth`` of them. All tokens run beside one another; the State keeps one token of each depth.

    Source: Bai et al. 2019 (arXiv:1810.06682), sections 3 and 5 (gated activation).
    """

    caps = Caps(causal=True, step=True, shard="halo")

    def __init__(self, d_model: int, config: TrellisConfig, linear: LinearFactory):
        super().__init__()
        self.width = width = config.width or d_model
        widths = [d_model, *[2 * width] * (config.depth - 1)]
        self.tails = nn.ModuleList(TokenTail(w, 1) for w in widths)
        self.inner = linear(2 * d_model, 4 * width, "inner")  # this token, the one before
        self.mix = linear(2 * width, 4 * width, "mix")  # this token's hidden, the one's before
        self.bias = nn.Parameter(torch.empty(4 * width))  # forget, input, candidate, output
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.bias[: self.width] = 1.0

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        parts = list(parts_of(state, len(self.tails)))
        back, parts[0] = self.tails[0](x_BTD, ctx, parts[0])
        injected = self.inner(torch.cat(back, -1), ctx)
        injected = injected + self.bias.to(injected.dtype)
        f, i, g, o = injected.chunk(4, -1)  # depth 0 is zeros
        cell = i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        for depth in range(1, len(self.tails)):
            z = torch.cat((cell, hidden), -1)
            (_, before), parts[depth] = self.tails[depth](z, ctx, parts[depth])
            old_cell, old_hidden = before.chunk(2, -1)
            mixed = injected + self.mix(torch.cat((hidden, old_hidden), -1), ctx)
            f, i, g, o = mixed.chunk(4, -1)
            cell = f.sigmoid() * old_cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
        return Out(self.out(hidden, ctx), join_parts(*parts))


@MIXERS.register("trellis")
class TrellisConfig(LayerConfig):
    """Weight-tied causal convolutions with injected input and LSTM gates."""

    kind: Literal["trellis"] = "trellis"
    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    depth: Annotated[int, Field(gt=1, description="tokens it looks back")] = 16

    layer = Trellis
    small = {"width": 6, "depth": 3}
