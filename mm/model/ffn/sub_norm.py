"""Feed-forward layer with a norm before its last matrix, too.

B rows, T tokens, D model, F hidden.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.ffn.mlp import MLP, MlpConfig
from mm.model.layer import LinearFactory, Out
from mm.model.norm import Kind, norm
from mm.registry import FFNS
from mm.state import State


class SubNorm(MLP):
    """``out(norm(activation(up(x))))``; the block norms x itself, so there are two norms.

    Source: Wang et al. 2022, Foundation Transformers (arXiv:2210.06423), section 2.1, Sub-LN,
    without its scale of the first weights. Its attention has the second norm as ``out_norm``
    (here of each head).
    """

    def __init__(self, d_model: int, config: SubNormConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.norm = norm(config.norm, config.width(d_model), config.eps)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        return Out(self.out(self.norm(self.hidden_units(x_BTD, ctx)), ctx))


@FFNS.register("sub_norm")
class SubNormConfig(MlpConfig):
    """Two matrices (three with a gate) and a norm before the last one."""

    kind: Literal["sub_norm"] = "sub_norm"  # type: ignore[assignment]
    norm: Kind = "layer"
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6

    layer = SubNorm
