"""Root-mean-square norm in Triton: a program norms some whole rows, one pass over each."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm.kernels import device
from mm.kernels.rms_norm import row_strides

ELEMENTS = 4096  # of a tile: several short rows, or one
PROGRAMS = 1024  # most parts of the weight's gradient


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    scale_ptr,
    eps,
    outer,
    inner,
    D,
    s_outer,
    s_inner,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    here = r < outer * inner
    mask = here[:, None] & (d < D)[None, :]
    at = (r // inner * s_outer + r % inner * s_inner)[:, None] + d[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(scale_ptr + r, scale, mask=here)
    y = x * scale[:, None] * weight[None, :]
    tl.store(y_ptr + r[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_ptr,
    dx_ptr,
    parts_ptr,
    outer,
    inner,
    D,
    s_outer,
    s_inner,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)
    total = tl.zeros((BD,), tl.float32)
    rows = outer * inner
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        r = tl.cast(tile, tl.int64) * BR + tl.arange(0, BR)
        mask = (r < rows)[:, None] & (d < D)[None, :]
        at = (r // inner * s_outer + r % inner * s_inner)[:, None] + d[None, :]
        out = r[:, None] * D + d[None, :]
        scale = tl.load(scale_ptr + r, mask=r < rows, other=0.0)[:, None]
        normed = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_ptr + out, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * normed, 0)
        grad *= weight[None, :]
        dx = scale * (grad - normed * (tl.sum(grad * normed, 1) / D)[:, None])
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + d, total, mask=d < D)


def tile(D: int) -> tuple[dict[str, int], int]:
    """Tile of rows by width, with its warps, and its rows."""
    wide = triton.next_power_of_2(D)
    rows = max(ELEMENTS // wide, 1)
    return {"BR": rows, "BD": wide, "num_warps": min(max(wide * rows // 512, 4), 32)}, rows


def forward(x: Tensor, weight: Tensor, eps: float, y: Tensor, scale: Tensor) -> None:
    """Write the normed rows and the factor of each."""
    at, sizes = row_strides(x)
    if x.numel():
        options, rows = tile(x.shape[-1])
        grid = (triton.cdiv(sizes[0] * sizes[1], rows),)
        _forward[grid](at, weight, y, scale, eps, *sizes, **options)


def backward(
    x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, dx: Tensor, dweight: Tensor
) -> None:
    """Write the gradients; the weight's is summed over programs in a fixed order."""
    at, sizes = row_strides(x)
    if not x.numel():
        dweight.zero_()
        return
    options, rows = tile(x.shape[-1])
    if device.card() == 100:  # or it spills
        options["num_warps"] = min(2 * options["num_warps"], 32)
    programs = min(triton.cdiv(sizes[0] * sizes[1], rows), PROGRAMS)
    parts = weight.new_empty(programs, x.shape[-1])
    _backward[(programs,)](at, weight, scale, grad, dx, parts, *sizes, **options)
    torch.sum(parts, 0, out=dweight)
