"""Rotation of pairs of channels by given angles, alone and after a norm of each head.

B rows, T tokens, H heads, K head width, P pairs that are rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels import device
from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def rotary(x_BTHK: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate channels (i, i + P) of every head; those from 2 P on stay as they are.

    Args:
        x_BTHK: `(B, T, H, K)` any float dtype; computed in float32 or wider.
        cos_sin: `(2, B, T, 1, P)` cosines and sines of the angles; has no gradient.
    Returns:
        `(B, T, H, K)` in the dtype of ``x``.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34, in the half-split order of GPT-NeoX.
    """
    P = cos_sin.shape[-1]
    cos, sin = cos_sin.to(torch.promote_types(x_BTHK.dtype, torch.float32)).unbind()
    whole = 2 * P == x_BTHK.shape[-1]
    a, b = (x_BTHK if whole else x_BTHK[..., : 2 * P]).chunk(2, dim=-1)
    y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHK.dtype)
    return y if whole else torch.cat((y, x_BTHK[..., 2 * P :]), dim=-1)


@Op
def norm_rotary(x_BTHK: Tensor, weight_K: Tensor, cos_sin: Tensor, eps: float = 1e-6) -> Tensor:
    """`rotary` of heads that are divided by their root mean square and scaled (`rms_norm`).

    Args:
        x_BTHK: `(B, T, H, K)` any float dtype; computed in float32 or wider.
        weight_K: `(K,)` scales, the same for all heads.
        cos_sin: `(2, B, T, 1, P)` cosines and sines of the angles; has no gradient.
        eps: added to the mean square.
    Returns:
        `(B, T, H, K)` in the dtype of ``x``.
    Source: query-key norm: Henry et al. 2020 (arXiv:2010.04245), with RMS norm.
    """
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    h = x_BTHK.to(wide)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight_K.to(wide)
    return rotary.implementations["reference"][0](h, cos_sin).to(x_BTHK.dtype)


def _why_not(way: str, x: Tensor, cos_sin: Tensor) -> str | None:
    if cos_sin.shape[1:4] != (*x.shape[:2], 1):
        return "the angles are not one set for each token"
    return device.why_empty(x, cos_sin)


# One pass, heads of a wider projection where they lie; the gradient is the rotation back.
register_kernel(
    rotary,
    "y",
    lambda x, cos_sin: x.new_empty(x.shape),
    saved="cos_sin",
    gradients="x:dy",
    strided="x",
    wide="cos_sin",
    why_not=_why_not,
    triton="rotary_triton",
)
register_kernel(
    norm_rotary,
    "y",
    lambda x, weight, *_: (x.new_empty(x.shape), weight.new_empty(x.shape[:-1])),
    kept="scale",
    saved="x weight cos_sin scale",
    gradients="x weight",
    strided="x",
    wide="weight cos_sin",
    why_not=lambda way, x, weight, cos_sin, *_, **__: _why_not(way, x, cos_sin),
    triton="norm_triton",
)
