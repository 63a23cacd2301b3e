"""Root-mean-square norm. D model width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import Op


@Op
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Divide by the root mean square over the last dimension, then scale.

    Args:
        x: `(..., D)` any float dtype; accumulated in float32 or wider.
        weight: `(D,)` or broadcasting against the last dimensions of ``x``; None = ones.
        eps: added to the mean square.
    Returns:
        `(..., D)` in the dtype of ``x``.
    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(wide)).to(x.dtype)


def _fused_why_not(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> str | None:
    if not x.is_cuda:
        return "it is fused on CUDA only"
    if weight is not None and weight.dim() != 1:
        return "its weight is one vector"
    return None


@rms_norm.register("torch", _fused_why_not)
def _fused(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
