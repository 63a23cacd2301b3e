"""Residual wiring of a mixer and a feed-forward layer, with norms before, after or on both sides.

B rows, T tokens, D model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, FeedForward, Mixer, Out
from mm.model.noise import dropout
from mm.model.norm import Kind, add_norm, norm
from mm.registry import BLOCKS
from mm.state import State, join_parts, parts_of


class PreNorm(Block):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``.

    Source: Xiong et al. 2020 (arXiv:2002.04745), fig. 1b. In training each branch passes dropout
    (Srivastava et al. 2014). With ``post_norms`` both return is normed, too: Gemma 2
    (arXiv:2408.00118), section 2; without ``pre_norms`` that alone: OLMo 2 (arXiv:2501.00656),
    section 2. ``normed_residual``: the branch is added to what it read, as in MiniMax-01
    (arXiv:2501.08313), section 2, whose residual begins behind the norm.
    """

    caps = Caps(shard="local")

    def __init__(self, d_model: int, mixer: Mixer, ffn: FeedForward | None, config: PreNormConfig):
        super().__init__()
        c, fed = config, ffn is not None
        self.dropout, self.normed_residual = c.dropout, c.normed_residual
        make = lambda wanted: norm(c.norm, d_model, c.eps) if wanted else None
        self.mixer_norm = make(c.pre_norms)
        self.mixer = mixer
        self.ffn_norm = make(c.pre_norms and fed)
        self.ffn = ffn
        self.mixer_post_norm = make(c.post_norms)
        self.ffn_post_norm = make(c.post_norms and fed)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        mixer_state, ffn_state = parts_of(state, 2) if self.ffn is not None else (state, None)
        read = x_BTD if self.mixer_norm is None else self.mixer_norm(x_BTD)
        mixed = self.mixer(read, ctx, mixer_state)
        y = mixed.y if self.mixer_post_norm is None else self.mixer_post_norm(mixed.y)
        x = read if self.normed_residual else x_BTD
        x, read = add_norm(self.ffn_norm, x, self.scale_branch(y, ctx, "mixer"))
        ctx_after = mixed.ctx or ctx
        aux = dict(mixed.aux)
        if self.ffn is not None:
            fed = self.ffn(read, ctx_after, ffn_state)
            y = fed.y if self.ffn_post_norm is None else self.ffn_post_norm(fed.y)
            x = (read if self.normed_residual else x) + self.scale_branch(y, ctx, "ffn")
            ctx_after = fed.ctx or ctx_after
            ffn_state = fed.state
            aux |= fed.aux
        states = (mixed.state, ffn_state) if self.ffn is not None else (mixed.state,)
        return Out(x, join_parts(*states), ctx_after if ctx_after is not ctx else None, aux)

    def scale_branch(self, y: Tensor, ctx: Ctx, name: str) -> Tensor:
        """What a branch adds, on its way to the residual stream."""
        return dropout(y, self.dropout, ctx, self, name) if self.dropout and self.training else y


@BLOCKS.register("prenorm")
class PreNormConfig(Config):
    """Residual block with norms before mixer and feed-forward, after them, or on both sides."""

    kind: Literal["prenorm"] = "prenorm"
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="of what mixer and feed-forward add; for small data"
    )
    post_norms: Annotated[bool, Field(description="also norm what both return")] = False
    pre_norms: Annotated[bool, Field(description="norm what mixer and feed-forward read")] = True
    normed_residual: bool = Field(
        default=False, description="add each branch to the normed input that it read"
    )

    norm: Kind = "rms"

    @model_validator(mode="after")
    def _somewhere_normed(self) -> PreNormConfig:
        if not self.pre_norms and (self.normed_residual or not self.post_norms):
            raise ValueError("pre_norms: false needs post_norms: true and no normed_residual")
        return self

    def build(self, d_model: int, mixer: Mixer, ffn: FeedForward | None = None) -> PreNorm:
        return PreNorm(d_model, mixer, ffn, self)
