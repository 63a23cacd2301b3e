"""Gated feed-forward layer.

B rows, T tokens, D model, F hidden.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.ffn.mlp import Activation, gated_halves
from mm.model.layer import Caps, FeedForward, LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.registry import FFNS
from mm.state import State


class SwiGLU(FeedForward):
    """``out(silu(gate(x)) * up(x))``, or GELU in SiLU's place (GEGLU).

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    caps = Caps(shard="local")

    def __init__(self, d_model: int, config: SwiGLUConfig, linear: LinearFactory):
        super().__init__()
        self.activation: Activation = config.activation
        d_hidden = config.width(d_model)
        self.gate_up = linear(d_model, 2 * d_hidden, "gate_up")
        self.out = linear(d_hidden, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        hidden = gated_halves(self.gate_up(x_BTD, ctx), self.activation)
        return Out(self.out(hidden, ctx))


@FFNS.register("swiglu")
class SwiGLUConfig(LayerConfig):
    """SwiGLU; ``hidden`` None takes 8/3 of d_model, rounded up to a multiple of 32."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: Annotated[int, Field(gt=0)] | None = None
    activation: Literal["silu", "gelu_tanh"] = Field(
        default="silu", description="gelu_tanh: GEGLU, in the tanh form"
    )

    layer = SwiGLU

    def width(self, d_model: int) -> int:
        """Hidden units F."""
        return self.hidden or -(-8 * d_model // 96) * 32
