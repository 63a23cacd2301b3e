"""The difference of two mixers of one input.

B rows, T tokens, D model.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.norm import RMSNorm
from mm.registry import MIXERS, MixerField
from mm.state import State, join_parts, parts_of


class Differential(Mixer):
    """``(1 - c) norm(m1(x) - lambda * m2(x))`` of two mixers m1, m2.

    ``lambda = sigmoid(l) + c``, ``c = 0.8 - 0.6 exp(-0.3 layer)``.

    What both find is noise and cancels. ``l`` is one learned number, c grows with depth.

    Source: Schneider et al. 2025, Differential Mamba (arXiv:2507.06204), section 3: the difference
    of whole blocks, normalised; the term of the layer: Ye et al. 2024, Differential Transformer
    (arXiv:2410.05258), section 2.1.
    """

    def __init__(self, d_model: int, config: DifferentialConfig, linear: LinearFactory):
        super().__init__()
        self.first, self.second = (config.inner.build(d_model, linear) for _ in range(2))
        self.begin = config.begin
        self.norm = RMSNorm(d_model)
        self.share = nn.Parameter(torch.empty(()))

    def init_weights(self) -> None:
        nn.init.constant_(self.share, self.begin)

    def share_at(self, layer: int) -> tuple[Tensor, float]:
        """Lambda of a layer (counted from 0), float32 or wider, and its constant part c."""
        wide = torch.promote_types(self.share.dtype, torch.float32)
        constant = 0.8 - 0.6 * math.exp(-0.3 * layer)
        return self.share.to(wide).sigmoid() + constant, constant

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        first, second = parts_of(state, 2)
        one = self.first(x_BTD, ctx, first)
        after_one = ctx.hand_on(one.ctx) or ctx
        two = self.second(x_BTD, after_one, second)
        share, constant = self.share_at(ctx.visit)
        y = (1 - constant) * self.norm(one.y - share.to(one.y.dtype) * two.y)
        after = join_parts(one.state, two.state)
        return Out(y, after, after_one.hand_on(two.ctx) or after_one, {**one.aux, **two.aux})


@MIXERS.register("differential")
class DifferentialConfig(LayerConfig):
    """Two copies of a mixer, of which one is subtracted."""

    kind: Literal["differential"] = "differential"
    inner: MixerField = Field(default="mamba", validate_default=True)
    begin: Annotated[float, Field(description="initial logit of the learned share")] = -4.0

    layer = Differential
    small = {"inner": {"kind": "gated_scan", "width": 6}}
