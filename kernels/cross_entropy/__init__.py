"""Cross-entropy of a linear layer without all its logits in memory. P places, D width, N
classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import Op

CHUNK_BYTES = 64 << 20  # float32 logits held at once


def chunk_rows(n_classes: int) -> int:
    """Places whose logits fit CHUNK_BYTES; at least 1024, below which bf16 products lose a third of
    their speed.
    """
    return max(1024, CHUNK_BYTES // (4 * n_classes))


def _compute_dtype(h: Tensor) -> torch.dtype:
    """What matrix products run in: autocast decides, as it would for `F.linear`."""
    device = h.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and h.dtype != torch.float64
        else h.dtype
    )


@Op
def linear_cross_entropy(
    h_PD: Tensor, weight_ND: Tensor, target_P: Tensor, bias_N: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each place's target under ``softmax(h @ weight.T + bias)``.

    Args:
        h_PD: `(P, D)` float hidden states; P may be 0.
        weight_ND: `(N, D)` float; products run in the autocast dtype when that is on, the softmax
            in float32 or wider.
        target_P: `(P,)` int in [0, N).
        bias_N: `(N,)` float or None.
    Returns:
        `(P,)` float32 (float64 for float64 input), unreduced.
    """
    dtype = _compute_dtype(h_PD)
    with torch.autocast(h_PD.device.type, enabled=False):
        logits = h_PD.to(dtype) @ weight_ND.to(dtype).T
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if bias_N is not None:
            logits = logits + bias_N.to(logits.dtype)
        return F.cross_entropy(logits, target_P.long(), reduction="none")


class _Chunked(torch.autograd.Function):
    """Logits live for one chunk of places only; the backward makes them again, or keeps them when
    one chunk is all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        w = weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        nll = h.new_empty(h.shape[0], dtype=wide)
        lse = torch.empty_like(nll)
        kept = None
        for at in range(0, h.shape[0], rows):
            here = slice(at, at + rows)
            logits = _logits(h[here], w, bias, wide)
            torch.logsumexp(logits, -1, out=lse[here])
            nll[here] = lse[here] - logits.gather(1, target[here, None])[:, 0]
            if h.shape[0] <= rows and (h.requires_grad or weight.requires_grad):
                kept = logits.sub_(lse[here, None]).exp_()
        ctx.save_for_backward(h, weight, target, bias, lse, kept)
        ctx.dtype, ctx.rows = dtype, rows
        return nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, target, bias, lse, kept = ctx.saved_tensors
        dtype, rows = ctx.dtype, ctx.rows
        w = weight.to(dtype)
        wide = lse.dtype
        dh = torch.empty_like(h)
        dw = torch.zeros(weight.shape, dtype=wide, device=w.device)
        db = torch.zeros(weight.shape[0], dtype=wide, device=w.device)
        for at in range(0, h.shape[0], rows):
            here = slice(at, at + rows)
            p = (
                kept.clone()
                if kept is not None
                else (_logits(h[here], w, bias, wide) - lse[here, None]).exp_()
            )
            p.scatter_add_(1, target[here, None], torch.full_like(lse[here, None], -1.0))
            p *= grad[here, None]
            if bias is not None:
                db += p.sum(0)
            g = p.to(dtype)
            dh[here] = g @ w
            dw += g.T @ h[here].to(dtype)
        return (
            dh,
            dw.to(weight.dtype),
            None,
            db.to(bias.dtype) if bias is not None else None,
            None,
            None,
        )


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    logits = (h.to(w.dtype) @ w.T).to(wide)
    return logits if bias is None else logits + bias.to(wide)


@linear_cross_entropy.register("chunked", lambda *a, **k: None)
def _chunked(
    h_PD: Tensor, weight_ND: Tensor, target_P: Tensor, bias_N: Tensor | None = None
) -> Tensor:
    dtype = _compute_dtype(h_PD)
    with torch.autocast(h_PD.device.type, enabled=False):
        return _Chunked.apply(
            h_PD, weight_ND, target_P.long(), bias_N, dtype, chunk_rows(weight_ND.shape[0])
        )
