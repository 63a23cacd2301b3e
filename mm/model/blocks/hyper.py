"""Hyper-connections: several residual streams that learn what each layer reads and adds to.

B rows, T tokens, D model, n streams.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Block, Caps, FeedForward, Mixer, Out
from mm.model.noise import dropout
from mm.model.norm import Kind, norm
from mm.registry import BLOCKS
from mm.state import State, join_parts, parts_of

SCALE = 0.01  # of what depends on the streams, at the start


class Connections(nn.Module):
    """What one mixer or feed-forward layer reads of the streams, how they mix, what each gets.

    ``beta`` (n,) begins at 1, ``mix`` (n, n) as the identity, what is read as the stream ``place``
    modulo n: ``read`` (n,) is what is learnt beside that. Dynamic: each stream adds its own tanh.
    """

    def __init__(self, d_model: int, config: HyperConfig):
        super().__init__()
        n = config.streams
        self.beta, self.read = (nn.Parameter(torch.empty(n)) for _ in range(2))
        self.mix = nn.Parameter(torch.empty(n, n))
        self.dynamic = config.dynamic
        if config.dynamic:
            self.norm = norm(config.norm, d_model, config.eps)
            self.to_alpha = nn.Parameter(torch.empty(n + 1, d_model))
            self.to_beta = nn.Parameter(torch.empty(1, d_model))
            self.scale = nn.Parameter(torch.empty(2))

    def init_weights(self) -> None:
        nn.init.ones_(self.beta)
        nn.init.zeros_(self.read)
        nn.init.eye_(self.mix)
        if self.dynamic:
            nn.init.zeros_(self.to_alpha)
            nn.init.zeros_(self.to_beta)
            nn.init.constant_(self.scale, SCALE)

    def forward(self, h_BTnD: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input `(B, T, D)` of the layer, mixed streams `(B, T, n, D)`, beta `(..., n, 1)`."""
        n = len(self.beta)
        first = F.one_hot(torch.tensor(place % n, device=h_BTnD.device), n)
        alpha = torch.cat(((self.read + first)[:, None], self.mix), 1).to(h_BTnD.dtype)
        beta = self.beta[:, None].to(h_BTnD.dtype)
        if self.dynamic:
            seen = self.norm(h_BTnD)
            alpha = alpha + self.scale[0] * F.linear(seen, self.to_alpha).tanh()
            beta = beta + self.scale[1] * F.linear(seen, self.to_beta).tanh()
        both = alpha.transpose(-1, -2).to(h_BTnD.dtype) @ h_BTnD
        return both[..., 0, :], both[..., 1:, :], beta.to(h_BTnD.dtype)


class HyperConnected(Block):
    """``H = A_r^T H + beta (x) T(A_m^T H)`` for mixer and feed-forward T, each behind a norm.

    Source: Zhu et al. 2024, Hyper-Connections (arXiv:2409.19606): the update of section 2.1, the
    dynamic form ``A = s tanh(norm(H) W) + A`` of section 2.2 and the start of section 2.3, where
    all streams are that of a `prenorm` block. n = 1 with fixed weights is that block.

    ``x`` is the mean of the streams (their sum in the paper: the norm behind them takes either);
    what each differs by is published for the next block, so that other blocks may stand between.
    """

    def __init__(self, d_model: int, mixer: Mixer, ffn: FeedForward | None, config: HyperConfig):
        super().__init__()
        self.streams, self.dropout = config.streams, config.dropout
        self.key = f"streams.{config.streams}"
        self.caps = Caps(shard="local", publishes=frozenset({self.key}))
        self.mixer_norm = norm(config.norm, d_model, config.eps)
        self.mixer_connections = Connections(d_model, config)
        self.mixer = mixer
        self.ffn_norm = norm(config.norm, d_model, config.eps) if ffn is not None else None
        self.ffn_connections = Connections(d_model, config) if ffn is not None else None
        self.ffn = ffn

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        mixer_state, ffn_state = parts_of(state, 2) if self.ffn is not None else (state, None)
        h = x_BTD[..., None, :].expand(*x_BTD.shape[:2], self.streams, -1)
        if self.key in ctx.published:
            h = h + ctx.published[self.key]
        read, h, beta = self.mixer_connections(h, 2 * ctx.visit)
        mixed = self.mixer(self.mixer_norm(read), ctx, mixer_state)
        h = h + beta * self._drop(mixed.y, ctx, "mixer")[..., None, :]
        after, aux, states = mixed.ctx or ctx, dict(mixed.aux), [mixed.state]
        if self.ffn is not None:
            assert self.ffn_norm is not None and self.ffn_connections is not None
            read, h, beta = self.ffn_connections(h, 2 * ctx.visit + 1)
            fed = self.ffn(self.ffn_norm(read), after, ffn_state)
            h = h + beta * self._drop(fed.y, ctx, "ffn")[..., None, :]
            after, aux = fed.ctx or after, aux | dict(fed.aux)
            states.append(fed.state)
        y = h.mean(-2)
        after = replace(after, published={**after.published, self.key: h - y[..., None, :]})
        return Out(y, join_parts(*states), after, aux)

    def _drop(self, y: Tensor, ctx: Ctx, name: str) -> Tensor:
        return dropout(y, self.dropout, ctx, self, name) if self.dropout and self.training else y


@BLOCKS.register("hyper")
class HyperConfig(Config):
    """Residual streams whose connections to mixers and feed-forward layers are learnt."""

    kind: Literal["hyper"] = "hyper"
    streams: Annotated[int, Field(gt=0, le=64, description="n, the paper's expansion rate")] = 4
    dynamic: Annotated[bool, Field(description="connections depend on the streams, too")] = True
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="of what mixer and feed-forward add; for small data"
    )
    norm: Kind = "rms"

    small = {"streams": 2}

    def build(self, d_model: int, mixer: Mixer, ffn: FeedForward | None = None) -> HyperConnected:
        return HyperConnected(d_model, mixer, ffn, self)
