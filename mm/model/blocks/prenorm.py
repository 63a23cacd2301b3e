"""Pre-norm residual wiring. B rows, T tokens, D model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.model.layer import Block, Channel, Ctx, Mixer, Out
from mm.model.noise import dropout
from mm.model.norm import RMSNorm
from mm.registry import BLOCKS
from mm.state import Many, State


class PreNorm(Block):
    """``x + mixer(norm(x))``, then ``x + channel(norm(x))``. Source: Xiong et al. 2020
    (arXiv:2002.04745), fig. 1b. In training each branch passes dropout (Srivastava et al. 2014).
    With ``post_norms`` what mixer and channel return is normed, too: Gemma 2 (arXiv:2408.00118),
    section 2.
    """

    def __init__(
        self,
        d_model: int,
        mixer: Mixer,
        channel: Channel | None,
        eps: float,
        dropout: float = 0.0,
        post_norms: bool = False,
    ):
        super().__init__()
        self.dropout = dropout
        self.mixer_norm = RMSNorm(d_model, eps=eps)
        self.mixer = mixer
        self.channel_norm = RMSNorm(d_model, eps=eps) if channel is not None else None
        self.channel = channel
        self.mixer_post_norm = RMSNorm(d_model, eps=eps) if post_norms else None
        both = post_norms and channel is not None
        self.channel_post_norm = RMSNorm(d_model, eps=eps) if both else None

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        assert state is None or isinstance(state, Many)
        mixed = self.mixer(self.mixer_norm(x_BTD), ctx, state[0] if state is not None else None)
        y = mixed.y if self.mixer_post_norm is None else self.mixer_post_norm(mixed.y)
        x = x_BTD + self._drop(y, ctx, "mixer")
        ctx_after = mixed.ctx or ctx
        aux = {f"mixer.{k}": v for k, v in mixed.aux.items()}
        channel_state = None
        if self.channel is not None and self.channel_norm is not None:
            fed = self.channel(
                self.channel_norm(x), ctx_after, state[1] if state is not None else None
            )
            y = fed.y if self.channel_post_norm is None else self.channel_post_norm(fed.y)
            x = x + self._drop(y, ctx, "channel")
            ctx_after = fed.ctx or ctx_after
            channel_state = fed.state
            aux |= {f"channel.{k}": v for k, v in fed.aux.items()}
        after = Many(mixed.state, channel_state) if state is not None else None
        return Out(x, after, ctx_after if ctx_after is not ctx else None, aux)

    def _drop(self, y: Tensor, ctx: Ctx, name: str) -> Tensor:
        return dropout(y, self.dropout, ctx, name) if self.dropout and self.training else y

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        return {
            **self.mixer.shares(serving),
            **(self.channel.shares(serving) if self.channel is not None else {}),
        }

    def initial_state(self, n: int, max_len: int) -> Many:
        return Many(
            self.mixer.initial_state(n, max_len),
            self.channel.initial_state(n, max_len) if self.channel else None,
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        return self.mixer.state_bytes(n, max_len) + (
            self.channel.state_bytes(n, max_len) if self.channel else 0
        )


@BLOCKS.register("prenorm")
class PreNormConfig(Config):
    """Pre-norm block with RMSNorm."""

    kind: Literal["prenorm"] = "prenorm"
    eps: float = 1e-6
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="of what mixer and channel add; for small data")
    ] = 0.0
    post_norms: Annotated[bool, Field(description="also norm what mixer and channel return")] = (
        False
    )

    def build(self, d_model: int, mixer: Mixer, channel: Channel | None = None) -> PreNorm:
        return PreNorm(d_model, mixer, channel, self.eps, self.dropout, self.post_norms)
