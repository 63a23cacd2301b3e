"""What attention mixers with a form of their own share: documents as rows, and the cache of keys
and values. B rows, T tokens, D model, H heads, G key heads, K key width, V value width, N slots, R
rows of one document, L their length, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from mm.config import Config
from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer
from mm.model.length_buckets import LengthBuckets
from mm.model.mixers.attention.kv_cache import KV, DraftKV, advance
from mm.model.mixers.conv.state import DraftTail, Tail
from mm.model.norm import RMSNorm
from mm.model.positions.base import Position
from mm.model.positions.randomised import refuse_drawn
from mm.model.varlen import PackedRows, paired
from mm.registry import PositionField
from mm.state import DataclassState


class HeadsConfig(Config):
    """Heads and positions of an attention mixer."""

    heads: Annotated[int, Field(gt=0)] = 4
    kv_heads: (
        Annotated[int, Field(gt=0, description="key heads; default: as many as heads")] | None
    ) = None
    head_dim: Annotated[int, Field(gt=0, description="default: d_model / heads")] | None = None
    position: PositionField = Field(default="rope", validate_default=True)

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """Heads, key heads and head width.

        Raises:
            ValueError: heads that do not divide.
        """
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {kv_heads}")
        if self.head_dim is None and d_model % self.heads:
            raise ValueError(
                f"d_model {d_model} is not a multiple of heads {self.heads}; set head_dim"
            )
        return self.heads, kv_heads, self.head_dim or d_model // self.heads

    def placed(self, width: int, d_model: int) -> Position:
        """The position of parts of ``width``."""
        return self.position.build(width, heads=self.heads, d_model=d_model)


class Sizes(NamedTuple):
    """What a place of the cache holds."""

    heads: int
    key: int
    value: int


class CachedAttention(Mixer):
    """Base: `attended` brings rows of one document, with what their slots hold, to `attend`."""

    caps = Caps(causal=True, bidirectional=True, step=True)
    replays = False
    heads: int  # as positions count them

    def __init__(self, cached: Sizes, position: Position):
        super().__init__()
        if type(position).gain is not Position.gain:
            raise ValueError(
                f"{type(self).__name__} knows no positions with a gain after the softmax"
            )
        refuse_drawn(position, type(self).__name__)
        self.cached, self.position = cached, position
        self.scored = type(position).score is not Position.score
        self.caps = replace(type(self).caps, length_general=position.length_general)

    def attend(
        self,
        q_RTHK: Tensor,
        k_RSGK: Tensor,
        v_RSGV: Tensor,
        allowed_RTS: Tensor | None,
        causal: bool,
        bias_RHTS: Tensor | None,
        cached: bool,
    ) -> Tensor:
        """Outputs `(R, T, ...)` of rows of one document; ``cached``: the keys come from the
        cache.
        """
        mask, score = MaskSpec(allowed_RTS, causal), ScoreSpec(bias_RHTS)
        return attention(q_RTHK, k_RSGK, v_RSGV, mask, score)

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        if not serving:
            self._groups(ctx)
        if self.position.key:
            self.position.prepare_call(ctx)

    def _groups(self, ctx: Ctx) -> LengthBuckets | None:
        """The call's documents by length, with what the mask is within each group."""
        return ctx.cached_on_host("attention.dense_groups", LengthBuckets.of)

    def rotated(self, q_BTHK: Tensor, k_BTGK: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions."""
        return self.position.rotate_call(ctx, q_BTHK, k_BTGK)

    def attended(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Ctx, cache: KV | None
    ) -> tuple[Tensor, KV | DraftKV | None]:
        """`attend` over the call's documents `(B, T, H, .)` and what their slots hold."""
        B, T = q.shape[:2]
        if cache is None:
            return self.whole((q, k, v), ctx), None
        docs = PackedRows.of(ctx.layout, cache.count.shape[0])
        f = docs.fields(ctx.layout.fields)
        q, k, v = docs.unpack(q), docs.unpack(k), docs.unpack(v)
        after: KV | DraftKV | None = None
        if not ctx.draft and cache.holds_call(docs, q.shape[1]):
            # Decoding's common case: stored first, then attended to where it lies.
            after = advance(cache, k, v, f, docs, False)
            assert isinstance(after, KV)
            keys, values, known = after.seen()
        else:
            past_k, past_v, past_f = cache.past(docs, f)
            keys = torch.cat((past_k.transpose(1, 2).to(k.dtype), k), dim=1)
            values = torch.cat((past_v.transpose(1, 2).to(v.dtype), v), dim=1)
            known = paired(lambda old, new: torch.cat((old, new), dim=1), past_f, f)
        bias = self.position.score(q[:, :, : self.heads], f, known) if self.scored else None
        y = self.attend(
            q,
            keys.to(q.dtype),
            values.to(v.dtype),
            ctx.mask.dense(f, known),
            False,
            bias,
            True,
        )
        if after is None:
            after = advance(cache, k, v, f, docs, ctx.draft)
        return docs.pack(y, B, T), after

    def whole(self, parts: tuple[Tensor, ...], ctx: Ctx) -> Tensor:
        """`attend` inside the call's documents: ``parts`` are its first arguments."""
        attend: Callable[..., Tensor] = self.attend  # some take more than queries, keys and values
        B, T = parts[0].shape[:2]
        f = ctx.layout.fields
        groups = self._groups(ctx)
        if groups is None:
            docs = PackedRows.of(ctx.layout, 0)
            rows = docs.fields(f)
            q = docs.unpack(parts[0][:, :, : self.heads])
            bias = self.position.score(q, rows, rows) if self.scored else None
            allowed = ctx.mask.dense(rows, rows)
            y = attend(*map(docs.unpack, parts), allowed, False, bias, False)
            return docs.pack(y, B, T)
        known = [f.position, f.document, f.modality, *f.extra.values()] if self.scored else []
        done = []
        for group, taken in groups.split(*parts, *known):
            parted, rest, bias = taken[: len(parts)], taken[len(parts) :], None
            if self.scored:
                position, document, modality, *extra = rest
                named = dict(zip(f.extra, extra, strict=True))
                gf = Fields(position, document, modality, named)
                bias = self.position.score(parted[0][:, :, : self.heads], gf, gf)
            done.append(attend(*parted, group.allowed, group.causal, bias, False))
        return groups.join(done, B, T)

    # ---- the State ----

    def _like(self) -> Tensor:
        return next(self.parameters())

    def stored_as(self) -> Tensor:
        """An empty tensor of the dtype in which keys and values are cached."""
        like = self._like()
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        return like.detach()

    def initial_state(self, n: int, max_len: int) -> Any:
        return KV.empty(
            n, self.cached.heads, max_len, self.cached.key, self.cached.value, False,
            self.stored_as(),
        )  # fmt: skip

    def state_bytes(self, n: int, max_len: int) -> int:
        item = self._like().element_size()
        return KV.bytes(n, self.cached.heads, max_len, self.cached.key, self.cached.value, item)


class GroupedAttention(CachedAttention):
    """Base: one projection to queries, keys and values, and groups of heads that share a key."""

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        position: Position,
        linear: LinearFactory,
        qk_norm: bool = False,
    ):
        super().__init__(Sizes(kv_heads, head_dim, head_dim), position)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = linear(d_model, (heads + 2 * kv_heads) * head_dim, "qkv")
        self.out = linear(heads * head_dim, d_model, "out")
        self.q_norm = RMSNorm(head_dim) if qk_norm else None
        self.k_norm = RMSNorm(head_dim) if qk_norm else None

    def projected(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, T, H, K)`, keys and values `(B, T, G, K)`, with their positions."""
        H, G, K = self.heads, self.kv_heads, self.head_dim
        x_BTD = self.position.embed(x_BTD, ctx.layout.fields)
        qkv = self.qkv(x_BTD, ctx).view(*x_BTD.shape[:2], H + 2 * G, K)
        q, k, v = qkv.split((H, G, G), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return *self.rotated(q, k, ctx), v


@dataclass(frozen=True)
class TailedKV(DataclassState):
    """Cached keys and values, and the last inputs of what looks a few tokens back."""

    kv: Any  # KV, DraftKV, or another State with `commit`
    tail: Tail | DraftTail

    def accept(self, n_N: Tensor) -> TailedKV:
        return TailedKV(self.kv.accept(n_N), self.tail.accept(n_N))

    def commit(self) -> TailedKV:
        """Everything drafted counts."""
        return TailedKV(self.kv.commit(), self.tail.commit())
