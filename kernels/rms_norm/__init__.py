"""Root-mean-square norm.

D width of what is normed, R its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def rms_norm(x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Divide by the root mean square over the last dimension, then scale.

    Args:
        x: `(..., D)` any float dtype; accumulated in float32 or wider.
        weight_D: `(D,)`; None = ones.
        eps: added to the mean square.
    Returns:
        `(..., D)` in the dtype of ``x``.
    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight_D is None else y * weight_D.to(wide)).to(x.dtype)


@rms_norm.register("torch", lambda x, *_, **__: None if x.is_cuda else "it is fused on CUDA only")
def _by_torch(x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight_D is None else weight_D.to(x.dtype), eps)


def row_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Return ``x`` and its sizes: outer rows, inner rows, D, and the strides of both.

    A slice of heads `(B, T, H, K)` needs no copy.
    """
    D = x.shape[-1]
    if not x.is_contiguous():
        B, T, H, _ = x.shape if x.dim() == 4 else (0, 0, 0, 0)
        if B and x.stride(3) == 1 and x.stride(0) == T * x.stride(1):
            return x, (B * T, H, D, x.stride(1), x.stride(2))
        x = x.contiguous()
    return x, (x.numel() // D if D else 0, 1, D, D, 0)


def _why_not(way: str, x: Tensor, *rest: Any, **kw: Any) -> str | None:
    return "a row does not fit the registers" if way == "triton" and x.shape[-1] > 8192 else None


def _arguments(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    rows, sizes = row_strides(x)
    return rows, *rest, *sizes


register_kernel(
    rms_norm,
    "y",
    lambda x, weight, eps: (x.new_empty(x.shape), weight.new_empty(x.shape[:-1])),
    kept="scale",
    saved="x weight scale",
    gradients="x weight",
    strided="x",
    wide="weight",
    prepare=lambda x, weight, eps: (x, x.new_ones(x.shape[-1]) if weight is None else weight, eps),
    why_not=_why_not,
    cpp="norm",
    arguments=_arguments,
    triton="norm_triton",
)
