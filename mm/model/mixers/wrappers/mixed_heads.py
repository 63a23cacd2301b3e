"""Heads of one layer shared out between several mixers.

N slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.registry import MIXERS, MixerField
from mm.state import State, join_parts, parts_of


class MixedHeads(Mixer):
    """Mixers side by side on the same input: the sum of what they put out.

    Each part has an output projection of its own; their sum is the one projection of all heads
    side by side, so this is a layer some of whose heads attend while others recur.

    Source: Yan et al. 2024, RecurFormer (arXiv:2410.12850): heads with local attention
    become recurrent ones.
    """

    caps = Caps()  # of the class; each layer's are those that all its parts have

    def __init__(self, d_model: int, config: MixedHeadsConfig, linear: LinearFactory):
        super().__init__()
        parts = [part.build(d_model, linear) for part in config.parts]
        self.parts = nn.ModuleList(parts)
        caps = [part.caps for part in parts]
        self.caps = replace(
            caps[0],
            causal=all(c.causal for c in caps),
            bidirectional=all(c.bidirectional for c in caps),
            step=all(c.step for c in caps),
            length_general=all(c.length_general for c in caps),
            lookahead=max(c.lookahead for c in caps),
            exact=all(c.exact for c in caps),
            sequential=any(c.sequential for c in caps),
            shard="local" if all(c.shard for c in caps) else None,  # each part sees to itself
            reads=frozenset().union(*(c.reads for c in caps)),
            publishes=frozenset().union(*(c.publishes for c in caps)),
        )

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        states = list(parts_of(state, len(self.parts)))
        y, aux, after = None, {}, ctx
        for i, part in enumerate(self.parts):
            out = part(x_BTD, after, states[i])
            y = out.y if y is None else y + out.y
            after = out.ctx or after
            aux |= out.aux
            states[i] = out.state
        assert y is not None
        return Out(y, join_parts(*states), None if after is ctx else after, aux)


@MIXERS.register("mixed_heads")
class MixedHeadsConfig(LayerConfig):
    """Several mixers side by side in one layer, such as attention heads and recurrent ones."""

    kind: Literal["mixed_heads"] = "mixed_heads"
    parts: Annotated[
        list[MixerField],
        Field(min_length=1, description="mixers whose outputs are added"),
    ] = Field(default=["attention", "rg_lru"], validate_default=True)

    layer = MixedHeads
    small = {
        "parts": [
            {"kind": "attention", "heads": 1, "head_dim": 4},
            {"kind": "rg_lru", "width": 6, "heads": 2},
        ]
    }
