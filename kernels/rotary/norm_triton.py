"""Norm of each head and rotation of its pairs in Triton, one pass over what is read and written."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.rotary.rotary_triton import angles, places, sizes_of

PROGRAMS = 1024  # most parts of the weight's gradient


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    y_ptr,
    scale_ptr,
    eps,
    tokens,
    H,
    K,
    P,
    s_token,
    s_head,
    REST: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = r < tokens * H
    token, source, target = places(r, H, K, s_token, s_head)
    x, y = x_ptr + source, y_ptr + target
    p = tl.arange(0, BP)[None, :]
    mask = here[:, None] & (p < P)
    a = tl.load(x + p, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + P + p, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(a * a + b * b, 1)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)[None, :]
        others = here[:, None] & (d < K)
        c = tl.load(x + d, mask=others, other=0.0).to(tl.float32)
        total += tl.sum(c * c, 1)
    scale = 1 / tl.sqrt(total / K + eps)
    tl.store(scale_ptr + r, scale, mask=here)
    a *= scale[:, None] * tl.load(weight_ptr + p, mask=p < P, other=0.0)
    b *= scale[:, None] * tl.load(weight_ptr + P + p, mask=p < P, other=0.0)
    cos, sin = angles(cos_sin_ptr, token, tokens, P, p, mask)
    tl.store(y + p, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + P + p, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        c *= scale[:, None] * tl.load(weight_ptr + d, mask=d < K, other=0.0)
        tl.store(y + d, c.to(y_ptr.dtype.element_ty), mask=others)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    scale_ptr,
    grad_ptr,
    dx_ptr,
    parts_ptr,
    tokens,
    H,
    K,
    P,
    s_token,
    s_head,
    REST: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    p = tl.arange(0, BP)[None, :]
    kind = dx_ptr.dtype.element_ty
    weight_a = tl.load(weight_ptr + p, mask=p < P, other=0.0)
    weight_b = tl.load(weight_ptr + P + p, mask=p < P, other=0.0)
    sum_a = tl.zeros((1, BP), tl.float32)
    sum_b = tl.zeros((1, BP), tl.float32)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)[None, :]
        weight_c = tl.load(weight_ptr + d, mask=d < K, other=0.0)
        sum_c = tl.zeros((1, REST), tl.float32)
    rows = tokens * H
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        r = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)
        here = r < rows
        token, source, target = places(r, H, K, s_token, s_head)
        x, grad, dx = x_ptr + source, grad_ptr + target, dx_ptr + target
        mask = here[:, None] & (p < P)
        scale = tl.load(scale_ptr + r, mask=here, other=0.0)[:, None]
        a = tl.load(x + p, mask=mask, other=0.0).to(tl.float32) * scale
        b = tl.load(x + P + p, mask=mask, other=0.0).to(tl.float32) * scale
        grad_a = tl.load(grad + p, mask=mask, other=0.0).to(tl.float32)
        grad_b = tl.load(grad + P + p, mask=mask, other=0.0).to(tl.float32)
        cos, sin = angles(cos_sin_ptr, token, tokens, P, p, mask)
        da = grad_a * cos + grad_b * sin
        db = grad_b * cos - grad_a * sin
        sum_a += tl.sum(da * a, 0)[None, :]
        sum_b += tl.sum(db * b, 0)[None, :]
        da *= weight_a
        db *= weight_b
        along = tl.sum(da * a + db * b, 1)
        if REST > 0:
            others = here[:, None] & (d < K)
            c = tl.load(x + d, mask=others, other=0.0).to(tl.float32) * scale
            dc = tl.load(grad + d, mask=others, other=0.0).to(tl.float32)
            sum_c += tl.sum(dc * c, 0)[None, :]
            dc *= weight_c
            along += tl.sum(dc * c, 1)
            tl.store(dx + d, (scale * (dc - c * (along / K)[:, None])).to(kind), mask=others)
        along = (along / K)[:, None]
        tl.store(dx + p, (scale * (da - a * along)).to(kind), mask=mask)
        tl.store(dx + P + p, (scale * (db - b * along)).to(kind), mask=mask)
    parts = parts_ptr + tl.program_id(0).to(tl.int64) * K
    tl.store(parts + p, sum_a, mask=p < P)
    tl.store(parts + P + p, sum_b, mask=p < P)
    if REST > 0:
        tl.store(parts + d, sum_c, mask=d < K)


def forward(
    x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float, y: Tensor, scale: Tensor
) -> None:
    """Write the normed and rotated heads, and the factor of each."""
    at, sizes, tile = sizes_of(x, cos_sin)
    grid = (triton.cdiv(sizes[0] * sizes[1], tile["BR"]),)
    _forward[grid](at, weight, cos_sin, y, scale, eps, *sizes, **tile)


def backward(
    x: Tensor, weight: Tensor, cos_sin: Tensor, scale: Tensor, grad: Tensor,
    dx: Tensor, dweight: Tensor,
) -> None:  # fmt: skip
    """Write the gradients; the weight's is summed over programs in a fixed order."""
    at, sizes, tile = sizes_of(x, cos_sin)
    programs = min(triton.cdiv(sizes[0] * sizes[1], tile["BR"]), PROGRAMS)
    parts = weight.new_empty(programs, x.shape[-1])
    _backward[(programs,)](at, weight, cos_sin, scale, grad, dx, parts, *sizes, **tile)
    torch.sum(parts, 0, out=dweight)
