"""A mixer: exponential moving average over time.

B rows, T tokens, D model.

    mm train configs/quickstart/backbone.yaml "imports=[examples.mixer_ema]" \
        model.backbone.pattern="2*ema attention"
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.ssm.scan import DiagonalScan
from mm.registry import MIXERS
from mm.state import State


class EMA(Mixer):
    """``out(h)`` with ``h_t = a h_{t-1} + (1 - a) in(x)_t`` and a learned decay ``a`` a channel.

    Source: Ma et al. 2022, Mega (arXiv:2209.10655), eq. 1, one dimension a channel and undamped.
    """

    caps = Caps(causal=True, step=True)

    def __init__(self, d_model: int, config: EMAConfig, linear: LinearFactory):
        super().__init__()
        self.inner, self.out = linear(d_model, d_model, "inner"), linear(d_model, d_model, "out")
        self.decay = nn.Parameter(torch.empty(d_model))
        self.scan = DiagonalScan(d_model)  # documents, State and drafts are its business

    def init_weights(self) -> None:
        nn.init.uniform_(self.decay, 0.0, 5.0)  # averages over 2 to 150 tokens

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        u = self.inner(x_BTD, ctx)
        a = self.decay.to(self.scan.wide).sigmoid().expand_as(u)
        h, after = self.scan(linear_scan, a, (1 - a) * u.to(a.dtype), ctx, state)
        return Out(self.out(h.to(u.dtype), ctx), after)


@MIXERS.register("ema")
class EMAConfig(LayerConfig):
    """Exponential moving average with a learned decay for each channel."""

    kind: Literal["ema"] = "ema"

    layer = EMA
