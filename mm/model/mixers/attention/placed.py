"""What causal attention layers share whose pattern depends on the place in the document. R rows of
one document, L tokens of a call, S places to look at, H heads, G key heads, K head width, B rows, T
tokens, D model, N slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.norm import RMSNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import refuse_drawn
from mm.model.varlen import PackedRows, per_document
from mm.registry import PositionField
from mm.state import State


class PlacedAttention(Mixer):
    """Projections, positions and cache as in `Attention` (its weights fit); subclasses say what is
    read.

    A place is the index of a token in its document, whatever its position says.
    """

    caps = Caps(causal=True, step=True)
    replays = False
    masks = frozenset({"causal"})
    keeps_queries: ClassVar[bool] = False  # keys are cached with the queries of their places

    def __init__(self, d_model: int, config: PlacedConfig, linear: LinearFactory):
        super().__init__()
        H, G = config.heads, config.kv_heads or config.heads
        if H % G:
            raise ValueError(f"heads {H} is not a multiple of kv_heads {G}")
        if config.head_dim is None and d_model % H:
            raise ValueError(f"d_model {d_model} is not a multiple of heads {H}; set head_dim")
        K = config.head_dim or d_model // H
        self.heads, self.kv_heads, self.head_dim = H, G, K
        self.kind: str = config.kind  # type: ignore[attr-defined]
        self.position = config.position.build(K, heads=H, d_model=d_model)
        refuse_drawn(self.position, self.kind)
        cls = type(self.position)
        if cls.score is not Position.score or cls.gain is not Position.gain:
            raise ValueError(
                f"{self.kind}: position '{config.position.kind}' changes scores of all"
                " pairs of places: use none, rope, learned or sinusoidal"
            )
        self.caps = replace(type(self).caps, length_general=self.position.length_general)
        self.qkv = linear(d_model, (H + 2 * G) * K, "qkv")
        self.out = linear(H * K, d_model, "out")
        self.q_norm = RMSNorm(K) if config.qk_norm else None
        self.k_norm = RMSNorm(K) if config.qk_norm else None

    def rows(self, q_RLHK: Tensor, k_RLGK: Tensor, v_RLGK: Tensor) -> Tensor:
        """`(R, L, H, K)` of whole documents, place 0 first; what follows a document is ignored."""
        at = torch.arange(q_RLHK.shape[1], device=q_RLHK.device)[None]
        return self.read(q_RLHK, k_RLGK, v_RLGK, at, at)

    def read(
        self, q_RLHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, at_RL: Tensor, of_RS: Tensor
    ) -> Tensor:
        """`(R, L, H, K)` of queries at places ``at`` from keys of places ``of`` (-1 = none)."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        self.check_mask(ctx.mask)
        H, G, K = self.heads, self.kv_heads, self.head_dim
        B, T = x_BTD.shape[:2]
        f = ctx.layout.fields
        qkv = self.qkv(self.position.embed(x_BTD, f), ctx).view(B, T, H + 2 * G, K)
        q, k, v = qkv.split((H, G, G), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.position.rotate_call(ctx, q, k)
        if self.keeps_queries:
            k = torch.cat((k, q), dim=-1)
        if state is None:
            y, after = self._forward_full(q, k, v, ctx), None
        else:
            assert isinstance(state, KV | DraftKV)
            y, after = self._forward_cached(q, k, v, ctx, state.commit())
        return Out(self.out(y.reshape(B, T, H * K), ctx), after)

    def _forward_full(self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx) -> Tensor:
        return per_document(self.rows, ctx, q, k, v)

    def _forward_cached(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, cache: KV
    ) -> tuple[Tensor, State]:
        B, T = q.shape[:2]
        docs = PackedRows.of(ctx.layout, cache.count.shape[0])
        f = docs.fields(ctx.layout.fields)
        q, k, v = docs.unpack(q), docs.unpack(k), docs.unpack(v)
        at = docs.read(cache.count, 0)[:, None] + torch.arange(q.shape[1], device=q.device)
        after = None
        if not ctx.draft and cache.holds_call(docs, q.shape[1]):
            # Stored first, then read where it lies: no copy of the cache.
            after = advance(cache, k, v, f, docs, False)
            assert isinstance(after, KV)
            keys, values, known = after.seen()
            of = torch.arange(keys.shape[1], device=q.device).expand(keys.shape[:2])
            stored = known.document
        else:
            past_k, past_v, past = cache.past(docs, f)
            keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
            values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
            of = torch.arange(past_k.shape[2], device=q.device)
            of = torch.cat((of.expand(len(at), -1), at), dim=1)
            stored = torch.cat((past.document, f.document), dim=1)
        of = of.masked_fill(stored == 0, -1)
        y = self.read(q, keys.to(q.dtype), values.to(v.dtype), at, of)
        if after is None:
            after = advance(cache, k, v, f, docs, ctx.draft)
        return docs.pack(y, B, T), after

    def _widths(self) -> tuple[int, int]:
        return self.head_dim * (2 if self.keeps_queries else 1), self.head_dim

    def initial_state(self, n: int, max_len: int) -> KV:
        like = next(self.parameters()).detach()
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        return KV.empty(n, self.kv_heads, max_len, *self._widths(), False, like)

    def state_bytes(self, n: int, max_len: int) -> int:
        item = next(self.parameters()).element_size()
        return KV.bytes(n, self.kv_heads, max_len, *self._widths(), item)


def read_all(at_RL: Tensor, of_RS: Tensor) -> Tensor:
    """`(R, L, S)` bool: places up to the query's own that hold something."""
    return (of_RS[:, None] <= at_RL[:, :, None]) & (of_RS >= 0)[:, None]


class PlacedConfig(Config):
    """Settings that these layers share with `attention`."""

    heads: Annotated[int, Field(gt=0)] = 4
    kv_heads: (
        Annotated[int, Field(gt=0, description="key heads; default: as many as heads")] | None
    ) = None
    head_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None
    qk_norm: bool = True
    position: PositionField = Field(default="rope", validate_default=True)

    layer: ClassVar[type[PlacedAttention]]

    def build(self, d_model: int, linear: LinearFactory = dense) -> PlacedAttention:
        return self.layer(d_model, self, linear)
