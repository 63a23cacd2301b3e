"""Selective attention.

B rows, T tokens, D model, H heads, G key heads, K head width, N slots, C cached tokens, R rows of
one document, L their length, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory
from mm.model.mixers.attention.base import AttentionRows, GroupedAttention, HeadsConfig
from mm.model.stateful import StatePart
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Masked(DataclassState):
    """How strongly each cached token was masked by those since."""

    sums: Tensor  # (N, C) float32 or wider


class MaskSums(StatePart):
    """Keeps what later tokens subtract from the logits of each earlier one."""

    def initial_state(self, n: int, max_len: int) -> Masked:
        return Masked(self.zeros(n, max_len))


class SelectiveAttention(GroupedAttention):
    """Attention in which a token can mask earlier ones for all later tokens and heads.

    ``S = relu(q k / sqrt(K))`` of head 0, zero for the token itself and for the document's first
    token; ``F_i = sum of S_j over j < i`` is subtracted from the logits of every head.

    Source: Leviathan et al. 2024, Selective Attention Improves Transformer (arXiv:2410.02703),
    section 3 and its listing.
    """

    caps = Caps(causal=True, step=True)
    replays = True
    separate_rows = True

    def __init__(self, d_model: int, config: SelectiveAttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.sums = MaskSums()

    def selection(self, q_RTHK: Tensor, k_RSGK: Tensor, masks_RTS: Tensor) -> Tensor:
        """`(R, T, S)` float32 or wider: how strongly each query masks each key, where it may."""
        q, k = q_RTHK[:, :, 0], k_RSGK[:, :, 0]
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            logits = q.to(wide) @ k.to(wide).mT * self.head_dim**-0.5
        return logits.relu().masked_fill(~masks_RTS, 0)

    def attend(self, rows: AttentionRows) -> Tensor:
        """``more``: `(R, T, S)`, what is subtracted; by default what the rows' own tokens mask."""
        q, k, v, mask, score, more, _ = rows
        if more:
            (masked,) = more
        else:
            T = q.shape[1]
            masks = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(-1)
            masks[:, :1] = False
            allowed = mask.dense(T, T, q.device)
            masks = masks[None] if allowed is None else masks & allowed
            chosen = self.selection(q, k, masks)
            masked = chosen.cumsum(1) - chosen
        bias, other = -masked[:, None], score.total_bias()
        bias = bias if other is None else bias + other
        return attention(q, k, v, mask, ScoreSpec(bias))

    def _forward_cached(
        self, parts: tuple[Tensor, ...], ctx: Ctx, cache: State, sums: State
    ) -> tuple[Tensor, State, State]:
        q, k, v = parts
        assert isinstance(sums, Masked)
        seen, after = self.cache(k, v, ctx, cache)
        docs, index, C = seen.docs, seen.key_index(), sums.sums.shape[1]
        rows = docs.unpack(q)
        # Tokens of the call mask earlier ones of their document but its first.
        earlier = (index[:, None] < seen.query_index()[..., None]) & (index > 0)[:, None]
        allowed = self.mask(ctx).dense(seen.fields, seen.known)
        chosen = self.selection(rows, seen.k.to(q.dtype), allowed & earlier)
        # What is not cached yet was masked by nothing.
        before, index = docs.read(sums.sums), index.clamp_max(C - 1)
        masked = chosen.cumsum(1) - chosen + before.gather(1, index)[:, None].to(chosen)
        mask, score = MaskSpec(allowed), self.scores(rows, seen.fields, seen.known)
        given = AttentionRows(rows, seen.k.to(q.dtype), seen.v, mask, score, (masked,), cached=True)
        y = self.attend(given)
        total = chosen.masked_fill(~docs.valid[..., None], 0).sum(1)
        total = before.scatter_add(1, index, total.to(before.dtype))
        return docs.pack(y), after, docs.write(sums, sums=total)


@MIXERS.register("selective_attention")
class SelectiveAttentionConfig(HeadsConfig):
    """Attention in which tokens mask earlier ones."""

    kind: Literal["selective_attention"] = "selective_attention"

    layer = SelectiveAttention
