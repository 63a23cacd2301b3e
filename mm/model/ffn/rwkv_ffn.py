"""RWKV's feed-forward layer.

B rows, T tokens, D model, F hidden, N slots.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, FeedForward, LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.conv.state import TokenTail
from mm.registry import FFNS
from mm.state import State


class RwkvFFN(FeedForward):
    """``sigmoid(receptance(x')) * out(relu(key(x''))^2)``.

    x' and x'' are the token mixed with the one before it.

    Source: Peng et al. 2023, RWKV (arXiv:2305.13048), section 3.1.3.
    """

    caps = Caps(causal=True, step=True, shard="halo")

    def __init__(self, d_model: int, config: RwkvFFNConfig, linear: LinearFactory):
        super().__init__()
        d_hidden = config.hidden or 4 * d_model
        self.tail = TokenTail(d_model, 1)
        self.mix = nn.Parameter(torch.empty(2, d_model))  # of receptance and key
        self.receptance = linear(d_model, d_model, "receptance")
        self.key = linear(d_model, d_hidden, "key")
        self.out = linear(d_hidden, d_model, "out")

    def init_weights(self) -> None:
        nn.init.uniform_(self.mix, 0, 1)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        (x, before), after = self.tail(x_BTD, ctx, state)
        gap = before - x
        receptance = self.receptance(x + gap * (1 - self.mix[0]), ctx)
        key = self.key(x + gap * (1 - self.mix[1]), ctx)
        return Out(receptance.sigmoid() * self.out(key.relu().square(), ctx), after)


@FFNS.register("rwkv_ffn")
class RwkvFFNConfig(LayerConfig):
    """RWKV's channel mixing; ``hidden`` None takes 4 times d_model."""

    kind: Literal["rwkv_ffn"] = "rwkv_ffn"
    hidden: Annotated[int, Field(gt=0)] | None = None

    layer = RwkvFFN
