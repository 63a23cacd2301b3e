"""Experts with stacked weights: their matrices, and the way of tokens to them and back.

R tokens, K chosen experts of each, E experts, D model, P = K R choices, S rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm.kernels.grouped_linear import BLOCK, grouped_linear
from mm.model.layer import Linear


class StackedLinear(Linear):
    """One matrix an expert, in one tensor `(E, d_out, d_in)`; initialised as `Dense`."""

    def __init__(self, n: int, d_in: int, d_out: int, name: str):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.empty(n, d_out, d_in))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[2] ** -0.5)

    def rescale(self, factor: float) -> None:
        with torch.no_grad():
            self.weight.mul_(factor)

    def forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:  # type: ignore[override]
        """`(S, d_out)` of rows that lie expert by expert, see `grouped_linear`."""
        device, dtype = x_SD.device.type, x_SD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        y = grouped_linear(x_SD.to(dtype), self.weight.to(dtype), ends_E)
        return y  # type: ignore[return-value]  the decorator has no types


class Plan(NamedTuple):
    """Where the choices of all tokens lie, expert by expert; sizes do not depend on values."""

    choice: Tensor  # (S,) int64: which choice a row is; -1: nobody's
    row: Tensor  # (P,) int64: where a choice lies; -1: nowhere
    ends: Tensor  # (E,) int32
    load: Tensor  # (E,) int64: choices of each expert, dropped ones too
    kept: Tensor  # (P,) bool


def make_plan(expert_P: Tensor, n: int, most: Tensor | None = None) -> Plan:
    """Sort choices by expert.

    Args:
        expert_P: `(P,)` int64; n: none, of padding.
        n: E.
        most: () choices that an expert takes, the first ones in the order of ``expert_P``; None:
            all.
    """
    P, device = expert_P.shape[0], expert_P.device
    count = torch.zeros(n + 1, dtype=torch.int64, device=device)
    count = count.scatter_add(0, expert_P, torch.ones_like(expert_P))
    order = expert_P.argsort(stable=True)
    sorted_expert = expert_P[order]
    number = torch.arange(P, device=device)
    rank = number - (count.cumsum(0) - count)[sorted_expert]  # among those of its expert
    kept = sorted_expert < n
    taken = count[:n]
    if most is not None:
        kept, taken = kept & (rank < most), torch.minimum(taken, most)
    room = (taken + BLOCK - 1) // BLOCK * BLOCK
    ends = room.cumsum(0)
    size = (P + BLOCK - 1) // BLOCK * BLOCK + n * BLOCK
    begins = torch.cat((ends - room, ends.new_zeros(1)))
    place = torch.where(kept, begins[sorted_expert] + rank, size)  # size: cut off below
    choice = torch.full((size + 1,), -1, dtype=torch.int64, device=device)
    choice = choice.scatter(0, place, order)[:size]
    row = torch.zeros_like(order).scatter(0, order, torch.where(kept, place, -1))
    return Plan(choice, row, ends.to(torch.int32), count[:n], row >= 0)


class _Take(torch.autograd.Function):
    """``x[index % len(x)]``, zeros where the index is -1; its gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        ctx.rows = x.shape[0]
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        _, back = ctx.saved_tensors
        each = _rows(dy, back)
        if back.shape[0] != ctx.rows:  # several choices of a token
            each = each.unflatten(0, (-1, ctx.rows)).sum(0)
        return each, None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    taken = x.index_select(0, index.clamp_min(0) % x.shape[0])
    return taken.masked_fill_((index < 0)[:, None], 0)


def to_experts(x_RD: Tensor, plan: Plan) -> Tensor:
    """`(S, D)` rows of the tokens that chose each expert; choice p is of token p modulo R."""
    return _Take.apply(x_RD, plan.choice, plan.row)  # type: ignore[return-value]


def from_experts(y_SD: Tensor, plan: Plan) -> Tensor:
    """`(P, D)` what each choice gave; zeros where it was dropped."""
    return _Take.apply(y_SD, plan.row, plan.choice)  # type: ignore[return-value]
