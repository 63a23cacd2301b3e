"""A sum and its root-mean-square norm in Triton: a program does some whole rows, in one pass."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels import device
from mm.kernels.rms_norm import norm_triton as norm


@triton.jit
def _forward(
    x_ptr,
    branch_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    scale_ptr,
    eps,
    R,
    D,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    r = tl.arange(0, BR)
    at = r[:, None] * D + d[None, :]  # within the tile: 64 bits are for where that begins
    first = tl.program_id(0).to(tl.int64) * BR
    here = first + r < R
    mask = here[:, None] & (d < D)[None, :]
    tile = first * D
    x = tl.load(x_ptr + tile + at, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + tile + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    total = (x + branch).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + tile + at, total, mask=mask)
    h = total.to(tl.float32)  # what is normed is what later layers read, and the backward
    scale = 1 / tl.sqrt(tl.sum(h * h, 1) / D + eps)
    tl.store(scale_ptr + first + r, scale, mask=here)
    y = h * scale[:, None] * weight[None, :]
    tl.store(y_ptr + tile + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    total_ptr,
    weight_ptr,
    scale_ptr,
    dtotal_ptr,
    dy_ptr,
    dx_ptr,
    dbranch_ptr,
    parts_ptr,
    R,
    D,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    parts = tl.zeros((BD,), tl.float32)
    r = tl.arange(0, BR)
    at = r[:, None] * D + d[None, :]
    for step in range(tl.program_id(0), tl.cdiv(R, BR), tl.num_programs(0)):
        first = tl.cast(step, tl.int64) * BR
        here = first + r < R
        mask = here[:, None] & (d < D)[None, :]
        tile = first * D
        dx = tl.zeros((BR, BD), tl.float32)
        if dy_ptr is not None:
            scale = tl.load(scale_ptr + first + r, mask=here, other=0.0)[:, None]
            normed = tl.load(total_ptr + tile + at, mask=mask, other=0.0).to(tl.float32) * scale
            grad = tl.load(dy_ptr + tile + at, mask=mask, other=0.0).to(tl.float32)
            parts += tl.sum(grad * normed, 0)
            grad *= weight[None, :]
            dx = scale * (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None])
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + tile + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + tile + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + tile + at, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + d, parts, mask=d < D)


def forward(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    total: Tensor,
    y: Tensor,
    scale: Tensor,
    narrow: Tensor,
) -> None:
    """Write the sums, the normed rows and the factor of each."""
    if x.numel():
        D = x.shape[-1]
        options, rows = norm.tile(D)
        R = x.numel() // D
        grid = (triton.cdiv(R, rows),)
        _forward[grid](x, branch, weight, total, y, scale, eps, R, D, **options)


def backward(
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    narrow: Tensor,
    dtotal: Tensor | None,
    dy: Tensor | None,
    dx: Tensor,
    dbranch: Tensor,
    dweight: Tensor,
) -> None:
    """Write the gradients; the branch's only where it is of another dtype than that of ``x``."""
    if not total.numel():
        dweight.zero_()
        return
    D = total.shape[-1]
    options, rows = norm.tile(D)
    if device.card() == 100:  # or it spills
        options["num_warps"] = min(2 * options["num_warps"], 32)
    R = total.numel() // D
    programs = min(triton.cdiv(R, rows), norm.PROGRAMS)
    parts = weight.new_empty(programs, D)
    second = dbranch if dbranch.numel() else None
    _backward[(programs,)](total, weight, scale, dtotal, dy, dx, second, parts, R, D, **options)
    torch.sum(parts, 0, out=dweight)
