"""Linear attention that reads its prefix twice (JRT-RNN).

B rows, T tokens, D model, H heads, K key width, V value width, R rows of one document, L their
length.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.errors import UserError
from mm.kernels.linear_attention import linear_attention
from mm.kernels.op import exact
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out, zero_gradient_touch
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.linear_attention import (
    EPS,
    LinearAttentionConfig,
    append_ones,
)
from mm.model.mixers.wrappers.reverse import both_ways, refuse_state
from mm.registry import MIXERS, MixerField
from mm.state import State, join_parts, parts_of


class PrefixLinearAttention(Mixer):
    """Linear attention whose prefix has keys and values of its own, k^e and v^e, for all to read.

    Prefix tokens read all of the prefix, others only their past.
    The prefix is what the mask lets see both ways (`Prefix`, or all of a full mask) and comes whole
    in one call; without one this is the wrapped causal mixer.

    Source: Arora et al. 2024, Just read twice (arXiv:2407.05483), JRT-RNN: prefix
    linear attention.
    """

    caps = Caps(causal=True, bidirectional=True, step=True)
    documents_apart = True  # where there is a prefix

    def __init__(self, d_model: int, config: PrefixLinearAttentionConfig, linear: LinearFactory):
        super().__init__()
        c = config.inner
        plain = isinstance(c, LinearAttentionConfig) and c.decay == "none" and not c.conv_size
        if not plain or c.position.kind != "none":
            raise UserError(
                "prefix_linear_attention wraps a linear_attention with decay: none, "
                "conv_size: 0 and position: none, e.g. the settings of based"
            )
        self.inner = inner = c.build(d_model, linear)
        self.sizes = (inner.key_heads * inner.key_dim, inner.heads * inner.value_dim)
        self.encoder = linear(d_model, sum(self.sizes), "encoder")

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        refuse_state("prefix_linear_attention", ctx, state)
        inside = both_ways(ctx.layout, ctx.mask)
        tail, memory = parts_of(state, 2)
        f, tail = self.inner.features(x_BTD, ctx, tail)
        if inside is None:
            o, memory = self.inner.core(f, ctx, memory)
            y = self.inner.finish(o, x_BTD, f, ctx)
            y = y + zero_gradient_touch(self.encoder.parameters(), y)
            return Out(y, join_parts(tail, memory))
        q, k, v = f["q"], f["k"], f["v"]
        (B, T), c = q.shape[:2], self.inner
        ke, ve = self.encoder(x_BTD, ctx).to(v).split(self.sizes, -1)
        ke = c._spread(c._map(ke.view(B, T, c.key_heads, c.key_dim)).to(k))
        ve = ve.view(B, T, c.heads, c.value_dim)
        if c.config.normalise:
            v, ve = append_ones(v), append_ones(ve)
        index = torch.arange(B * T, device=q.device).view(B, T, 1)
        parts = (q, k, v, ke, ve, inside[..., None].to(q), index)
        o, memory = c.memory(prefix_attention, parts, ctx, memory, rows_whole=False)
        if c.config.normalise:
            o = o[..., :-1] / (o[..., -1:] + EPS)
        return Out(c.finish(o, x_BTD, f, ctx), join_parts(tail, memory))


@exact
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ke: Tensor,
    ve: Tensor,
    inside: Tensor,
    index: Tensor,
    S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state of linear attention over the sum of a prefix's own ``ke ve^T``.

    Args:
        q: `(R, L, H, K)`; k, ke alike; v, ve: `(R, L, H, V)`.
        inside: `(R, L, 1)`, 1 in the prefix, whose tokens read all of it.
        index: `(R, L, 1)`; a token with its predecessor's is a copy that pads the row.
        S: `(R, H, K, V)` before; None = zeros.
    Returns:
        `(R, L, H, V)` and `(R, H, K, V)`.
    """
    # Rows are padded with copies of their last token: it counts once.
    moved = F.pad(index[:, 1:] != index[:, :-1], (0, 0, 1, 0), value=True)
    share = (inside * moved)[..., None]
    wide = torch.promote_types(k.dtype, torch.float32)
    total = lambda k, v: torch.einsum("rlhk,rlhv->rhkv", (k * share).to(wide), v.to(wide))
    first = total(ke, ve)
    if S is not None:
        first = first + S
    o, last = linear_attention(q, k, v, None, first)
    prefix = first + total(k, v)
    read = torch.einsum("rlhk,rhkv->rlhv", q.to(wide), prefix)
    return torch.where(share > 0, read, o), last


@MIXERS.register("prefix_linear_attention")
class PrefixLinearAttentionConfig(LayerConfig):
    """Linear attention with an encoder's keys and values for the prefix."""

    kind: Literal["prefix_linear_attention"] = "prefix_linear_attention"
    inner: MixerField = Field(default="linear_attention", validate_default=True)

    layer = PrefixLinearAttention
    small = {"inner": {"kind": "linear_attention", "heads": 2}}
