"""A causal mixer read both ways where the mask allows it.

B rows, T tokens, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.mask import Causal, Mask
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out, zero_gradient_touch
from mm.model.layer_config import LayerConfig
from mm.model.memories import memories_read
from mm.model.mixers.wrappers.reverse import (
    both_ways,
    refuse_state,
    reorder,
    reverse,
)
from mm.model.stateful import Stateful
from mm.registry import MIXERS, MixerField
from mm.state import State


class Bidirectional(Mixer):
    """``forward(x)_t + backward(reversed x)_t`` where the mask lets tokens see both ways.

    Elsewhere ``forward(x)_t``.

    The mask says which: all tokens of a full one (an encoder), the leading prefix of each document
    under `Prefix` (what follows starts from the forward state at its end), none of a causal one.

    Source: full: Le Bronnec et al. 2024, LOCOST (arXiv:2401.17919), its encoder; prefix:
    Masuyama et al. 2024, MADEON (arXiv:2411.06968), speech prefixing.
    """

    caps = Caps(causal=True, bidirectional=True, step=True)

    def __init__(self, d_model: int, config: BidirectionalConfig, linear: LinearFactory):
        super().__init__()
        self.ahead, self.back = (config.inner.build(d_model, linear) for _ in range(2))
        if memories_read(self):
            raise ValueError(
                f"bidirectional: '{config.inner.kind}' attends to a memory, whose order says "
                "nothing to it; name it without the wrapper"
            )

    def check_mask(self, mask: Mask) -> None:
        super().check_mask(Causal())

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        super().prefetch(replace(ctx, mask=Causal()), serving)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        refuse_state("bidirectional", ctx, state)
        causal = replace(ctx, mask=Causal())
        out = self.ahead(x_BTD, causal, state)
        inside = both_ways(ctx.layout, ctx.mask)
        if inside is None:
            return out._replace(
                y=out.y + zero_gradient_touch(self.back.parameters(), out.y),
                ctx=ctx.hand_on(out.ctx),
            )
        index, backwards = reverse(ctx, inside)
        back = self.back(reorder(x_BTD, index), backwards)
        y = torch.where(inside[..., None], reorder(back.y, index), 0)
        return Out(out.y + y, out.state, ctx.hand_on(out.ctx), {**out.aux, **back.aux})

    def stateful_parts(self) -> list[Stateful]:
        return [self.ahead]  # a State under which something is read backwards is refused


@MIXERS.register("bidirectional")
class BidirectionalConfig(LayerConfig):
    """Two copies of a causal mixer, one of which reads backwards where the mask allows it."""

    kind: Literal["bidirectional"] = "bidirectional"
    inner: MixerField = Field(default="s4d", validate_default=True)

    layer = Bidirectional
    small = {"inner": {"kind": "s4d", "states": 3}}
