"""Gates of the real-gated linear recurrent unit in Triton: tiles of tokens by a head's channels."""

# Triton's stubs know neither launch options nor indexing by None.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mm.kernels.parts_triton import sum_parts

TOKENS, CHANNELS = 32, 64  # of a tile


@triton.jit
def _one_minus_exp(x):
    """``1 - exp(x)`` of x <= 0, exact where x is close to 0: seven terms of the series there."""
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series)))
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@triton.jit
def _gates(gates_ptr, bias_ptr, rate_ptr, R, K, BR: tl.constexpr, BK: tl.constexpr):
    """A tile's tokens, the two gates after their sigmoids, and the rate."""
    blocks, tiles = tl.cdiv(K, BK), tl.cdiv(R, BR)
    k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    tile = tl.program_id(0) // blocks % tiles
    head = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    r = tile * BR + tl.arange(0, BR)
    mask = (r < R)[:, None] & (k < K)[None, :]
    at = (head * R + r)[:, None] * (2 * K) + k[None, :]
    bias = bias_ptr + head * 2 * K + k
    x = tl.load(gates_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.sigmoid(x + tl.load(bias, mask=k < K, other=0.0)[None, :])
    y = tl.load(gates_ptr + at + K, mask=mask, other=0.0).to(tl.float32)
    y = tl.sigmoid(y + tl.load(bias + K, mask=k < K, other=0.0)[None, :])
    w = head * K + k
    rate = tl.load(rate_ptr + w, mask=k < K, other=0.0)[None, :]
    return x, y, rate, at, r, w, mask, tile


@triton.jit
def _forward(
    gates_ptr,
    bias_ptr,
    rate_ptr,
    u_ptr,
    a_ptr,
    b_ptr,
    R,
    H,
    K,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    x, y, rate, _, r, w, mask, _ = _gates(gates_ptr, bias_ptr, rate_ptr, R, K, BR, BK)
    at = r.to(tl.int64)[:, None] * (H * K) + w[None, :]
    log_a = -rate * x
    rest = tl.sqrt(tl.maximum(_one_minus_exp(2 * log_a), 1e-12))
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + at, tl.exp(log_a), mask=mask)
    tl.store(b_ptr + at, rest * y * u, mask=mask)


@triton.jit
def _backward(
    gates_ptr,
    bias_ptr,
    rate_ptr,
    u_ptr,
    da_ptr,
    db_ptr,
    dgates_ptr,
    du_ptr,
    parts_ptr,
    R,
    H,
    K,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """``parts`` (tile of tokens, 3 H K): a tile's sums of dx and dy as in ``bias``, then drate."""
    x, y, rate, at_g, r, w, mask, tile = _gates(gates_ptr, bias_ptr, rate_ptr, R, K, BR, BK)
    at = r.to(tl.int64)[:, None] * (H * K) + w[None, :]
    u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + at, mask=mask, other=0.0)
    db = tl.load(db_ptr + at, mask=mask, other=0.0)
    log_a = -rate * x
    a, square = tl.exp(log_a), _one_minus_exp(2 * log_a)
    rest = tl.sqrt(tl.maximum(square, 1e-12))
    slope = tl.where(square > 1e-12, -a * a / rest, 0.0)  # of rest by log a
    tl.store(du_ptr + at, (db * rest * y).to(du_ptr.dtype.element_ty), mask=mask)
    dlog = da * a + db * y * u * slope
    dx = -rate * dlog * x * (1 - x)
    dy = db * rest * u * y * (1 - y)
    kind = dgates_ptr.dtype.element_ty
    tl.store(dgates_ptr + at_g, dx.to(kind), mask=mask)
    tl.store(dgates_ptr + at_g + K, dy.to(kind), mask=mask)
    part = parts_ptr + tile.to(tl.int64) * 3 * H * K + w
    of_bias = part + w // K * K  # two gates of a head
    in_k = tl.max(mask.to(tl.int32), 0) > 0
    tl.store(of_bias, tl.sum(tl.where(mask, dx, 0.0), 0), mask=in_k)
    tl.store(of_bias + K, tl.sum(tl.where(mask, dy, 0.0), 0), mask=in_k)
    tl.store(part + 2 * H * K, tl.sum(tl.where(mask, -x * dlog, 0.0), 0), mask=in_k)


def _grid(R: int, H: int, K: int) -> tuple[int]:
    return (H * triton.cdiv(R, TOKENS) * triton.cdiv(K, CHANNELS),)


def forward(gates: Tensor, bias: Tensor, rate: Tensor, u: Tensor, a: Tensor, b: Tensor) -> None:
    """Write decay and input."""
    H, R, G = gates.shape
    sizes = (R, H, G // 2)
    if gates.numel():
        tile = (TOKENS, CHANNELS)
        _forward[_grid(*sizes)](gates, bias, rate, u, a, b, *sizes, *tile, num_warps=4)


def backward(
    gates: Tensor,
    bias: Tensor,
    rate: Tensor,
    u: Tensor,
    da: Tensor,
    db: Tensor,
    dgates: Tensor,
    dbias: Tensor,
    drate: Tensor,
    du: Tensor,
) -> None:
    """Write the gradients; sums over tiles of tokens have a fixed order."""
    H, R, G = gates.shape
    K = G // 2
    parts = rate.new_empty(triton.cdiv(R, TOKENS), 3 * H * K)
    if gates.numel():
        tensors = (gates, bias, rate, u, da, db, dgates, du, parts)
        grid = _grid(R, H, K)
        _backward[grid](*tensors, R, H, K, TOKENS, CHANNELS, num_warps=4)
    sum_parts(parts, dbias, drate)
