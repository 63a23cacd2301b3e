"""Sums of what programs leave in parts: one launch, in a fixed order, into one or two tensors."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PARTS, COLUMNS = 64, 32  # of a tile; a row of it is a line of the cache


@triton.jit
def _sum_parts(
    parts_ptr,
    first_ptr,
    second_ptr,
    P,
    M,
    border,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BP, BM), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        at = p.to(tl.int64)[:, None] * M + m[None, :]
        total += tl.load(parts_ptr + at, mask=(p < P)[:, None] & (m < M)[None, :], other=0.0)
    out = tl.sum(total, 0)
    tl.store(first_ptr + m, out.to(first_ptr.dtype.element_ty), mask=m < border)
    if second_ptr is not None:
        after = (m >= border) & (m < M)
        tl.store(second_ptr + m - border, out.to(second_ptr.dtype.element_ty), mask=after)


def sum_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Write ``parts.sum(0)`` into contiguous tensors, one after the other, in their own dtypes.

    ``parts`` `(P, ..)` is float32; what follows P is ``first``, then ``second``, flattened. No part
    (P = 0) sums to zeros.
    """
    columns = first.numel() + (0 if second is None else second.numel())
    grid = (triton.cdiv(columns, COLUMNS),)
    sizes = (parts.shape[0], columns, first.numel())
    _sum_parts[grid](parts, first, second, *sizes, PARTS, COLUMNS, num_warps=4)
