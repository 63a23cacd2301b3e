"""A feed-forward layer: squared ReLU.

B rows, T tokens, D model, F hidden.

    mm train configs/quickstart/backbone.yaml "imports=[examples.ffn_relu2]" \
        model.backbone.ffn="{kind: relu2, hidden: 512}"
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import FeedForward, LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.registry import FFNS
from mm.state import State


class ReLU2(FeedForward):
    """``out(relu(up(x)) ** 2)``. Source: So et al. 2021, Primer (arXiv:2109.08668), section 3."""

    def __init__(self, d_model: int, config: ReLU2Config, linear: LinearFactory):
        super().__init__()
        d_hidden = config.hidden or 4 * d_model
        self.up = linear(d_model, d_hidden, "up")
        self.out = linear(d_hidden, d_model, "out")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        return Out(self.out(self.up(x_BTD, ctx).relu().square(), ctx))


@FFNS.register("relu2")
class ReLU2Config(LayerConfig):
    """Squared ReLU; ``hidden`` None takes 4 d_model."""

    kind: Literal["relu2"] = "relu2"
    hidden: Annotated[int, Field(gt=0)] | None = None

    layer = ReLU2
