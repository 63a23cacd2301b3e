"""Softmax attention over rows: the reference, and the implementations that equal it.

A row holds ONE document, or several that a `MaskSpec` separates; mixers put each document into its
own row (`mm.model.varlen`), because a masked key still meets the others as ``0 * value``, which is
NaN when the value is inf.

R rows, T queries, S keys, H query heads, G key heads (G divides H), K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from mm.kernels import compiler, device
from mm.kernels.attention import cudnn, flash_cpp, ops, rates, varlen
from mm.kernels.attention.spec import NO_MASK, PLAIN_SCORE, MaskSpec, ScoreSpec, find_set
from mm.kernels.op import NOTHING, Op, without_autocast


@Op
def attention(
    q_RTHK: Tensor,
    k_RSGK: Tensor,
    v_RSGV: Tensor,
    mask: MaskSpec = NO_MASK,
    score: ScoreSpec = PLAIN_SCORE,
    return_stats: Sequence[str] = (),
) -> Any:
    """Attend within rows; a query that may see nothing gets zeros.

    Args:
        q_RTHK: `(R, T, H, K)` queries, any float dtype; scores and softmax are float32 or wider.
        k_RSGK: `(R, S, G, K)` keys; query head h reads key head ``h // (H // G)``.
        v_RSGV: `(R, S, G, V)` values.
        mask: which keys a query sees; default all.
        score: what changes the scores; default nothing.
        return_stats: statistics to return besides, without gradient: "key_mass" `(R, H, S)`, what
            each key receives from all queries; "entropy" `(R, H, T)` of each query's weights, in
            nats.
    Returns:
        `(R, T, H, V)` in the dtype of the values; with ``return_stats`` a tuple of it and the
        statistics asked for, in that order.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; grouped heads: Ainslie et al. 2023
    (arXiv:2305.13245); soft-cap: Gemma 2 (arXiv:2408.00118), section 2; sink: gpt-oss
    (arXiv:2508.10925), section 2; fade: Press et al. 2021 (arXiv:2108.12409), section 3, and Lin
    et al. 2025 (arXiv:2503.02130); relative: Raffel et al. 2019 (arXiv:1910.10683), section 2.1.
    """
    R, T, H, K = q_RTHK.shape
    S, G = k_RSGK.shape[1], k_RSGK.shape[2]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    with torch.autocast(q_RTHK.device.type, enabled=False):
        q = q_RTHK.to(wide).reshape(R, T, G, H // G, K)
        logits = torch.einsum("rtghk,rsgk->rghts", q, k_RSGK.to(wide)) * score.factor(K)
        if score.softcap is not None:
            logits = score.softcap * (logits / score.softcap).tanh()
        bias = score.total_bias()
        if bias is not None:
            logits = logits + bias.to(wide).expand(R, H, T, S).reshape(logits.shape)
        seen = mask.dense(T, S, q.device)
        hidden = ~seen[:, None, None] if seen is not None else None
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        if score.sink_H is not None:
            column = score.sink_H.to(wide).view(G, H // G, 1, 1).expand(*logits.shape[:-1], 1)
            full = torch.cat((logits, column), -1).softmax(-1)
            p = full[..., :-1]
        else:
            full = p = logits.softmax(-1)
        if hidden is not None:
            # Filled twice: a query without keys has a NaN softmax, which must become zeros.
            p = p.masked_fill(hidden, 0)
        stats = {}
        if "key_mass" in return_stats:
            stats["key_mass"] = p.detach().sum(-2).flatten(1, 2)
        if "entropy" in return_stats:
            stats["entropy"] = torch.special.entr(full.detach().nan_to_num()).sum(-1).flatten(1, 2)
        if score.gain_RHTS is not None:
            p = p * score.gain_RHTS.to(wide).expand(R, H, T, S).reshape(p.shape)
        y = torch.einsum("rghts,rsgv->rtghv", p, v_RSGV.to(wide))
        y = y.reshape(R, T, H, v_RSGV.shape[-1]).to(v_RSGV.dtype)
        return (y, *(stats[name] for name in return_stats)) if return_stats else y


def _by_tiles(way: str) -> Callable[..., Any]:
    """Return the implementation in the module ``way``."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
    ) -> Any:
        y, lse = ops.run(way, q, k, v, mask, score)
        if not stats:
            return y
        mass, entropy = ops.measure(q, k, v, lse, mask, score)
        return (y, *({"key_mass": mass, "entropy": entropy}[name] for name in stats))

    return run


def _blocks_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
) -> str | None:
    if score.gain_RHTS is not None:
        return "it has no gain after the softmax"
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return "nothing to attend to"
    return None


def _flash_why_not(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec) -> str | None:
    """What neither kernel of whole tiles can do."""
    lacks = find_set(score, "bias_RHTS", "gain_RHTS", "relative_NH")
    if lacks := lacks or find_set(mask, "allowed_RTS"):
        return f"it has no {lacks}"
    if q.shape[-1] > 256 or v.shape[-1] > 256:
        return "heads wider than 256"
    return _blocks_why_not(q, k, v, mask, score, ())


def _triton_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
) -> str | None:
    if reason := _flash_why_not(q, k, v, mask, score):
        return reason
    if max(q.shape[-1], v.shape[-1]) > 128 and torch.float32 in (q.dtype, k.dtype, v.dtype):
        return "float32 heads wider than 128: no tile fits the registers"
    if max(x.shape[1:].numel() for x in (q, k, v)) >= 1 << 31:
        return "a row of 2^31 numbers or more"
    return device.why_not(q, k, v)


def _sdpa_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
) -> str | None:
    if score.gain_RHTS is not None:
        return "it has no gain after the softmax"
    if score.softcap is not None:
        return "it has no soft-cap"
    if stats:
        return "it keeps no statistics"
    if find_set(score, "bias_RHTS", "fade_RTH", "relative_NH"):
        return "it rounds the bias to the dtype of the queries"
    if score.sink_H is not None and q.device.type != "cpu":
        return "it rounds the sink to the dtype of the queries"
    T, S, plain = q.shape[1], k.shape[1], not mask.is_set() and score.sink_H is None
    if mask.causal and plain and T != S:
        return "its causal mask is aligned to the first key, not the last"
    if T == 0 or q.shape[0] == 0:
        return "no queries"
    if not plain and T * S > rates.SMALL:
        other = _blocks_why_not if q.device.type == "cpu" else _triton_why_not
        if other(q, k, v, mask, score, stats) is None:
            return "it would make a mask of all scores"
    return None


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
) -> Tensor:
    plain = not mask.is_set() and score.sink_H is None
    seen = None if plain else mask.dense(q.shape[1], k.shape[1], q.device)
    dtype = v.dtype
    if q.device.type == "cpu":
        # bf16 SDPA on a CPU is 4 times slower than fp32 at a few hundred tokens, and rounds the
        # probabilities.
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if score.sink_H is not None:
        y = _with_sink(q, k, v, seen, score.sink_H, score.factor(q.shape[-1]))
        return y.to(dtype)
    with without_autocast(q.device.type), _backends(q):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=mask.causal and seen is None,
            scale=score.scale,
            enable_gqa=k.shape[2] != q.shape[2],
        ).transpose(1, 2)
    if seen is not None:  # a query without keys: backends differ (NaN or zeros)
        y = y.masked_fill(~seen.any(-1)[:, :, None, None], 0)
    return y.to(dtype)


def _backends(q: Tensor) -> AbstractContextManager[Any]:
    """On a GPU all but cuDNN, which `cudnn` is asked for."""
    return sdpa_kernel(cudnn.OTHERS) if q.device.type == "cuda" else NOTHING


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, sink_H: Tensor, scale: float
) -> Tensor:
    """A sink as one more key of value zero: one more column makes its logit, and nobody else's."""
    T, S, K, V = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    width = max(K + 1, V)  # equal widths: unequal ones have no fused kernel on a CPU
    column = (sink_H.to(q.dtype) / scale)[:, None].expand(*q.shape[:-1], 1)
    q = F.pad(torch.cat((q, column), -1), (0, width - K - 1))
    key = F.one_hot(torch.tensor(K, device=k.device), width).to(k.dtype)
    k = torch.cat((key.expand(k.shape[0], 1, k.shape[2], width), F.pad(k, (0, width - K))), 1)
    v = F.pad(v, (0, width - V, 0, 0, 1, 0))
    if seen is None:
        seen = torch.ones(1, T, S, dtype=torch.bool, device=q.device)
    with without_autocast(q.device.type):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=F.pad(seen, (1, 0), value=True)[:, None],
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return y.transpose(1, 2)[..., :V]


# Queries below which SDPA is as fast; half as many where it would need a mask, 8 times as many in
# float32 where nothing is hidden (benchmarks/attention_cpu.py).
FEW = 128


def _cpp_why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Sequence[str]
) -> str | None:
    if reason := _flash_why_not(q, k, v, mask, score):
        return reason
    if any(x.dtype not in (torch.float32, torch.bfloat16) for x in (q, k, v)):
        return f"no kernel for {q.dtype}"
    few = FEW // 2 if mask.is_set() else FEW
    if q.dtype == torch.float32 and not mask.is_set() and not mask.causal:
        few = 8 * FEW
    if q.shape[1] < few and _sdpa_why_not(q, k, v, mask, score, stats) is None:
        return "SDPA is faster on so few queries"
    return compiler.why_not(flash_cpp.SOURCE, q, k, v)


def _complete(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of all arguments by position as one that takes them as `attention` does."""
    return lambda q, k, v, mask=NO_MASK, score=PLAIN_SCORE, return_stats=(): f(
        q, k, v, mask, score, return_stats
    )


def _register(name: str, why_not: Callable[..., str | None], run: Callable[..., Any]) -> None:
    attention.register(name, _complete(why_not))(_complete(run))


_register("blocks", _blocks_why_not, _by_tiles("blocks"))
_register("triton", _triton_why_not, _by_tiles("flash_triton"))
_register("varlen", varlen.why_not, varlen.run)
_register("sdpa", _sdpa_why_not, _sdpa)
_register("cudnn", cudnn.why_not, cudnn.run)
_register("cpp", _cpp_why_not, _by_tiles("flash_cpp"))
attention.order = _complete(lambda *given: rates.order(*given[:5]))
attention.why = lambda way, *given, **kw: _complete(lambda *g: rates.why(way, *g[:5]))(*given, **kw)
