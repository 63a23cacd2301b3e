"""Chunkwise linear attention on the GPU: what is launched, with which tiles on which card."""

# Triton's types are those of Python, not of its language.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mm.kernels import device
from mm.kernels.linear_attention.chunk_kernels_triton import (
    channel_scores,
    channel_scores_backward,
    outputs,
    queries_keys_backward,
    states_backward,
    states_forward,
    values_backward,
)
from mm.kernels.parts_triton import sum_parts
from mm.kernels.tiles_triton import CHANNEL, CHUNK, CONSTANT, NONE, SCALAR, block

_KINDS = {None: NONE, 1: CONSTANT, 3: SCALAR, 4: CHANNEL}


def _settings(q: Tensor, v: Tensor, g: Tensor | None) -> dict[str, Any]:
    """Compile-time arguments of all kernels."""
    K, V = q.shape[-1], v.shape[-1]
    decay = _KINDS[None if g is None else g.dim()].value
    most = 32 if q.dtype == torch.float32 else 64  # columns of a tile that registers hold
    return {
        "K": K,
        "V": V,
        "DECAY": decay,
        # Where warps multiply alone, each holds all rates of a tile.
        "BK": block(K, 32 if decay == CHANNEL.value and device.card() < 90 else most),
        "BV": block(V, most),
        # Elsewhere four; on a B200 ptxas would stop at 96 registers and spill.
        "num_warps": 8 if device.card() == 100 and (decay == CHANNEL.value or K <= 64) else 4,
        # Three products of the leading and remaining bits: as exact as float32, on matrix units.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
    }


def _over_time(with_: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the passes over time: 64 rows of a state, what matrix instructions start at."""
    if with_["DECAY"] != CHANNEL.value:
        return {**with_, "BK": block(with_["K"], 64)}
    if device.card() < 90:
        return with_
    columns = 32 if device.card() == 100 else 64
    return {**with_, "BK": block(with_["K"], 64), "BV": min(with_["BV"], columns), "num_warps": 4}


def _small(with_: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the gradients of queries and keys: tiles of which registers hold eight."""
    K, V = with_["K"], with_["V"]
    roomy = with_["PRECISION"] is None and device.card() >= 90
    rows, columns = 32, 64 if roomy and V > 64 else 32
    if with_["DECAY"] == CHANNEL.value:
        rows = 32 if roomy else 16
    elif roomy:
        return {**with_, "num_warps": 8}
    return {**with_, "BK": block(K, rows), "BV": block(V, columns), "num_warps": 8}


def _run_scores(q: Tensor, k: Tensor, g: Tensor | None, with_: dict[str, Any]) -> Tensor:
    """Scores by channel `(B, H, n, C, C)` in the dtype of ``q``; not used with another decay."""
    if g is None or g.dim() < 4:
        return q
    B, T, H, _ = q.shape
    n = triton.cdiv(T, CHUNK)
    scores = q.new_empty(B, H, n, CHUNK, CHUNK)
    settings = {name: with_[name] for name in ("K", "BK", "PRECISION")}
    channel_scores[(n, B * H)](q, k, g, scores, T, H, **settings, num_warps=8)
    return scores


def _run_scores_backward(v: Tensor, do: Tensor, with_: dict[str, Any]) -> Tensor:
    """Gradients of scores by channel, both ways, as `_run_scores`."""
    if with_["DECAY"] != CHANNEL.value:
        return v
    B, T, H, _ = v.shape
    n = triton.cdiv(T, CHUNK)
    dscores = v.new_empty(B, H, n, CHUNK, CHUNK)
    settings = {name: with_[name] for name in ("V", "BV", "PRECISION")}
    channel_scores_backward[(n, B * H)](v, do, dscores, T, H, **settings, num_warps=8)
    return dscores


def _run_states(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    final: Tensor,
    with_: dict[str, Any],
) -> Tensor:
    """Write the last state `(B, H, K, V)` and return those before each chunk `(B, H, n, K, V)`."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    states = final.new_empty(B, H, triton.cdiv(T, CHUNK), K, V)
    begun = initial is not None
    passes = _over_time(with_)
    grid = triton.cdiv(K, passes["BK"]), triton.cdiv(V, passes["BV"]), B * H
    # What is not there has a pointer all the same, unused.
    states_forward[grid](
        k, v, k if g is None else g, initial if begun else final, states, final, T, H,
        BEGUN=begun, **passes,
    )  # fmt: skip
    return states


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    o: Tensor,
    final: Tensor,
) -> None:
    """Write outputs and last state in float32.

    Takes contiguous tensors, q, k, v of one dtype, none empty.
    """
    (B, T, H, _), V = q.shape, v.shape[-1]
    with_ = _settings(q, v, g)
    states = _run_states(k, v, g, initial, final, with_)
    grid = triton.cdiv(V, with_["BV"]), states.shape[2], B * H
    some = q if g is None else g
    scores = _run_scores(q, k, g, with_)
    outputs[grid](q, k, v, some, scores, states, o, 1.0, T, H, **with_)


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None,
    do: Tensor | None, dfinal: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, g (if there is decay) and of the initial state."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    with_ = _settings(q, v, g)
    final = q.new_empty(B, H, K, V, dtype=torch.float32)
    do = final.new_zeros(B, T, H, V) if do is None else do
    states = _run_states(k, v, g, initial, final, with_)
    dstates = torch.empty_like(states)
    passes = _over_time(with_)
    some = q if g is None else g
    first, ended = final if initial is None else dinitial, dfinal is not None
    grid = triton.cdiv(K, passes["BK"]), triton.cdiv(V, passes["BV"]), B * H
    states_backward[grid](
        q, some, do, dfinal if ended else final, dstates, first, T, H, ENDED=ended, **passes
    )
    small = _small(with_)
    grid = triton.cdiv(K, small["BK"]), states.shape[2], B * H
    by_channel = g is None or g.dim() == 4
    rates = dg if by_channel else final.new_empty(grid[0], B, T, H)
    dscores = _run_scores_backward(v, do, with_)
    queries_keys_backward[grid](
        q, k, v, some, dscores, states, dstates, do, dq, dk, rates, T, H, **small
    )
    grid = triton.cdiv(V, with_["BV"]), states.shape[2], B * H
    values_backward[grid](
        q, k, some, _run_scores(q, k, g, with_), dstates, do, dv, T, H, KEPT=True, **with_
    )  # fmt: skip
    if not by_channel:
        if dg.dim() == 1:  # many tokens, few heads: more than one program a column
            dg.copy_(rates.sum((0, 1, 2)))
        else:
            sum_parts(rates, dg)
