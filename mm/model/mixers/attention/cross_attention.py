"""Attention to a `Memory`: what an encoder made of the source, neighbours, another sequence.

B rows, T tokens, D model, H heads, G key heads, K head width, N slots, R rows of one document, L
their length, S positions of a memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec
from mm.layout import Fields
from mm.mask import Full
from mm.model.context import Ctx, Memory
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.length_buckets import document_groups
from mm.model.memories import MEMORIES, memory_groups
from mm.model.mixers.attention.base import HeadSizesConfig
from mm.model.mixers.attention.kv_cache import KV, KeyValueCache
from mm.model.norm import RMSNorm
from mm.model.varlen import PackedRows, memory_rows, merge_fields
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class DraftMemory(DataclassState):
    """What the slots remember after a draft call: the same, however many tokens are accepted."""

    after: KV

    def accept(self, n_N: Tensor) -> KV:
        return self.after

    def commit(self) -> KV:
        return self.after


class CrossAttention(Mixer):
    """Queries of the documents, keys and values of the memory that each of them has.

    A document without one gets zeros. The State holds keys and values of the memory alone, made
    once, where a document begins.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.3; cached apart from the queries:
    Monteiro et al. 2024, XC-Cache (arXiv:2404.15420), section 3.
    """

    documents_apart = True
    replays = False

    def __init__(self, d_model: int, config: CrossAttentionConfig, linear: LinearFactory):
        super().__init__()
        H, G, K = self.heads, self.kv_heads, self.head_dim = config.sizes(d_model)
        self.memory = config.memory
        self.caps = Caps(
            causal=True, bidirectional=False, reads=frozenset({MEMORIES + self.memory})
        )
        self.cache = KeyValueCache(G, K, K)
        self.q = linear(d_model, H * K, "q")
        self.kv = linear(d_model, 2 * G * K, "kv")
        self.out = linear(H * K, d_model, "out")
        self.q_norm, self.k_norm = (RMSNorm(K) if config.qk_norm else None for _ in range(2))

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        memory = ctx.memories.get(self.memory)
        if not serving and memory is not None:
            memory_groups(ctx, memory)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        q = self.q(x_BTD, ctx).unflatten(-1, (self.heads, self.head_dim))
        q = q if self.q_norm is None else self.q_norm(q)
        memory = ctx.memories.get(self.memory)
        if state is None:
            if memory is None:
                raise ValueError(
                    f"{self.path or 'cross_attention'} reads the memory '{self.memory}', which "
                    "this pass does not have: a backbone `encoder_decoder` makes one"
                )
            return Out(self.out(self._whole(q, memory, ctx).flatten(2), ctx))
        y, after = self._cached(q, memory, ctx, state)
        return Out(self.out(y.flatten(2), ctx), after)

    def _keys(self, memory: Memory, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, S, G, K)` of a memory."""
        there = replace(ctx, layout=memory.layout, ids=None)
        kv = self.kv(memory.x, there).unflatten(-1, (2 * self.kv_heads, self.head_dim))
        k, v = kv.chunk(2, dim=2)
        return (k if self.k_norm is None else self.k_norm(k)), v

    def _whole(self, q: Tensor, memory: Memory, ctx: Ctx) -> Tensor:
        """`(B, T, H, K)` of whole documents."""
        k, v = self._keys(memory, ctx)
        readers, groups = document_groups(ctx), memory_groups(ctx, memory)
        if readers is None or groups is None:  # a graph that nobody prepared
            docs, known = PackedRows.of(ctx.layout, 0), memory_rows(memory.layout, ctx.layout, 0)
            mask = memory.mask.dense(
                docs.fields(ctx.layout.fields), known.fields(memory.layout.fields)
            )
            rows = map(known.unpack, (k, v))
            return docs.pack(attention(docs.unpack(q), *rows, MaskSpec(mask)))
        done = []
        pairs = zip(readers.split(q), groups.split(k, v), strict=True)
        for (_, (own,)), (group, (keys, values)) in pairs:
            done.append(attention(own, keys.to(own.dtype), values, group.mask))
        return readers.join(done, *ctx.layout.shape)

    def _cached(
        self, q: Tensor, memory: Memory | None, ctx: Ctx, state: State
    ) -> tuple[Tensor, State]:
        """`(B, T, H, K)` of a call's documents, and what the slots remember after it."""
        state = state.commit()
        assert isinstance(state, KV)
        docs = PackedRows.of(ctx.layout, len(state.count))
        f = docs.fields(ctx.layout.fields)
        begins = docs.some_fresh()
        mask = Full() if memory is None else memory.mask
        after = state
        if not begins and docs.own_slots():
            seen = state.contents()
        else:
            k, v, known = state.past(docs, f)
            seen = k.transpose(1, 2), v.transpose(1, 2), known
        if begins:
            k, v, known, after = self._begin(q, memory, ctx, docs, state)
            join = lambda a, b: torch.cat((a, b), dim=1)
            seen = (
                join(seen[0].to(k.dtype), k),
                join(seen[1].to(v.dtype), v),
                merge_fields(join, seen[2], known),
            )
        k, v, known = seen
        allowed = MaskSpec(mask.dense(f, known))
        y = docs.pack(attention(docs.unpack(q), k.to(q.dtype), v.to(q.dtype), allowed))
        return y, DraftMemory(after) if ctx.draft else after

    def _begin(
        self, q: Tensor, memory: Memory | None, ctx: Ctx, docs: PackedRows, state: KV
    ) -> tuple[Tensor, Tensor, Fields, KV]:
        """Keys and values `(R, S, G, K)` of the documents that begin, and the State with them."""
        f = docs.fields(ctx.layout.fields)
        R = f.document.shape[0]
        if memory is None:  # none of them has one
            k = v = q.new_zeros(R, 0, self.kv_heads, self.head_dim)
            known, writes = f.map(lambda t: t[:, :0]), docs.slot_writes()
        else:
            rows = memory_rows(memory.layout, ctx.layout, docs.slots)
            k, v = map(rows.unpack, self._keys(memory, ctx))
            known, writes = rows.fields(memory.layout.fields), rows.slot_writes()
            fresh = docs.fresh[:, None].to(torch.int32)  # others have it in their slots
            known = known._replace(document=known.document * fresh)
        length = torch.where(writes.fresh, writes.length, 0)
        stored = known.map(writes.take)
        keys, values = (writes.take(t).to(state.k.dtype) for t in (k, v))
        return k, v, known, state.append(keys, values, stored, length, writes.fresh, True)


@MIXERS.register("cross_attention")
class CrossAttentionConfig(HeadSizesConfig):
    """Attention to what the backbone (or the caller) calls by a name: an encoder's output."""

    kind: Literal["cross_attention"] = "cross_attention"
    memory: Annotated[str, Field(description="name of what is attended to")] = "source"
    qk_norm: Annotated[bool, Field(description="RMS norm of queries and keys")] = True

    layer = CrossAttention
