"""Rotation of pairs in Triton: a program rotates some heads of some tokens."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.rms_norm import row_strides

ELEMENTS = 4096  # of a tile: several heads


@triton.jit
def places(r, H, K, s_token, s_head):
    """Token of each row, and where in a tensor of strides and in a contiguous one it begins."""
    token = r // H
    return token, (token * s_token + r % H * s_head)[:, None], (r * K)[:, None]


@triton.jit
def angles(cos_sin_ptr, token, tokens, P, p, mask):
    """Cosines and sines of pairs ``p``."""
    table = cos_sin_ptr + (token * P)[:, None] + p
    cos = tl.load(table, mask=mask, other=0.0)
    return cos, tl.load(table + tokens.to(tl.int64) * P, mask=mask, other=0.0)


@triton.jit
def _rotate(
    x_ptr,
    cos_sin_ptr,
    y_ptr,
    tokens,
    H,
    K,
    P,
    s_token,
    s_head,
    BACK: tl.constexpr,
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
    cos, sin = angles(cos_sin_ptr, token, tokens, P, p, mask)
    if BACK:
        sin = -sin
    a = tl.load(x + p, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + P + p, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + p, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y + P + p, (b * cos + a * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        d = 2 * P + tl.arange(0, REST)[None, :]
        mask = here[:, None] & (d < K)
        tl.store(y + d, tl.load(x + d, mask=mask), mask=mask)


def sizes_of(x: Tensor, cos_sin: Tensor) -> tuple[Tensor, tuple[int, ...], dict[str, int]]:
    """``x``, its tokens, heads, width, pairs and strides of token and head, and the tile."""
    at, (_, inner, K, s_outer, s_inner) = row_strides(x)
    H, P = x.shape[-2], cos_sin.shape[-1]
    if inner != H:  # contiguous
        s_outer, s_inner = H * K, K
    BP, rest = triton.next_power_of_2(P), K - 2 * P
    REST = triton.next_power_of_2(rest) if rest else 0
    tile = {"BR": max(ELEMENTS // triton.next_power_of_2(2 * BP + REST), 1), "BP": BP, "REST": REST}
    return at, (x.numel() // (H * K), H, K, P, s_outer, s_inner), tile


def _launch(x: Tensor, cos_sin: Tensor, y: Tensor, back: bool) -> None:
    at, sizes, tile = sizes_of(x, cos_sin)
    grid = (triton.cdiv(sizes[0] * sizes[1], tile["BR"]),)
    _rotate[grid](at, cos_sin, y, *sizes, BACK=back, **tile)


def forward(x: Tensor, cos_sin: Tensor, y: Tensor) -> None:
    """Write the rotated heads."""
    _launch(x, cos_sin, y, back=False)


def backward(cos_sin: Tensor, grad: Tensor, dx: Tensor) -> None:
    """Write the gradient, rotated back."""
    _launch(grad, cos_sin, dx, back=True)
