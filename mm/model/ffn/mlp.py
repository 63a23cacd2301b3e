"""Feed-forward layer of two matrices, with or without a gate.

B rows, T tokens, D model, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.kernels import device
from mm.kernels.glu import glu, glu_halves
from mm.model.context import Ctx
from mm.model.layer import Caps, FeedForward, LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.registry import FFNS
from mm.state import State

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up``, `(..., F)`, through the fused kernel where it knows the word."""
    if activation == "silu" or activation == "gelu_tanh":
        return glu(gate, up, activation)  # type: ignore[return-value]  the decorator has no types
    return ACTIVATIONS[activation](gate) * up


def gated_halves(x: Tensor, activation: Activation) -> Tensor:
    """`gated_product` of the halves of `(..., 2 F)`; a GPU writes their gradient as one tensor."""
    if x.device.type == device.KIND and (activation == "silu" or activation == "gelu_tanh"):
        return glu_halves(x, activation)  # type: ignore[return-value]
    gate, up = x.chunk(2, dim=-1)
    return gated_product(gate, up, activation)


class MLP(FeedForward):
    """``out(activation(up(x)))``, or ``out(activation(gate(x)) * up(x))`` with a gate.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 2, with ReLU; GELU, and by a sigmoid
    (section 2: quick_gelu, which CLIP has): Hendrycks and Gimpel 2016 (arXiv:1606.08415); squared
    ReLU: So et al. 2021, Primer (arXiv:2109.08668), section 3; gates (ReGLU, GEGLU, SwiGLU):
    Shazeer 2020 (arXiv:2002.05202), eq. 6.
    """

    caps = Caps(shard="local")

    def __init__(self, d_model: int, config: MlpConfig, linear: LinearFactory):
        super().__init__()
        self.activation: Activation = config.activation
        self.gated = config.gated
        d_hidden = config.width(d_model)
        # Named as in `swiglu`: weights of one load into the other.
        if config.gated:
            self.gate_up = linear(d_model, 2 * d_hidden, "gate_up")
        else:
            self.up = linear(d_model, d_hidden, "up")
        self.out = linear(d_hidden, d_model, "out")

    def hidden_units(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """`(B, T, F)` that the last matrix reads."""
        if self.gated:
            return gated_halves(self.gate_up(x_BTD, ctx), self.activation)
        return ACTIVATIONS[self.activation](self.up(x_BTD, ctx))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        return Out(self.out(self.hidden_units(x_BTD, ctx), ctx))


@FFNS.register("mlp")
class MlpConfig(LayerConfig):
    """Two matrices around an activation, or three with a gate.

    ``hidden`` None takes 4 times d_model; with a gate 8/3 of it, rounded up to a multiple of 32, so
    that both have about the same weights.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[int, Field(gt=0)] | None = None
    activation: Activation = Field(default="gelu", description="gelu: by erf")
    gated: bool = Field(
        default=False, description="multiply by a second projection: GEGLU, ReGLU, SwiGLU"
    )

    layer = MLP

    def width(self, d_model: int) -> int:
        """Hidden units F."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * d_model // 96) * 32 if self.gated else 4 * d_model
