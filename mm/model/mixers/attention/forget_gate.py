"""The forget gate of attention. B rows, T tokens, D model, H heads, N slots, R rows, L their
length, S keys, C cache places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.kv_cache import KV, DraftKV
from mm.model.varlen import PackedRows
from mm.state import DataclassState


class ForgetGate(nn.Module):
    """``log f``, ``f = sigmoid(w x + b)``, one a head: `forget_bias` fades what lies behind it.

    Source: Lin et al. 2025, Forgetting Transformer (arXiv:2503.02130), eq. 5-8.
    """

    def __init__(self, d_model: int, heads: int, linear: LinearFactory):
        super().__init__()
        self.gate = linear(d_model, heads, "forget")
        self.bias = nn.Parameter(torch.empty(heads))

    def init_weights(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """`(B, T, H)` log gates, not positive, float32 or wider."""
        z = self.gate(x_BTD, ctx)
        wide = torch.promote_types(z.dtype, torch.float32)
        return F.logsigmoid(z.to(wide) + self.bias.to(wide))


def forget_bias(faded_RTH: Tensor, faded_RSH: Tensor) -> Tensor:
    """`(R, H, T, S)` sums of the log gates between query and key, from their sums since the
    document's start.

    To keys before the query it is the paper's ``c_i - c_j``; to keys after it (a mask that is not
    causal) the same sum, which fades both ways.
    """
    q, k = faded_RTH.transpose(1, 2), faded_RSH.transpose(1, 2)
    return -(q[..., :, None] - k[..., None, :]).abs()


@dataclass(frozen=True)
class ForgetKV(DataclassState):
    """Cached keys and values, and beside them the sum of log gates up to each cached place."""

    kv: Any  # KV, DraftKV, or another State with `commit`
    gate: KV | DraftKV  # keys (N, H, C, 1) float32 or wider, no values

    def accept(self, n_N: Tensor) -> ForgetKV:
        return ForgetKV(self.kv.accept(n_N), self.gate.accept(n_N))

    def commit(self) -> ForgetKV:
        return ForgetKV(self.kv.commit(), self.gate.commit())


def faded_from(gate: KV, kept_RLH: Tensor, docs: PackedRows) -> Tensor:
    """`(R, L, H)` sums of log gates since the start of each row's document, part of which lies in
    its slot.
    """
    last = ((gate.count - 1).clamp_min(0) % gate.k.shape[2])[:, None, None, None]
    before = gate.k.gather(2, last.expand(-1, gate.k.shape[1], 1, 1))[:, :, 0, 0]
    before = torch.where((gate.count > 0)[:, None], before, 0.0)
    return docs.read(before)[:, None].to(kept_RLH.dtype) + kept_RLH.cumsum(1)
