"""The chunk form of the (gated) delta rule on the GPU: what is launched, with which tiles."""

# Triton's types are those of Python, not of its language.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from mm.kernels import device
from mm.kernels.delta_rule.chunk_kernels_triton import (
    erasers_backward,
    inverses,
    solve,
    solve_backward,
    states_backward,
    states_forward,
)
from mm.kernels.linear_attention.chunk_kernels_triton import (
    outputs,
    queries_keys_backward,
    values_backward,
)
from mm.kernels.parts_triton import sum_parts
from mm.kernels.tiles_triton import CHUNK, NONE, SCALAR, block

WIDEST = 256  # key width: a program holds all rows of the state's columns that it carries


def _settings(q: Tensor, v: Tensor, g: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments: those of the passes over time, and those of all chunks at once."""
    K, V = q.shape[-1], v.shape[-1]
    shared = {
        "K": K,
        "V": V,
        "DECAY": (NONE if g is None else SCALAR).value,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
    }
    columns = 16 if K > 128 and device.card() == 86 else 32
    passes = {**shared, "BK": block(K, WIDEST), "BV": block(V, columns), "num_warps": 4}
    if K > 128 or device.card() == 86:  # loads ahead need more shared memory than a card has
        passes.update(num_warps=8, num_stages=1)
    elif device.card() == 80:  # loads ahead pass through registers
        passes.update({"num_warps": 8} if K > 64 else {"num_stages": 1})
    most = 32 if q.dtype == torch.float32 else 64
    return passes, {**shared, "BK": block(K, most), "BV": block(V, most), "num_warps": 4}


def _small(chunks: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the kernels that hold the most tiles: smaller ones where they would spill."""
    if device.card() >= 90:
        return chunks
    return {**chunks, "BK": min(chunks["BK"], 32), "BV": min(chunks["BV"], 32)}


def _run_states(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial: Tensor | None,
    solved: Tensor,
    final: Tensor,
    settings: tuple[dict[str, Any], dict[str, Any]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the last state; return U, W, written `(B, T, H, .)` and states `(B, H, n, K, V)`."""
    (B, T, H, K), V = k.shape, v.shape[-1]
    n = triton.cdiv(T, CHUNK)
    passes, chunks = settings
    begun, some = initial is not None, k if g is None else g
    u, w, written = torch.empty_like(v), torch.empty_like(k), torch.empty_like(v)
    states = final.new_empty(B, H, n, K, V)
    solve[(n, B * H)](k, v, beta, some, solved, u, w, T, H, **chunks)
    states_forward[(triton.cdiv(V, passes["BV"]), B * H)](
        k, u, w, some, initial if begun else final, states, written, final, T, H,
        BEGUN=begun, **passes,
    )  # fmt: skip
    return u, w, written, states


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None,
    scale: float, o: Tensor, final: Tensor, solved: Tensor,
) -> None:  # fmt: skip
    """Write outputs, last state, and the chunks' inverses.

    Takes contiguous tensors, q, k, v of one dtype, none empty.
    """
    (B, T, H, _), V = q.shape, v.shape[-1]
    settings = _settings(q, v, g)
    chunks, some = settings[1], k if g is None else g
    names = ("K", "DECAY", "BK", "PRECISION")
    inverses[(solved.shape[2], B * H)](k, beta, some, solved, T, H, **{x: chunks[x] for x in names})
    _, _, written, states = _run_states(k, v, beta, g, initial, solved, final, settings)
    grid = triton.cdiv(V, chunks["BV"]), states.shape[2], B * H
    outputs[grid](q, k, written, some, q, states, o, scale, T, H, **chunks)


def backward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor | None,
    solved: Tensor, scale: float, do: Tensor | None, dfinal: Tensor | None,
    dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of q, k, v, beta, g (if there is decay) and of the initial state."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    settings = _settings(q, v, g)
    passes, chunks = settings
    final = q.new_empty(B, H, K, V, dtype=torch.float32)
    first = torch.empty_like(final) if initial is None else dinitial
    u, w, written, states = _run_states(k, v, beta, g, initial, solved, final, settings)
    if do is None:
        do = final.new_zeros(B, T, H, V)
    elif scale != 1:
        do = do.float() * scale
    do = do.contiguous()
    dfinal = torch.zeros_like(final) if dfinal is None else dfinal
    n, some = states.shape[2], k if g is None else g
    v_tiles = triton.cdiv(V, chunks["BV"])
    dwritten, dstates = torch.empty_like(v), torch.empty_like(states)
    values_backward[(v_tiles, n, B * H)](
        q, k, some, q, states, do, dwritten, T, H, KEPT=False, **chunks
    )  # fmt: skip
    states_backward[(triton.cdiv(V, passes["BV"]), B * H)](
        q, k, w, some, do, dfinal, dstates, dwritten, first, T, H, **passes
    )
    dk_read = torch.empty_like(k, dtype=torch.float32)
    small = _small(chunks)
    shares = triton.cdiv(K, small["BK"])
    rates = final.new_empty(0 if g is None else (1 + shares, B, T, H))
    queries_keys_backward[(shares, n, B * H)](
        q, k, written, some, q, states, dstates, do, dq, dk_read, rates, T, H,
        **{**small, "num_warps": 8},
    )  # fmt: skip
    dbegun = torch.empty_like(k)
    names = ("K", "V", "BK", "BV", "PRECISION", "num_warps")
    erasers = {**small, "num_warps": 8} if device.card() == 86 else chunks  # or they spill
    erasers_backward[(triton.cdiv(K, erasers["BK"]), n, B * H)](
        solved, states, dwritten, dbegun, T, H, **{x: erasers[x] for x in names}
    )
    solve_backward[(n, B * H)](
        k, v, beta, some, solved, u, w, dwritten, dbegun, dk_read, dk, dv, dbeta,
        rates if g is None else rates[-1], T, H, **small,
    )  # fmt: skip
    if g is not None:
        sum_parts(rates, dg)
