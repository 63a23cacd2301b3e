"""Attention to compressed memory.

B rows, T tokens, D model, H heads, K head width, N slots, R rows of one document, L their length,
S groups, s tokens of a group, J groups that a call fills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.layout import Fields
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.attention.kv_cache import KV, KeyValueCache
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Compressed(DataclassState):
    """Keys and values of full groups, and the sums of the group that is being filled."""

    kv: KV  # an entry is a group
    partial: Tensor  # (N, 2, H, K)
    count: Tensor  # (N,) int64 tokens


class GroupCache(KeyValueCache):
    """Keeps keys and values of full groups of tokens, and the sums of the one being filled."""

    def __init__(self, heads: int, width: int, stride: int):
        super().__init__(heads, width, width)
        self.stride = stride

    def initial_state(self, n: int, max_len: int) -> Compressed:  # type: ignore[override]
        kv = super().initial_state(n, max(1, max_len // self.stride))
        return Compressed(
            kv, kv.k.new_zeros(n, 2, self.heads, self.key), torch.zeros_like(kv.count)
        )


def full_groups(count_R: Tensor, L: int, s: int) -> tuple[Tensor, Tensor]:
    """Full groups after ``count`` tokens `(R,)`, and the indices in a call of L that end the next.

    Returns:
        `(R,)` and `(R, J)`.
    """
    full = count_R // s
    more = torch.arange(-(-L // s), device=count_R.device)
    return full, (full[:, None] + more + 1) * s - 1 - count_R[:, None]


class MemoryCompressedAttention(Mixer):
    """Causal attention whose keys and values are shortened by a convolution of stride and width s.

    A query reads the compressed keys of the groups before its own, and of its own group what the
    convolution makes of the tokens up to the query: nothing later leaks in, and nothing before is
    missing. The state holds one key and value for s tokens.

    Source: Liu et al. 2018 (arXiv:1801.10198), section 4.2.3 (kernel 3, stride 3); alternate it
    with `local_attention` as they do. The own, unfinished group is this file's form of causality:
    the paper leaves it open.
    """

    documents_apart = True
    masks = frozenset({"causal"})

    def __init__(self, d_model: int, config: MemoryCompressedConfig, linear: LinearFactory):
        super().__init__()
        heads, stride = config.heads, config.stride
        self.heads, self.head_dim, self.stride = heads, d_model // heads, stride
        self.cache = GroupCache(heads, self.head_dim, stride)
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
            y, after = per_document(self._rows, ctx, q, kv), None
        else:
            assert isinstance(state, Compressed)
            y, after = self._forward_cached(q, kv, ctx, state)
        return Out(self.out(y.reshape(B, T, D), ctx), after)

    def _sums(self, kv: Tensor, count: Tensor, partial: Tensor | None) -> Tensor:
        """Sums `(R, L, 2, H, K)` of each token's group up to it: at its end, the convolution.

        Args:
            kv: `(R, L, 2, H, K)`.
        """
        R, L = kv.shape[:2]
        at = count[:, None] + torch.arange(L, device=kv.device)
        flat = kv.flatten(3)  # (R, L, 2, D)
        # Every offset's product at every token, of which each token keeps its phase's.
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

    def _forward_cached(
        self, q: Tensor, kv: Tensor, ctx: Ctx, state: Compressed
    ) -> tuple[Tensor, Compressed]:
        s, docs = self.stride, PackedRows.of(ctx.layout, state.count.shape[0])
        q, kv = docs.unpack(q), docs.unpack(kv)
        count, L = docs.read(state.count, 0), q.shape[1]
        begun = docs.read(state.partial)
        sums = self._sums(kv, count, begun)
        full, ends = full_groups(count, L, s)
        past = docs.read(state.kv.k), docs.read(state.kv.v)
        C = past[0].shape[2]
        at = count[:, None] + torch.arange(L, device=q.device)
        new = sums
        if L:
            index = ends.clamp(0, L - 1)[..., None, None, None].expand(-1, -1, *sums.shape[2:])
            new = sums.gather(1, index)
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
        y = docs.pack(self._attend(q, keys, values, seen, sums))
        end = count + docs.length
        done = end // s - full
        valid = (torch.arange(new.shape[1], device=q.device) < done[:, None]).to(torch.int32)
        none = torch.zeros_like(valid)
        f = Fields(none[..., None], valid, none)
        stored = state.kv.extend(new[:, :, 0], new[:, :, 1], f, docs._replace(length=done))
        open_ = ((end % s > 0) | (docs.length == 0))[:, None, None, None]
        partial = torch.where(open_, docs.last(sums, begun.to(sums.dtype)), 0)
        assert isinstance(stored, KV)
        return y, docs.write(replace(state, kv=stored), partial=partial, count=end)


@MIXERS.register("memory_compressed")
class MemoryCompressedConfig(EvenHeadsConfig):
    """Memory-compressed attention."""

    kind: Literal["memory_compressed"] = "memory_compressed"
    stride: Annotated[int, Field(gt=1, description="tokens of one compressed key")] = 3

    layer = MemoryCompressedAttention
