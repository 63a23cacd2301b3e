"""State space with a full transition matrix, in chunks.

B rows, T tokens, D channels, N states of each, M readouts of each channel, G = D or 1 (all channels
share).

Inside: C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import Op

CHUNK = 64


@Op
def dense_ssm(
    u_BTD: Tensor,
    a_GNN: Tensor,
    b_GN: Tensor,
    c_GMN: Tensor,
    initial_BDN: Tensor | None = None,
    length_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = A h_{t-1} + b u_t`` in each channel and read ``y_t = c h_t``.

    Args:
        u_BTD: `(B, T, D)` input, any float dtype; accumulated in float32 or wider.
        a_GNN: `(D, N, N)` transitions, or `(1, N, N)` for all channels.
        b_GN: `(D, N)` or `(1, N)`.
        c_GMN: `(D, M, N)` or `(1, M, N)` readouts.
        initial_BDN: `(B, D, N)` state before the first token; None = zeros.
        length_B: `(B,)` int64 tokens of each row, for its last state; outputs go on; None = T.
    Returns:
        outputs `(B, T, D, M)` and states after each row's last token `(B, D, N)`, both in float32
        or wider.
    Source: Gu et al. 2021, LSSL (arXiv:2110.13985), eq. 4-5 (the recurrence).
    """
    u, a, b, c, h = _widened(u_BTD, a_GNN, b_GN, c_GMN, initial_BDN)
    ys, last = [], h
    for t, ut in enumerate(u.unbind(1)):
        h = torch.einsum("bdn,dmn->bdm", h, a.expand(u.shape[2], -1, -1)) + b * ut[..., None]
        last = h if length_B is None else torch.where((t < length_B)[:, None, None], h, last)
        ys.append(torch.einsum("bdn,dmn->bdm", h, c.expand(u.shape[2], -1, -1)))
    return torch.stack(ys, 1) if ys else u.new_zeros(*u.shape, c.shape[1]), last


def _widened(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(u.dtype, a.dtype), torch.float32)
    if initial is None:
        initial = u.new_zeros(u.shape[0], u.shape[2], a.shape[-1])
    return u.to(wide), a.to(wide), b.to(wide), c.to(wide), initial.to(wide)


def _why_not(*_args: Tensor | None, **_kw: Tensor | None) -> str | None:
    return None


@dense_ssm.register("chunked", _why_not)
def _chunked(
    u_BTD: Tensor,
    a_GNN: Tensor,
    b_GN: Tensor,
    c_GMN: Tensor,
    initial_BDN: Tensor | None = None,
    length_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products with powers of A up to a chunk's length, which doubling makes; one state a chunk.

    Cost by token and channel: O((C + N) (M + 1) + N^2 / C) products, linear in T.
    """
    u, a, b, c, h = _widened(u_BTD, a_GNN, b_GN, c_GMN, initial_BDN)
    (B, T, D), M = u.shape, c.shape[1]
    if T == 0 or B == 0:
        return u.new_zeros(B, T, D, M), h
    C = min(CHUNK, 1 << (T - 1).bit_length())
    G = max(a.shape[0], b.shape[0], c.shape[0])
    a, b, c = (x.expand(G, *x.shape[1:]) for x in (a, b, c))
    powers, reads, writes = _krylov(a, b, c, C)
    n = -(-T // C)
    ragged = length_B is not None or T % C
    # One chunk of zeros more: where the rest of a row that ends with a chunk is looked up.
    chunks = F.pad(u, (0, 0, 0, (n + bool(ragged)) * C - T)).unflatten(1, (-1, C))
    rows = chunks[:, :n].permute(3, 0, 1, 2).reshape(D, B * n, C)
    gain = (rows @ writes.flip(1)).view(D, B, n, -1).unbind(2)
    states = [h.transpose(0, 1)]
    for step in gain:
        states.append(states[-1] @ powers[-1].mT + step)
    every = torch.stack(states, 2)  # (D, B, n + 1, N)
    kernel = (reads @ b[:, None, :, None])[..., 0]  # (G, C, M)
    late = torch.arange(C, device=u.device)
    gap = late[:, None] - late[None]  # reader - read
    toeplitz = kernel[:, gap.clamp_min(0)].masked_fill((gap < 0)[None, ..., None], 0)
    y = rows @ toeplitz.permute(0, 2, 1, 3).flatten(2)
    after = (reads @ a[:, None]).flatten(1, 2)  # c A^(i + 1)
    y = y + every[:, :, :n].reshape(D, B * n, -1) @ after.mT
    y = y.view(D, B, n * C, M)[:, :, :T].permute(1, 2, 0, 3)
    if not ragged:
        return y, states[-1].transpose(0, 1)
    end = length_B if length_B is not None else torch.full((B,), T, device=u.device)
    return y, _ends(every, chunks, end, powers, writes)


def _krylov(a: Tensor, b: Tensor, c: Tensor, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """``A^(2^k)`` up to ``size``, ``c A^j`` `(G, C, M, N)` and ``A^j b`` `(G, C, N)`, j < size."""
    powers, reads, writes = [a], c[:, None], b[:, None]
    while reads.shape[1] < size:
        p = powers[-1]
        reads = torch.cat((reads, reads @ p[:, None]), 1)
        writes = torch.cat((writes, writes @ p.mT), 1)
        powers.append(p @ p)
    return powers, reads, writes


def _ends(
    every: Tensor, chunks: Tensor, length: Tensor, powers: list[Tensor], writes: Tensor
) -> Tensor:
    """Return the states `(B, D, N)` after ``length`` tokens.

    They are the last whole chunk's, then moved on by the bits of the rest.
    """
    B, C = chunks.shape[0], chunks.shape[2]
    which, rest = length // C, length % C
    row = torch.arange(B, device=length.device)
    h = every[:, row, which]  # (D, B, N)
    tail = chunks[row, which].permute(2, 0, 1)  # (D, B, C)
    at = torch.zeros_like(rest)
    for k in range(len(powers) - 2, -1, -1):
        size = 1 << k
        positions = (at[:, None] + torch.arange(size, device=length.device)).clamp_max(C - 1)
        taken = tail.gather(2, positions.expand(tail.shape[0], -1, -1))
        further = h @ powers[k].mT + taken @ writes[:, :size].flip(1)
        bit = (rest & size) > 0
        h = torch.where(bit[:, None], further, h)
        at = at + torch.where(bit, size, 0)
    return h.transpose(0, 1)
