"""Gated activation of the halves of one tensor in Triton."""

# Triton's stubs do not know that what is given is a constant.
# pyright: reportArgumentType=false
from __future__ import annotations

import triton
from torch import Tensor

from mm.kernels.glu import KINDS, rows
from mm.kernels.glu import glu_triton as pair


def forward(x: Tensor, kind: str, y: Tensor) -> None:
    """Write the products."""
    (x, stride), D, n = rows(x), y.shape[-1], y.numel()
    if n:
        sizes = (D, n, stride, stride, KINDS.index(kind))
        pair._forward[(triton.cdiv(n, pair.BLOCK),)](x, x[..., D:], y, *sizes, pair.BLOCK)


def backward(x: Tensor, kind: str, dy: Tensor, dx: Tensor) -> None:
    """Write the gradient of both halves."""
    (x, stride), D, n = rows(x), dy.shape[-1], dy.numel()
    if n:
        sizes = (D, n, stride, stride, 2 * D, KINDS.index(kind))
        pair._backward[(triton.cdiv(n, pair.BLOCK),)](
            x, x[..., D:], dy, dx, dx[..., D:], *sizes, pair.BLOCK
        )
