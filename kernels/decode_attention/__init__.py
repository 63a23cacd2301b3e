"""Attention of one query a row to a long cache, cut into equal tiles.

R rows, S cached tokens, H query heads, G key heads (G divides H), K key width, V value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mm.kernels.op import Op

TILE = 256  # tokens


@Op
def decode_attention(q_RHK: Tensor, k_RSGK: Tensor, v_RSGV: Tensor, length_R: Tensor) -> Tensor:
    """Attend to the first ``length`` tokens of each row; a row of length 0 gets zeros.

    Args:
        q_RHK: `(R, H, K)` one query a row and head, any float dtype; softmax in float32 or wider.
        k_RSGK: `(R, S, G, K)` keys; query head h reads key head ``h // (H // G)``.
        v_RSGV: `(R, S, G, V)` values; tokens from ``length`` on must be finite.
        length_R: `(R,)` int64, at most S.
    Returns:
        `(R, H, V)` in the dtype of the values.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1.
    """
    (R, H, K), (S, G) = q_RHK.shape, k_RSGK.shape[1:3]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    with torch.autocast(q_RHK.device.type, enabled=False):
        q = q_RHK.to(wide).reshape(R, G, H // G, K) * K**-0.5
        hidden = torch.arange(S, device=q.device) >= length_R[:, None]
        logits = torch.einsum("rghk,rsgk->rghs", q, k_RSGK.to(wide))
        p = logits.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
        p = p.masked_fill(hidden[:, None, None], 0)  # a row of nothing: zeros, not NaN
        y = torch.einsum("rghs,rsgv->rghv", p, v_RSGV.to(wide))
    return y.reshape(R, H, -1).to(v_RSGV.dtype)


class Piece(NamedTuple):
    """Tokens that one worker reads of one row and key head."""

    row: int
    head: int
    start: int
    stop: int


def plan(lengths: list[int], heads: int, tile: int, workers: int) -> list[list[Piece]]:
    """Give every worker an equal number of tiles (to one), across the borders of rows and heads.

    Every token of every row and head is in exactly one piece. Source: Sanovar et al. 2024, Lean
    Attention (arXiv:2405.10480), stream-K.
    """
    tiles = [-(-n // tile) for n in lengths]
    total = sum(tiles) * heads
    units = ((r, g, n) for r, n in enumerate(tiles) for g in range(heads))
    share = [(w * total // workers, (w + 1) * total // workers) for w in range(workers)]
    work: list[list[Piece]] = [[] for _ in range(workers)]
    at = w = 0  # tiles given out so far; who gets the next
    for row, head, n in units:
        done = 0
        while done < n:
            while at >= share[w][1]:
                w += 1
            take = min(n - done, share[w][1] - at)
            stop = min((done + take) * tile, lengths[row])
            work[w].append(Piece(row, head, done * tile, stop))
            done, at = done + take, at + take
    return work


def merge_pieces(
    top_P: Tensor, total_P: Tensor, out_PV: Tensor, unit_P: Tensor, units: int
) -> Tensor:
    """Return `(units, V)` softmax averages from any split into pieces.

    A piece gives its largest logit, its sum of exponentials above that, and its average times
    the sum. A unit without pieces gets zeros.
    """
    top = top_P.new_full((units,), -math.inf).scatter_reduce(0, unit_P, top_P, "amax")
    scale = (top_P - top[unit_P]).exp()
    total = top_P.new_zeros(units).index_add(0, unit_P, scale * total_P)
    out = out_PV.new_zeros(units, out_PV.shape[1]).index_add(0, unit_P, scale[:, None] * out_PV)
    return out / total.masked_fill(total == 0, 1)[:, None]


def _why_not(q_RHK: Tensor, k_RSGK: Tensor, v_RSGV: Tensor, length_R: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "a graph knows no lengths"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q_RHK, k_RSGK, v_RSGV)):
        return "it has no backward"
    if length_R.device.type != "cpu":
        return "the plan needs the lengths on the host"
    return None


@decode_attention.register("tiled", _why_not)
def _tiled(q_RHK: Tensor, k_RSGK: Tensor, v_RSGV: Tensor, length_R: Tensor) -> Tensor:
    """Pieces of equal work, merged by their logarithms of sums; nothing is read past a length."""
    (R, H, K), G, V = q_RHK.shape, k_RSGK.shape[2], v_RSGV.shape[-1]
    wide = torch.promote_types(v_RSGV.dtype, torch.float32)
    work = plan(length_R.tolist(), G, TILE, max(1, torch.get_num_threads()))
    pieces = [piece for share in work for piece in share]
    if not pieces:
        return v_RSGV.new_zeros(R, H, V)
    q = q_RHK.to(wide).view(R, G, H // G, K) * K**-0.5
    tops, totals, outs = [], [], []
    for row, head, start, stop in pieces:
        logits = q[row, head] @ k_RSGK[row, start:stop, head].to(wide).T
        top = logits.amax(-1)
        p = (logits - top[:, None]).exp()
        tops.append(top)
        totals.append(p.sum(-1))
        outs.append(p @ v_RSGV[row, start:stop, head].to(wide))
    first = torch.tensor([p.row * H + p.head * (H // G) for p in pieces])
    unit = (first[:, None] + torch.arange(H // G)).flatten()
    y = merge_pieces(torch.cat(tops), torch.cat(totals), torch.cat(outs), unit, R * H)
    return y.view(R, H, V).to(v_RSGV.dtype)
