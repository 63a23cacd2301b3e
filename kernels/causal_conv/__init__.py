"""Short depthwise causal convolution inside documents.

B rows, T tokens, D channels, C weights of a channel (conv_size).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.fused import register_kernel
from mm.kernels.op import Op


@Op
def causal_conv(u_BTD: Tensor, weight_CD: Tensor, bias_D: Tensor, document_BT: Tensor) -> Tensor:
    """Sum each channel over the last C tokens of its document.

    Args:
        u_BTD: `(B, T, D)` any float dtype; accumulated in float32 or wider.
        weight_CD: `(C, D)`, oldest first: the last row weighs the token itself.
        bias_D: `(D,)`.
        document_BT: `(B, T)` int32; no sum goes across a change.
    Returns:
        `(B, T, D)` in the dtype of ``u``.
    Source: Dauphin et al. 2017 (arXiv:1612.08083), section 2; per document as in De et al. 2024
    (arXiv:2402.19427).
    """
    wide = torch.promote_types(u_BTD.dtype, torch.float32)
    u, w = u_BTD.to(wide), weight_CD.to(wide)
    y = u * w[-1] + bias_D.to(wide)
    for j in range(1, min(w.shape[0], u.shape[1])):
        # Selected, not multiplied: the neighbour document may hold inf.
        same = (document_BT[:, j:] == document_BT[:, :-j])[..., None]
        y = y + F.pad(u[:, :-j].masked_fill(~same, 0), (0, 0, j, 0)) * w[-1 - j]
    return y.to(u_BTD.dtype)


def _why_not(
    way: str, u_BTD: Tensor, weight_CD: Tensor, bias_D: Tensor, document_BT: Tensor
) -> str | None:
    given = document_BT.dtype
    return None if given == torch.int32 else f"documents are {given}, not int32"


def rows(u: Tensor) -> tuple[Tensor, int]:
    """Return ``u`` and its row stride; a half of a wider projection needs no copy."""
    if u.stride(2) == 1 and u.stride(0) == u.shape[1] * u.stride(1):
        return u, u.stride(1)
    return u.contiguous(), u.shape[2]


def _arguments(u: Tensor, weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    with_stride, stride = rows(u)
    return with_stride, weight, *rest, *u.shape, weight.shape[0], stride


register_kernel(
    causal_conv,
    "y",
    lambda u, weight, bias, document: u.new_empty(u.shape),
    saved="u weight bias document",
    gradients="u weight bias",
    strided="u",
    wide="weight bias",
    why_not=_why_not,
    cpp="conv",
    arguments=_arguments,
    triton="conv_triton",
)
