"""Root-mean-square norm, of a tensor or of a sum.

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


@Op
def add_rms_norm(
    x: Tensor, branch: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return ``s = x + branch`` and its norm, ``s / sqrt(mean(s^2) + eps) * weight``.

    That is what a residual stream becomes, and what the next layer reads of it.

    Args:
        x: `(..., D)` any float dtype.
        branch: the same, or what is added to it with promotion and broadcasting.
        weight_D, eps: as of `rms_norm`.
    Returns:
        ``s``, in the dtype of a sum, and its norm in the same; both `(..., D)`.
    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    total = x + branch
    return total, rms_norm.implementations["reference"][0](total, weight_D, eps)


def _torch_why_not(x: Tensor, *_: Any, **__: Any) -> str | None:
    return _compiled() if x.is_cuda else "it is fused on CUDA only"


def _compiled() -> str | None:
    """Why no kernel of a GPU is taken: a graph has the reference fused with what is around it.

    The residual sum before it, casts and products after it: seven launches of a layer less.
    """
    return "torch.compile fuses the reference" if torch.compiler.is_compiling() else None


@rms_norm.register("torch", _torch_why_not)
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
    if way != "triton":
        return None
    return "a row does not fit the registers" if x.shape[-1] > 8192 else _compiled()


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


@add_rms_norm.register("apart", lambda *_, **__: None)
def _apart(
    x: Tensor, branch: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The sum, then the norm as it is chosen."""
    total = x + branch
    return total, rms_norm(total, weight_D, eps)


def _why_apart(way: str, x: Tensor, branch: Tensor, *rest: Any, **kw: Any) -> str | None:
    if branch.shape != x.shape:
        return "the shapes differ"
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        return f"the sum is wider than {x.dtype}"
    return _why_not(way, x)


def _empty_sum(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Sum, norm, factors; and of a branch of another dtype its shape, without memory."""
    alike = branch.dtype == x.dtype
    narrow = branch.new_empty_strided((0,) if alike else x.shape, (0,) * (1 if alike else x.dim()))
    return x.new_empty(x.shape), x.new_empty(x.shape), weight.new_empty(x.shape[:-1]), narrow


# One gradient for both, which is the sum of those of the sum and of the norm.
register_kernel(
    add_rms_norm,
    "total y",
    _empty_sum,
    kept="scale narrow",
    saved="total weight scale narrow",
    gradients="x:total branch:narrow weight",
    shared={"branch": "x"},
    dense=False,
    wide="weight",
    prepare=lambda x, branch, weight, eps: (
        x,
        branch,
        x.new_ones(x.shape[-1]) if weight is None else weight,
        eps,
    ),
    why_not=_why_apart,
    triton="add_triton",
)
