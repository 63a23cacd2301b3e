"""Packed rows by PyTorch's attention of varying lengths: FlashAttention, or cuDNN where it may.

Each document is a sequence of its own to the kernel, so no tile of another one is visited.

R rows, T queries, S keys, H query heads, G key heads, K key width, V value width, M documents.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor

from mm.kernels import device
from mm.kernels.attention.spec import MaskSpec, ScoreSpec, find_set

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256
# FlashAttention 2 refuses the backward of wider ones on these cards, so does SDPA's choice of it
# (check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120 in torch's sdp_utils.cpp).
WIDEST_SMALL = 192


@functools.cache
def _function() -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, or None where it takes no windows."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= takes.keys() else None


def why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Any
) -> str | None:
    """Reason why it cannot take a call, or None."""
    if mask.starts_M is None or not mask.causal:
        return "it takes causal rows of documents whose starts are known"
    if lacks := find_set(mask, "allowed_RTS", "prefix_RT"):
        return f"it has no {lacks}"
    if lacks := find_set(
        score, "bias_RHTS", "gain_RHTS", "fade_RTH", "relative_NH", "softcap", "sink_H"
    ):
        return f"it has no {lacks}"
    if stats:
        return "it keeps no statistics"
    if any(x.dtype not in DTYPES for x in (q, k, v)) or len({q.dtype, k.dtype, v.dtype}) > 1:
        return "it multiplies bfloat16 or float16"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > WIDEST or q.shape[-1] % 8:
        return f"heads of {q.shape[-1]} and {v.shape[-1]}: it takes equal multiples of 8 up to 256"
    if q.shape[:2] != k.shape[:2] or 0 in q.shape:
        return "it takes as many keys as queries"
    if q.shape[-1] > WIDEST_SMALL and device.card() == 86 and torch.is_grad_enabled():
        return f"no backward of heads over {WIDEST_SMALL} on a card with 99 KB of shared memory"
    if q.device.type != device.KIND:
        return f"needs a {device.KIND} device: tensors are on {q.device.type}"
    return None if _function() is not None else "this PyTorch has no varlen_attn"


def run(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Any) -> Tensor:
    """`(R, T, H, V)`: see `mm.kernels.attention.attention`."""
    R, T, H, _ = q.shape
    # The longest document is not asked for: it is another one every step, and a graph's constant.
    y = _function()(
        *(x.flatten(0, 1) for x in (q, k, v)),
        mask.starts_M,
        mask.starts_M,
        T,
        T,
        scale=score.scale,
        window_size=(-1 if mask.window is None else mask.window - 1, 0),
        enable_gqa=k.shape[2] != H,
    )
    # Padding, which the kernel takes for the end of the document before it, gets zeros.
    assert mask.document_RT is not None
    return y.unflatten(0, (R, T)).masked_fill((mask.document_RT == 0)[..., None, None], 0)
