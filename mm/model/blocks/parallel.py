"""Mixer and feed-forward layer side by side.

B rows, T tokens, D model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, FeedForward, Mixer, Out
from mm.model.noise import dropout
from mm.model.norm import Kind, norm
from mm.registry import BLOCKS
from mm.state import State, join_parts, parts_of


class Parallel(Block):
    """``x + mixer(norm(x)) + ffn(norm(x))``: one norm, and neither branch waits for the other.

    Source: Wang and Komatsuzaki 2021, GPT-J; Chowdhery et al. 2022, PaLM (arXiv:2204.02311),
    section 2. In training the branches pass dropout.
    """

    caps = Caps(shard="local")

    def __init__(self, d_model: int, mixer: Mixer, ffn: FeedForward | None, config: ParallelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.norm = norm(config.norm, d_model, config.eps)
        self.mixer = mixer
        self.ffn = ffn

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        read = self.norm(x_BTD)
        if self.ffn is None:
            mixed = self.mixer(read, ctx, state)
            return mixed._replace(y=x_BTD + self._drop(mixed.y, ctx, "mixer"))
        mixer_state, ffn_state = parts_of(state, 2)
        mixed = self.mixer(read, ctx, mixer_state)
        # It reads what the mixer read; what the mixer published goes on to later layers.
        fed = self.ffn(read, mixed.ctx or ctx, ffn_state)
        y = x_BTD + self._drop(mixed.y, ctx, "mixer") + self._drop(fed.y, ctx, "ffn")
        states = join_parts(mixed.state, fed.state)
        return Out(y, states, fed.ctx or mixed.ctx, {**mixed.aux, **fed.aux})

    def _drop(self, y: Tensor, ctx: Ctx, name: str) -> Tensor:
        return dropout(y, self.dropout, ctx, self, name) if self.dropout and self.training else y


@BLOCKS.register("parallel")
class ParallelConfig(Config):
    """Mixer and feed-forward layer read the same norm, and both are added."""

    kind: Literal["parallel"] = "parallel"
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="of what mixer and feed-forward add; for small data"
    )
    norm: Kind = "rms"

    def build(self, d_model: int, mixer: Mixer, ffn: FeedForward | None = None) -> Parallel:
        return Parallel(d_model, mixer, ffn, self)
