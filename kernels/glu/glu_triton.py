"""Gated activation in Triton, elementwise over rows with strides of their own."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.glu import KINDS, rows

BLOCK = 1024  # elements of a program


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """Value and derivative; KIND 0 = SiLU, 1 = GELU in its tanh form."""
    if KIND == 0:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = tl.sigmoid(2 * inner)  # (1 + tanh(inner)) / 2
        slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return x * s, s + x * s * (1 - s) * slope


@triton.jit
def _places(D, n, BLOCK: tl.constexpr):
    """Row, column and whether it is there, of a program's elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i // D, i % D, i < n, i


@triton.jit
def _forward(g_ptr, u_ptr, y_ptr, D, n, s_g, s_u, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, d, mask, i = _places(D, n, BLOCK)
    g = tl.load(g_ptr + row * s_g + d, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * s_u + d, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(g, KIND)
    tl.store(y_ptr + i, (value * u).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    g_ptr,
    u_ptr,
    grad_ptr,
    dg_ptr,
    du_ptr,
    D,
    n,
    s_g,
    s_u,
    s_d,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, d, mask, i = _places(D, n, BLOCK)
    g = tl.load(g_ptr + row * s_g + d, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * s_u + d, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(g, KIND)
    tl.store(dg_ptr + row * s_d + d, (grad * u * slope).to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + row * s_d + d, (grad * value).to(du_ptr.dtype.element_ty), mask=mask)


def forward(gate: Tensor, up: Tensor, kind: str, y: Tensor) -> None:
    """Write the products."""
    (g, s_g), (u, s_u), n = rows(gate), rows(up), gate.numel()
    if n:
        sizes = (gate.shape[-1], n, s_g, s_u, KINDS.index(kind))
        _forward[(triton.cdiv(n, BLOCK),)](g, u, y, *sizes, BLOCK)


def backward(gate: Tensor, up: Tensor, kind: str, dy: Tensor, dg: Tensor, du: Tensor) -> None:
    """Write the gradients."""
    (g, s_g), (u, s_u), n = rows(gate), rows(up), gate.numel()
    if n:
        D = gate.shape[-1]
        sizes = (D, n, s_g, s_u, D, KINDS.index(kind))
        _backward[(triton.cdiv(n, BLOCK),)](g, u, dy, dg, du, *sizes, BLOCK)
