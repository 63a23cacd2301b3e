"""Short depthwise causal convolution in Triton: a program sums a tile of tokens by channels."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.causal_conv import rows
from mm.kernels.parts_triton import sum_parts

TOKENS, CHANNELS = 64, 64  # of a tile


@triton.jit
def _forward(
    u_ptr,
    weight_ptr,
    bias_ptr,
    document_ptr,
    y_ptr,
    T,
    D,
    stride,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, BT)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    t = tl.program_id(0) // blocks % tiles * BT + tl.arange(0, BT)
    row = (tl.program_id(0) // blocks // tiles).to(tl.int64) * T
    in_d = (d < D)[None, :]
    document = tl.load(document_ptr + row + t, mask=t < T, other=0)
    y = tl.zeros((BT, BD), tl.float32) + tl.load(bias_ptr + d, mask=d < D, other=0.0)[None, :]
    for j in tl.static_range(TAPS):
        there = (t >= j) & (t < T)
        # Selected, not multiplied: the neighbour document may hold inf.
        there &= tl.load(document_ptr + row + t - j, mask=there, other=0) == document
        at = (row + t - j)[:, None] * stride + d[None, :]
        u = tl.load(u_ptr + at, mask=there[:, None] & in_d, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + (TAPS - 1 - j) * D + d, mask=d < D, other=0.0)
        y += u * w[None, :]
    out = (row + t)[:, None] * D + d[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=(t < T)[:, None] & in_d)


@triton.jit
def _backward(
    u_ptr,
    weight_ptr,
    document_ptr,
    grad_ptr,
    du_ptr,
    parts_ptr,
    T,
    D,
    stride,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``parts`` (row and tile of time, TAPS + 1, D): each program's sums for weight and bias."""
    blocks, tiles = tl.cdiv(D, BD), tl.cdiv(T, BT)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    t = (tile % tiles).to(tl.int32) * BT + tl.arange(0, BT)
    row = tile // tiles * T
    in_d, inside = (d < D)[None, :], (t < T)[:, None]
    document = tl.load(document_ptr + row + t, mask=t < T, other=0)
    at = (row + t)[:, None] * D + d[None, :]
    grad = tl.load(grad_ptr + at, mask=inside & in_d, other=0.0).to(tl.float32)
    du = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(TAPS):
        w = tl.load(weight_ptr + (TAPS - 1 - j) * D + d, mask=d < D, other=0.0)
        later = t + j < T
        later &= tl.load(document_ptr + row + t + j, mask=later, other=0) == document
        g = tl.load(grad_ptr + at + j * D, mask=later[:, None] & in_d, other=0.0).to(tl.float32)
        du += g * w[None, :]
        there = (t >= j) & (t < T)
        there &= tl.load(document_ptr + row + t - j, mask=there, other=0) == document
        from_u = (row + t - j)[:, None] * stride + d[None, :]
        u = tl.load(u_ptr + from_u, mask=there[:, None] & in_d, other=0.0).to(tl.float32)
        part = (tile * (TAPS + 1) + TAPS - 1 - j) * D + d
        tl.store(parts_ptr + part, tl.sum(u * grad, 0), mask=d < D)
    tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=inside & in_d)
    tl.store(parts_ptr + (tile * (TAPS + 1) + TAPS) * D + d, tl.sum(grad, 0), mask=d < D)


def forward(u: Tensor, weight: Tensor, bias: Tensor, document: Tensor, y: Tensor) -> None:
    """Write the sums."""
    (B, T, D), (wide, stride) = u.shape, rows(u)
    if u.numel():
        grid = (B * triton.cdiv(T, TOKENS) * triton.cdiv(D, CHANNELS),)
        tensors = (wide, weight, bias, document, y)
        _forward[grid](*tensors, T, D, stride, weight.shape[0], TOKENS, CHANNELS, num_warps=4)


def backward(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    document: Tensor,
    grad: Tensor,
    du: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Write the gradients; sums over tiles of time have a fixed order."""
    (B, T, D), (wide, stride) = u.shape, rows(u)
    conv_size, tiles = weight.shape[0], B * triton.cdiv(T, TOKENS)
    parts = weight.new_empty(tiles, conv_size + 1, D)
    if u.numel():
        grid = (tiles * triton.cdiv(D, CHANNELS),)
        tensors = (wide, weight, document, grad, du, parts)
        _backward[grid](*tensors, T, D, stride, conv_size, TOKENS, CHANNELS, num_warps=8)
    sum_parts(parts, dweight, dbias)
