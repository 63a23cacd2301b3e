"""Attention to compressed memory. B rows, T tokens, D model, H heads, K head width, N slots, R rows
of one document, L their length, S groups, s places of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.linears.dense import dense
from mm.model.mixers.attention.kv_cache import KV
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Compressed(DataclassState):
    """Keys and values of full groups, and the sums of the group that is being filled."""

    kv: KV  # a place is a group
    partial: Tensor  # (N, 2, H, K)
    count: Tensor  # (N,) int64 tokens

    def accept(self, n_N: Tensor) -> Compressed:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Compressed:
        return self


@dataclass(frozen=True)
class DraftCompressed(DataclassState):
    """The state before a call, and the sums of its group at every token of the call."""

    base: Compressed
    sums: Tensor  # (N, L, 2, H, K)
    length: Tensor  # (N,)
    fresh: Tensor  # (N,) bool
    hit: Tensor  # (N,) bool
    stride: int

    def accept(self, n_N: Tensor) -> Compressed:
        n, s, L = torch.minimum(n_N.to(self.length), self.length), self.stride, self.sums.shape[1]
        count = torch.where(self.fresh, 0, self.base.count)
        full, ends = full_groups(count, L, s)
        done = (count + n) // s - full
        take = lambda at: self.sums.gather(
            1,
            at.clamp(0, max(L - 1, 0))[..., None, None, None].expand(-1, -1, *self.sums.shape[2:]),
        )
        if L == 0:
            partial = torch.where(self.fresh[:, None, None, None], 0, self.base.partial)
            return Compressed(self.base.kv, partial, count)
        k, v = take(ends).unbind(2)
        valid = torch.arange(ends.shape[1], device=n.device) < done[:, None]
        zeros = torch.zeros_like(valid, dtype=torch.int32)
        kv = self.base.kv.append(
            k, v, Fields(zeros[..., None], valid.to(torch.int32), zeros), done, self.fresh, self.hit
        )
        open_ = ((count + n) % s > 0)[:, None, None, None]
        last = torch.where(open_, take(n[:, None] - 1)[:, 0], 0)
        old = torch.where(self.fresh[:, None, None, None], 0, self.base.partial)
        partial = torch.where((n > 0)[:, None, None, None], last, old)
        return Compressed(kv, partial, count + n)

    def commit(self) -> Compressed:
        return self.accept(self.length)


def full_groups(count_R: Tensor, L: int, s: int) -> tuple[Tensor, Tensor]:
    """Full groups after ``count`` tokens `(R,)`, and the places of a call of L that end the next
    ones `(R, J)`.
    """
    full = count_R // s
    more = torch.arange(-(-L // s), device=count_R.device)
    return full, (full[:, None] + more + 1) * s - 1 - count_R[:, None]


class MemoryCompressedAttention(Mixer):
    """Causal attention whose keys and values are shortened by a convolution of stride s and width
    s.

    A query reads the compressed keys of the groups before its own, and of its own group what the
    convolution makes of the places up to the query: nothing later leaks in, and nothing before is
    missing. The state holds one key and value for s tokens.

    Source: Liu et al. 2018 (arXiv:1801.10198), section 4.2.3 (kernel 3, stride 3); alternate it
    with `local_attention` as they do. The own, unfinished group is this file's form of causality:
    the paper leaves it open.
    """

    caps = Caps(causal=True, step=True)
    masks = frozenset({"causal"})

    def __init__(self, d_model: int, heads: int, stride: int, linear: LinearFactory):
        super().__init__()
        self.heads, self.head_dim, self.stride = heads, d_model // heads, stride
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.out = linear(d_model, d_model, "out")
        self.conv_weight = nn.Parameter(torch.empty(2, stride, d_model, d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.conv_weight, std=(self.stride * self.conv_weight.shape[-1]) ** -0.5)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        self.check_mask(ctx.mask)
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD, ctx).view(B, T, 3, self.heads, self.head_dim)
        q, kv = qkv[:, :, 0], qkv[:, :, 1:]
        if state is None:
            y, after = self._forward_full(q, kv, ctx), None
        else:
            assert isinstance(state, Compressed | DraftCompressed)
            y, after = self._forward_cached(q, kv, ctx, state.commit())
        return Out(self.out(y.reshape(B, T, D), ctx), after)

    def _sums(self, kv: Tensor, count: Tensor, partial: Tensor | None) -> Tensor:
        """Sums `(R, L, 2, H, K)` of each place's group up to the place: at its end they are the
        convolution. ``kv`` `(R, L, 2, H, K)`.
        """
        R, L = kv.shape[:2]
        at = count[:, None] + torch.arange(L, device=kv.device)
        flat = kv.flatten(3)  # (R, L, 2, D)
        # Every offset's product at every place, of which each place keeps its phase's.
        own = torch.einsum("rlcd,csde->rlsce", flat, self.conv_weight.to(kv.dtype))
        phase = (at % self.stride)[..., None, None, None].expand(-1, -1, 1, *own.shape[3:])
        own = own.gather(2, phase)[:, :, 0]
        sums = own
        for back in range(1, min(self.stride, L)):
            reach = (at % self.stride >= back)[..., None, None]
            earlier = F.pad(own[:, :-back], (0, 0, 0, 0, back, 0))
            sums = sums + torch.where(reach, earlier, 0)
        sums = sums.view_as(kv)
        if partial is None:
            return sums
        same = (at // self.stride == (count // self.stride)[:, None])[..., None, None, None]
        return sums + torch.where(same, partial[:, None].to(sums.dtype), 0)

    def _attend(
        self, q: Tensor, k_RSHK: Tensor, v_RSHK: Tensor, seen_RLS: Tensor, own: Tensor
    ) -> Tensor:
        """`(R, L, H, K)` from the groups seen and each query's ``own``, `(R, L, 2, H, K)`."""
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, (k, v) = q.to(wide) * self.head_dim**-0.5, own.to(wide).unbind(2)
            far = torch.einsum("rlhk,rshk->rlhs", q, k_RSHK.to(wide))
            far = far.masked_fill(~seen_RLS[:, :, None], -math.inf)
            p = torch.cat((far, (q * k).sum(-1, keepdim=True)), -1).softmax(-1)
            y = torch.einsum("rlhs,rshk->rlhk", p[..., :-1], v_RSHK.to(wide)) + p[..., -1:] * v
        return y.to(own.dtype)

    def _rows(self, q: Tensor, kv: Tensor) -> Tensor:
        (R, L), s = q.shape[:2], self.stride
        sums = self._sums(kv, torch.zeros(R, dtype=torch.long, device=q.device), None)
        k, v = sums[:, s - 1 :: s].unbind(2)
        at, groups = torch.arange(L, device=q.device), torch.arange(L // s, device=q.device)
        return self._attend(q, k, v, (groups < at[:, None] // s)[None], sums)

    def _forward_full(self, q: Tensor, kv: Tensor, ctx: Ctx) -> Tensor:
        return per_document(self._rows, ctx, q, kv)

    def _forward_cached(
        self, q: Tensor, kv: Tensor, ctx: Ctx, state: Compressed
    ) -> tuple[Tensor, Compressed | DraftCompressed]:
        (B, T), s = q.shape[:2], self.stride
        docs = PackedRows.of(ctx.layout, state.count.shape[0])
        q, kv = docs.unpack(q), docs.unpack(kv)
        count, L = docs.read(state.count, 0), q.shape[1]
        sums = self._sums(kv, count, docs.read(state.partial))
        full, ends = full_groups(count, L, s)
        past = docs.read(state.kv.k), docs.read(state.kv.v)
        C = past[0].shape[2]
        at = count[:, None] + torch.arange(L, device=q.device)
        new = (
            sums.gather(
                1,
                ends.clamp(0, max(L - 1, 0))[..., None, None, None].expand(-1, -1, *sums.shape[2:]),
            )
            if L
            else sums
        )
        keys, values = (
            torch.cat((old.transpose(1, 2).to(kv.dtype), fresh), 1)
            for old, fresh in zip(past, new.unbind(2), strict=True)
        )
        # Group indices: those in the cache, then those that this call fills.
        cached = torch.arange(C, device=q.device)
        later = full[:, None] + torch.arange(new.shape[1], device=q.device)
        seen = torch.cat(
            (
                (cached < full[:, None])[:, None].expand(-1, L, -1),
                later[:, None] < (at // s)[..., None],
            ),
            dim=-1,
        )
        y = docs.pack(self._attend(q, keys, values, seen, sums), B, T)
        w = docs.written(state.count.shape[0])
        kept = w.take(sums).to(state.partial.dtype)
        draft = DraftCompressed(state, kept, w.length, w.fresh, w.hit, s)
        return y, draft if ctx.draft else draft.commit()

    def initial_state(self, n: int, max_len: int) -> Compressed:
        like, H, K = self.conv_weight.detach(), self.heads, self.head_dim
        if torch.is_autocast_enabled(like.device.type):
            like = like.new_empty(0, dtype=torch.get_autocast_dtype(like.device.type))
        kv = KV.empty(n, H, max(1, max_len // self.stride), K, K, False, like)
        return Compressed(
            kv, like.new_zeros(n, 2, H, K), torch.zeros(n, dtype=torch.long, device=like.device)
        )

    def state_bytes(self, n: int, max_len: int) -> int:
        H, K, item = self.heads, self.head_dim, self.conv_weight.element_size()
        kv = KV.bytes(n, H, max(1, max_len // self.stride), K, K, item)
        return kv + n * (2 * H * K * item + 8)


@MIXERS.register("memory_compressed")
class MemoryCompressedConfig(Config):
    """Memory-compressed attention."""

    kind: Literal["memory_compressed"] = "memory_compressed"
    heads: Annotated[int, Field(gt=0)] = 4
    stride: Annotated[int, Field(gt=1, description="places of one compressed key")] = 3

    def build(self, d_model: int, linear: LinearFactory = dense) -> MemoryCompressedAttention:
        if d_model % self.heads:
            raise ValueError(f"d_model {d_model} is not a multiple of heads {self.heads}")
        return MemoryCompressedAttention(d_model, self.heads, self.stride, linear)

    @classmethod
    def smallest(cls) -> MemoryCompressedConfig:
        return cls(heads=2)
