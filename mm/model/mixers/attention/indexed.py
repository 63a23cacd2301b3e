"""Causal attention whose pattern depends on the index of a token in its document.

B rows, T tokens, D model, H heads, G key heads, K head width, R rows of one document, L their
length, S keys.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mm.model.context import Ctx
from mm.model.layer import Caps
from mm.model.mixers.attention.base import GroupedAttention, HeadsConfig, changes
from mm.model.mixers.attention.kv_cache import KeyValueCache, VisibleKeys
from mm.model.positions.base import Position
from mm.model.varlen import per_document
from mm.state import State


class IndexedAttention(GroupedAttention):
    """Base: projections, positions and cache as in `Attention`; subclasses say what is read.

    An index counts the tokens of a document, whatever their positions say.
    """

    caps = Caps(causal=True, step=True)
    masks = frozenset({"causal"})
    separate_rows = True
    keeps_queries: ClassVar[bool] = False  # keys are cached with the queries of their tokens

    def make_cache(self) -> KeyValueCache:
        key = self.head_dim * (2 if self.keeps_queries else 1)
        return KeyValueCache(self.kv_heads, key, self.head_dim)

    def rows(self, q_RLHK: Tensor, k_RLGK: Tensor, v_RLGK: Tensor) -> Tensor:
        """`(R, L, H, K)` of whole documents, index 0 first; what follows a document is ignored."""
        at = torch.arange(q_RLHK.shape[1], device=q_RLHK.device)[None]
        return self.read(q_RLHK, k_RLGK, v_RLGK, at, at)

    def read(
        self, q_RLHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, at_RL: Tensor, of_RS: Tensor
    ) -> Tensor:
        """`(R, L, H, K)` of queries at indices ``at`` from keys at indices ``of`` (-1 = none)."""
        raise NotImplementedError

    def project(
        self, x_BTD: Tensor, ctx: Ctx, tail: State | None, serving: bool
    ) -> tuple[tuple[Tensor, ...], State | None]:
        (q, k, v), tail = super().project(x_BTD, ctx, tail, serving)
        return (q, torch.cat((k, q), dim=-1) if self.keeps_queries else k, v), tail

    def _forward_full(self, parts: tuple[Tensor, ...], ctx: Ctx) -> Tensor:
        return per_document(self.rows, ctx, *parts)

    def attend_cached(self, q: Tensor, seen: VisibleKeys, ctx: Ctx, *fades: Tensor) -> Tensor:
        of = seen.key_index().masked_fill(seen.known.document == 0, -1)
        return self.read(q, seen.k.to(q.dtype), seen.v, seen.query_index(), of)


def read_all(at_RL: Tensor, of_RS: Tensor) -> Tensor:
    """`(R, L, S)` bool: indices up to the query's own that hold something."""
    return (of_RS[:, None] <= at_RL[:, :, None]) & (of_RS >= 0)[:, None]


class IndexedConfig(HeadsConfig):
    """Settings that these layers share with `attention`."""

    qk_norm: bool = True

    def build_position(self, width: int, d_model: int) -> Position:
        position = super().build_position(width, d_model)
        if any(changes(position, hook) for hook in ("score", "gain")):
            raise ValueError(
                f"{self.kind}: position '{self.position.kind}' changes scores of all pairs of "  # type: ignore[attr-defined]
                "tokens: use none, rope, learned or sinusoidal"
            )
        return position
