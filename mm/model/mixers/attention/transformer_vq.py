"""Attention in linear time over quantised keys.

B rows, T tokens, D model, H heads, G key heads, K head width, S codes, N slots, R rows of one
document, L their length, n blocks of b tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Sum
from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.norm import RMSNorm
from mm.model.stateful import StatePart
from mm.model.varlen import PackedRows, per_document
from mm.registry import MIXERS
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Codes(DataclassState):
    """What lies further back than the block before, summed by code; and the two last blocks."""

    number: Tensor  # (N, G, S) float32 or wider
    values: Tensor  # (N, G, S, K) their sums
    k: Tensor  # (N, 2 b, G, K) quantised keys of the block before and of the own one
    v: Tensor  # (N, 2 b, G, K)
    code: Tensor  # (N, 2 b, G) int64
    count: Tensor  # (N,) int64 tokens


class CodeSums(StatePart):
    """Keeps the two last blocks of ``block`` tokens, and by code what came before them.

    Args:
        heads: G.
        codes: S.
        width: K.
        block: b.
    """

    def __init__(self, heads: int, codes: int, width: int, block: int):
        super().__init__()
        self.heads, self.codes, self.width, self.block = heads, codes, width, block

    def initial_state(self, n: int, max_len: int) -> Codes:
        G, S, K, b = self.heads, self.codes, self.width, self.block
        k, v = (self.zeros(n, 2 * b, G, K) for _ in "kv")
        code = self.zeros(n, 2 * b, G, dtype=torch.long)
        count = self.zeros(n, dtype=torch.long)
        return Codes(self.zeros(n, G, S), self.zeros(n, G, S, K), k, v, code, count)


def count_codes(
    code_RLG: Tensor, v_RLGK: Tensor, counts_RL: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """How often each code occurs `(R, G, S)`, and the sum of its values `(R, G, S, K)`."""
    R, _, G, K = v_RLGK.shape
    keep = counts_RL[..., None].expand_as(code_RLG)
    code = code_RLG.transpose(1, 2)
    number = v_RLGK.new_zeros(R, G, size).scatter_add(
        2, code, keep.transpose(1, 2).to(v_RLGK.dtype)
    )
    values = v_RLGK.masked_fill(~keep[..., None], 0).transpose(1, 2)
    at = code[..., None].expand(-1, -1, -1, K)
    return number, v_RLGK.new_zeros(R, G, size, K).scatter_add(2, at, values)


class TransformerVQ(Mixer):
    """``softmax(q . k^ + bias) v`` over all earlier tokens, with keys ``k^`` from a codebook.

    Tokens with the same key have the same weight, so what lies behind the block before is one term
    a code: ``exp(q . c_s + log number_s)`` times the mean of its values. Exact, in linear time, and
    the state does not grow. ``bias`` belongs to distances and is 0 behind the block before. Keys
    learn through straight-through gradients in the own block and the one before; codes are the
    moving averages of the keys they stand for (`after_step`), and ``commitment`` in ``aux`` is the
    mean squared distance that a loss may add. The output is gated as in GAU.

    Source: Lingle 2023 (arXiv:2309.16354), section 3.
    """

    documents_apart = True
    masks = frozenset({"causal"})
    codes: Tensor
    size: Tensor
    total: Tensor

    def __init__(self, d_model: int, config: TransformerVQConfig, linear: LinearFactory):
        super().__init__()
        H, G = config.heads, config.kv_heads
        if d_model % H or H % G:
            raise ValueError(
                f"transformer_vq: heads {H} must divide d_model {d_model}, and kv_heads {G} heads"
            )
        K = d_model // H
        self.heads, self.kv_heads, self.head_dim = H, G, K
        self.block, self.decay = config.block, config.decay
        self.sums = CodeSums(G, config.codes, K, config.block)
        self.qkv = linear(d_model, (H + 2 * G) * K, "qkv")
        self.gate = linear(d_model, H * K, "gate")
        self.out = linear(H * K, d_model, "out")
        self.q_norm, self.k_norm = RMSNorm(K), RMSNorm(K)
        self.bias = nn.Parameter(torch.empty(H, 2 * config.block))
        self.register_buffer("codes", torch.empty(G, config.codes, K))
        self.register_buffer("size", torch.empty(G, config.codes))
        self.register_buffer("total", torch.empty(G, config.codes, K))

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.codes)  # normed keys have length sqrt(K), too
        self.size.fill_(1.0)
        self.total.copy_(self.codes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move like any module, but moving averages never below float32."""
        kept = {n: b for n, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if new is not None and new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device)
        return self

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        if "codes" not in stats:
            return
        total, number = stats["codes"]
        with torch.no_grad():
            self.size.lerp_(number[..., 0].to(self.size), 1 - self.decay)
            self.total.lerp_(total.to(self.total), 1 - self.decay)
            # A code that nothing came to for long keeps its place.
            used = self.size[..., None] > 1e-3
            self.codes.copy_(torch.where(used, self.total / self.size[..., None], self.codes))

    def quantise(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(..., G, K)` to codes `(..., G)` and to their vectors with the keys' gradient."""
        with torch.no_grad():
            codes = self.codes.to(k.dtype)
            near = codes.square().sum(-1) - 2 * torch.einsum("...gk,gsk->...gs", k, codes)
            code = near.argmin(-1)
            heads = torch.arange(self.kv_heads, device=k.device)
            found = codes[heads, code]
        return code, k + (found - k).detach()

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        self.check_mask(ctx.mask)
        (B, T), H, G, K = x_BTD.shape[:2], self.heads, self.kv_heads, self.head_dim
        q, k, v = self.qkv(x_BTD, ctx).view(B, T, H + 2 * G, K).split((H, G, G), dim=2)
        wide = torch.promote_types(v.dtype, torch.float32)
        q, k, v = self.q_norm(q).to(wide) * K**-0.5, self.k_norm(k).to(wide), v.to(wide)
        with torch.autocast(q.device.type, enabled=False):
            code, key = self.quantise(k)
            if state is None:
                y, after = per_document(self._rows, ctx, q, key, v, code), None
            else:
                assert isinstance(state, Codes)
                y, after = self._forward_cached(q, key, v, code, ctx, state)
        y = y.flatten(2).to(x_BTD.dtype) * F.silu(self.gate(x_BTD, ctx))
        return Out(self.out(y, ctx), after, None, self._statistics(k, code, ctx))

    def _statistics(self, k: Tensor, code: Tensor, ctx: Ctx) -> dict[str, Sum]:
        if not (self.training and torch.is_grad_enabled()):
            return {}
        real = (ctx.layout.fields.document > 0)[..., None]
        heads = torch.arange(self.kv_heads, device=k.device)
        far = (k - self.codes.to(k.dtype)[heads, code]).square().mean(-1, keepdim=True)
        far = far.masked_fill(~real[..., None], 0).sum()
        with torch.no_grad():
            keep = real[..., 0].flatten()[None]
            number, total = count_codes(
                code.flatten(0, 1)[None], k.flatten(0, 1)[None], keep, self.codes.shape[1]
            )
        return self.report(
            commitment=Sum(far, real.sum() * float(self.kv_heads)),
            codes=Sum(total[0], number[0][..., None]),
        )

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        code: Tensor,
        valid_RL: Tensor,
        number: Tensor | None,
        values: Tensor | None,
    ) -> Tensor:
        """`(R, n b, H, K)` of queries `(R, n b, H, K)` in blocks.

        Args:
            number, values: what lies before the first, by code.
        """
        (R, L, G, K), b, S = k.shape, self.block, self.codes.shape[1]
        n, H = L // b, self.heads
        # What is not there may be a refused guess that held inf.
        k, v = (t.masked_fill(~valid_RL[..., None, None], 0) for t in (k, v))
        blocked = lambda t: t.unflatten(1, (n, b))
        # What the block before last and all before it hold, by code.
        tally, sums = count_codes(
            code.reshape(R * n, b, G), v.reshape(R * n, b, G, K), valid_RL.reshape(R * n, b), S
        )
        before = []
        for t, begun in ((tally.view(R, n, G, S), number), (sums.view(R, n, G, S, K), values)):
            whole = t.cumsum(1)
            whole = F.pad(whole, [0, 0] * (t.dim() - 2) + [2, 0])[:, :n]
            before.append(whole if begun is None else whole + begun[:, None])
        tally, sums = before
        q = blocked(q).view(R, n, b, G, H // G, K)
        far = torch.einsum("rnqghk,gsk->rnqghs", q, self.codes.to(q.dtype))
        far = far + tally.clamp_min(1e-30).log()[:, :, None, :, None]
        far = far.masked_fill((tally == 0)[:, :, None, :, None], -math.inf)
        two = lambda t: torch.cat((F.pad(t[:, :-1], [0, 0] * (t.dim() - 2) + [1, 0]), t), 2)
        near = torch.einsum("rnqghk,rnsgk->rnqghs", q, two(blocked(k)))
        index = torch.arange(2 * b, device=q.device)
        distance = index[b:, None] - index
        bias = self.bias.to(q.dtype)[:, distance.clamp_min(0)].view(G, H // G, b, 2 * b)
        near = near + bias.permute(2, 0, 1, 3)
        seen = (distance >= 0) & two(blocked(valid_RL))[:, :, None]
        # A token that is not there reads itself: no row of scores may be empty.
        seen = (seen | (distance == 0))[:, :, :, None, None]
        p = torch.cat((near.masked_fill(~seen, -math.inf), far), -1).softmax(-1)
        mean = sums / tally.clamp_min(1)[..., None]
        y = torch.einsum("rnqghs,rnsgk->rnqghk", p[..., : 2 * b], two(blocked(v)))
        y = y + torch.einsum("rnqghs,rngsk->rnqghk", p[..., 2 * b :], mean)
        return y.reshape(R, L, H, K)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, code: Tensor) -> Tensor:
        R, L = q.shape[:2]
        if not q.shape[:2].numel():
            return q
        pad = -L % self.block
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
        valid = (torch.arange(L + pad, device=q.device) < L).expand(R, -1)
        return self._blocks(q, k, v, F.pad(code, (0, 0, 0, pad)), valid, None, None)[:, :L]

    def _forward_cached(
        self, q: Tensor, k: Tensor, v: Tensor, code: Tensor, ctx: Ctx, state: Codes
    ) -> tuple[Tensor, Codes]:
        b, docs = self.block, PackedRows.of(ctx.layout, state.count.shape[0])
        q, k, v, code = (docs.unpack(t) for t in (q, k, v, code))
        R, L = q.shape[:2]
        count = docs.read(state.count, 0)
        size = b * (2 + -(-max(L - 1, 0) // b))
        # Tokens of the call, after what its blocks hold already; what is not there stays.
        at = b + (count % b)[:, None] + torch.arange(L, device=q.device)

        def lengthen(old: Tensor, new: Tensor) -> Tensor:
            trailing = [0, 0] * (old.dim() - 2)
            old = F.pad(old, [*trailing, 0, size - old.shape[1]])
            index = at.view(R, L, *[1] * (new.dim() - 2)).expand_as(new)
            there = docs.valid.view(R, L, *[1] * (new.dim() - 2))
            return old.scatter(
                1, index, torch.where(there, new.to(old.dtype), old.gather(1, index))
            )

        long_k, long_v = (
            lengthen(docs.read(old).to(new.dtype), new) for old, new in ((state.k, k), (state.v, v))
        )
        long_code = lengthen(docs.read(state.code, 0), code)
        queries = lengthen(q.new_zeros(R, 2 * b, *q.shape[2:]), q)
        index = torch.arange(size, device=q.device)
        valid = (index < (b + count % b + docs.length)[:, None]) & (
            (count >= b)[:, None] | (index >= b)
        )
        number, values = docs.read(state.number), docs.read(state.values)
        y = self._blocks(queries, long_k, long_v, long_code, valid, number, values)
        y = y.gather(1, at[..., None, None].expand(R, L, *y.shape[2:]))
        # Blocks that are full now leave the last two: they join the sums.
        shift = ((count + docs.length) // b - count // b)[:, None]
        left = valid & (index < shift * b)
        more, summed = count_codes(long_code, long_v.to(values.dtype), left, number.shape[2])
        # Past the end there is nothing yet: whatever stands there is not valid.
        last = (shift * b + torch.arange(2 * b, device=q.device)).clamp_max(size - 1)
        take = lambda t: t.gather(
            1, last.view(R, 2 * b, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:])
        )
        after = docs.write(
            state,
            number=torch.where(shift[..., None] > 0, number + more, number),
            values=torch.where(shift[..., None, None] > 0, values + summed, values),
            **{"k": take(long_k), "v": take(long_v), "code": take(long_code)},
            count=count + docs.length,
        )
        return docs.pack(y), after


@MIXERS.register("transformer_vq")
class TransformerVQConfig(LayerConfig):
    """Linear-time attention over vector-quantised keys."""

    kind: Literal["transformer_vq"] = "transformer_vq"
    heads: Annotated[int, Field(gt=0)] = 4
    kv_heads: Annotated[int, Field(gt=0, description="key heads, each with a codebook")] = 1
    codes: Annotated[int, Field(gt=0, description="of a codebook")] = 512
    block: Annotated[int, Field(gt=0, description="tokens; it and the one before are exact")] = 512
    decay: Annotated[float, Field(ge=0, lt=1, description="of the codes' moving averages")] = 0.99

    layer = TransformerVQ
    small = {"heads": 2, "codes": 4, "block": 2}
