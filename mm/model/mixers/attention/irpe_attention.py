"""Attention with relative vectors of a grid on keys, queries and values.

R rows of one document, T queries, S keys, H heads, G key heads, K head width, N buckets, X terms.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.layout import Fields
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.base import AttentionRows, GroupedAttention, HeadsConfig
from mm.model.positions.base import Position
from mm.model.positions.irpe import IRPE, IRPEConfig
from mm.registry import MIXERS

On = Literal["q", "k", "v"]


class Buckets(Position):
    """A position whose score is no score but the buckets of each pair."""

    def __init__(self, indices: IRPE):
        self.buckets, self.count = indices.buckets, indices.table.shape[1]

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor:
        """`(R, X, T, S)` int64, X tables' worth of terms that add up."""
        R, T, S = q.shape[0], q.shape[1], fk.document.shape[1]
        return torch.stack([i.expand(R, T, S) for i in self.buckets(fq, fk)], dim=1)


class IRPEAttention(GroupedAttention):
    """Softmax of ``q_i . k_j + q_i . r^K[I] + k_j . r^Q[I]`` over ``v_j + r^V[I]``.

    ``I`` is the bucket of the offset of key j from query i; each of the three vectors may be left
    out.

    Queries and keys meet the N vectors once and pairs gather: ``(T + S) N K`` products; the values'
    part sums weights by bucket and then meets the vectors: ``T N K``, not ``T S K``.

    Source: Wu et al. 2021, iRPE (arXiv:2107.14222), contextual mode on queries, keys and values;
    vectors begin at zero, so the layer begins without positions.
    """

    position: Buckets

    def __init__(self, d_model: int, config: IRPEAttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        shape = (self.heads, self.position.count, self.head_dim)
        tables = {name: nn.Parameter(torch.empty(shape)) for name in config.on}
        self.tables = nn.ParameterDict(tables)

    def init_weights(self) -> None:
        for table in self.tables.values():
            nn.init.zeros_(table)

    def attend(self, rows: AttentionRows) -> Tensor:
        with torch.autocast(rows.q.device.type, enabled=False):
            return self._sum(rows).to(rows.q.dtype)

    def _sum(self, rows: AttentionRows) -> Tensor:
        """Outputs `(R, T, H, V)` in float32 or wider."""
        index = rows.score.bias_RHTS  # (R, X, T, S)
        assert index is not None
        (R, T, H, K), X = rows.q.shape, index.shape[1]
        allowed_RTS = rows.mask.dense(T, rows.k.shape[1], rows.q.device)
        wide = torch.promote_types(rows.q.dtype, torch.float32)
        share = H // self.kv_heads
        q = rows.q.to(wide).transpose(1, 2)
        k, v = (t.to(wide).repeat_interleave(share, 2).transpose(1, 2) for t in rows[1:3])
        logits = q @ k.mT  # (R, H, T, S)
        terms = {n: t.to(wide) for n, t in self.tables.items()}
        for x in range(X):
            at = index[:, x, None].expand(-1, H, -1, -1)
            if "k" in terms:
                logits = logits + torch.einsum("rhtk,hnk->rhtn", q, terms["k"]).gather(3, at)
            if "q" in terms:
                of_keys = torch.einsum("rhsk,hnk->rhsn", k, terms["q"])
                logits = logits + of_keys.gather(3, at.mT).mT
        logits = logits * K**-0.5
        if allowed_RTS is not None:
            hidden = ~allowed_RTS[:, None]
            # Padding sees nothing: its row of weights is zero, not NaN.
            logits = logits.masked_fill(hidden, torch.finfo(wide).min)
            p = logits.softmax(-1).masked_fill(hidden, 0)
        else:
            p = logits.softmax(-1)
        y = p @ v
        if "v" in terms:
            N = terms["v"].shape[1]
            for x in range(X):
                at = index[:, x, None].expand(-1, H, -1, -1)
                y = y + p.new_zeros(R, H, T, N).scatter_add(3, at, p) @ terms["v"]
        return y.transpose(1, 2)


@MIXERS.register("irpe_attention")
class IRPEAttentionConfig(HeadsConfig):
    """Attention with iRPE's vectors on keys, queries and values."""

    kind: Literal["irpe_attention"] = "irpe_attention"
    position: IRPEConfig = IRPEConfig()  # type: ignore[assignment]  # buckets; its mode is not read
    on: tuple[On, ...] = Field(
        default=("q", "k", "v"), min_length=1, description="what the vectors are added to"
    )

    layer = IRPEAttention

    def build_position(self, width: int, d_model: int) -> Position:
        return Buckets(IRPE(self.heads, width, self.position))
