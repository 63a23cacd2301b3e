"""Root-mean-square norm. D width of what is normed, R its rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels import compiler, device
from mm.kernels.fused import fused
from mm.kernels.op import Op

_SOURCE = Path(__file__).with_name("norm.cpp")


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


def _fused_why_not(x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> str | None:
    return None if x.is_cuda else "it is fused on CUDA only"


@rms_norm.register("torch", _fused_why_not)
def _fused(x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None if weight_D is None else weight_D.to(x.dtype), eps)


def strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """``x`` as (outer, inner, D) with two row strides: a slice of heads `(B, T, H, K)` needs no
    copy.
    """
    D = x.shape[-1]
    if not x.is_contiguous():
        B, T, H, _ = x.shape if x.dim() == 4 else (0, 0, 0, 0)
        if B and x.stride(3) == 1 and x.stride(0) == T * x.stride(1):
            return x, (B * T, H, D, x.stride(1), x.stride(2))
        x = x.contiguous()
    return x, (x.numel() // D if D else 0, 1, D, D, 0)


def _outputs(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(x.shape[:-1])


def _gradients(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _cpp_forward(x: Tensor, weight: Tensor, eps: float, y: Tensor, scale: Tensor) -> None:
    wide, sizes = strided(x)
    name = f"norm_{compiler.SUFFIX[x.dtype]}_forward"
    compiler.call(_SOURCE, name, wide, weight, y, scale, eps, *sizes)


def _cpp_backward(x: Tensor, *tensors: Tensor) -> None:
    wide, sizes = strided(x)
    compiler.call(_SOURCE, f"norm_{compiler.SUFFIX[x.dtype]}_backward", wide, *tensors, *sizes)


_OPS = fused(
    "rms_norm",
    _outputs,
    _gradients,
    saved=lambda x, weight, eps, y, scale: (x, weight, scale),
    wrt=("x", "weight"),
    cpp=(_cpp_forward, _cpp_backward),
    triton=f"{__name__}.gpu",
)


def _run(way: str, x: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = (
        x.new_ones(x.shape[-1], dtype=wide) if weight_D is None else weight_D.to(wide).contiguous()
    )
    return _OPS[way](x, weight, eps)[0]


rms_norm.register("cpp", partial(compiler.why_not, _SOURCE))(partial(_run, "cpp"))
rms_norm.register("triton", device.why_not)(partial(_run, "triton"))
