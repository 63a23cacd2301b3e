"""Plain attention by cuDNN through SDPA: the fastest that PyTorch has on Hopper and Blackwell.

SDPA prefers it there by itself (torch 2.11 and later), also where it is known to be wrong; so it is
asked for here alone, where it is known to be right, and `sdpa` never takes it.

R rows, T queries, H query heads, G key heads, K key width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm.kernels import device
from mm.kernels.attention.spec import MaskSpec, ScoreSpec
from mm.kernels.op import without_autocast

# Where cuDNN refuses a call, SDPA takes the next.
FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # fmt: skip
OTHERS = FIRST[1:]
TILE = 128  # tokens
LEAST = 512  # tokens from which published rates speak for it
WIDEST = {90: 256}  # its backward; on other cards 128 (support matrix of cuDNN 9.18)
FEWEST_HEADS = 8


def why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Any
) -> str | None:
    """Reason why it cannot take a call, or is not trusted with it, or None."""
    if q.device.type != device.KIND:
        return f"needs a {device.KIND} device: tensors are on {q.device.type}"
    # With a mask its backward gives NaN at some lengths: pytorch/pytorch#196678.
    if mask.is_set() or any(x is not None for x in score._replace(scale=None)):
        return "it takes causal or full rows of one document"
    if stats:
        return "it keeps no statistics"
    if any(x.dtype not in (torch.bfloat16, torch.float16) for x in (q, k, v)):
        return "it multiplies bfloat16 or float16"
    card, width = device.card(), q.shape[-1]
    widest = WIDEST.get(card, 128)
    if width != v.shape[-1] or width % 8 or width > widest:
        return f"heads of {width} and {v.shape[-1]}: it takes equal multiples of 8 up to {widest}"
    # Tiles that are not full have given NaN: NVIDIA/cudnn-frontend#160, #1072.
    if q.shape[1] != k.shape[1] or q.shape[1] % TILE or q.shape[1] < LEAST or not q.shape[0]:
        return f"it takes as many keys as queries, a multiple of {TILE} from {LEAST} on"
    if card == 100 and k.shape[2] < FEWEST_HEADS:  # pytorch/pytorch#193893
        return f"fewer than {FEWEST_HEADS} key heads: wrong on this card"
    # It makes a plan for every new length, 30 ms on the host; training has one.
    return None if torch.is_grad_enabled() else "a plan for every new length: for training alone"


def run(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, score: ScoreSpec, stats: Any) -> Tensor:
    """`(R, T, H, V)`: see `mm.kernels.attention.attention`."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with without_autocast(q.device.type), sdpa_kernel(FIRST, set_priority=True):
        y = F.scaled_dot_product_attention(
            heads_first[0],
            heads_first[1],
            heads_first[2],
            is_causal=mask.causal,
            scale=score.scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
    return y.transpose(1, 2)
