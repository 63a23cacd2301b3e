"""Mixers that need a whole document at once.

B rows, T tokens, D model, R rows of one document, L tokens, H heads, K head width, m landmarks or
compressed positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError
from mm.model.context import Ctx
from mm.model.layer import Caps, Mixer, Out
from mm.model.varlen import PackedRows
from mm.state import State


class BothWays(Mixer):
    """Every position depends on every other of its document: no causal mask, no State.

    Each document is mixed in a row of its own; what follows it in the row is zeros.
    """

    caps = Caps(causal=False, bidirectional=True, step=False)
    masks = frozenset({"full"})
    max_len: int | None = None

    def mix(self, x_RLD: Tensor, length_R: Tensor, ctx: Ctx) -> Tensor:
        """`(R, L, D)` of rows that hold one document each in their first ``length`` positions.

        ``ctx`` is that of the call; for matrices over the rows: `of_rows`.
        """
        raise NotImplementedError

    def limit_length(self, max_len: int) -> None:
        """Declare that longer documents are refused."""
        self.max_len = max_len
        self.caps = replace(type(self).caps, length_general=False)

    def of_rows(self, ctx: Ctx) -> Ctx:
        """The context for a matrix over the rows of `mix`."""
        return ctx.at_places(PackedRows.of(ctx.layout, 0).fields(ctx.layout.fields))

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        self.check_mask(ctx.mask)
        if state is not None:
            raise UserError(f"{self.kind} mixes both ways and has no State; take a causal mixer")
        docs = PackedRows.of(ctx.layout, 0)
        rows = docs.unpack(x_BTD)
        if self.max_len is not None and rows.shape[1] > self.max_len:
            raise UserError(
                f"{self.kind} knows positions up to {self.max_len}: a document has "
                f"{rows.shape[1]}; raise max_len"
            )
        # Filled, not multiplied: padding may hold inf.
        rows = rows.masked_fill(~docs.valid[..., None], 0)
        y = self.mix(rows, docs.length, ctx) if rows.shape[:2].numel() else rows
        return Out(docs.pack(y))

    def initial_state(self, n: int, max_len: int) -> Any:
        raise UserError(
            f"{self.kind} mixes both ways and has no State: take a causal mixer to generate"
        )


def valid_of(length_R: Tensor, L: int) -> Tensor:
    """`(R, L)` bool; a document of no tokens counts as one, so that no softmax is over nothing."""
    return torch.arange(L, device=length_R.device) < length_R.clamp_min(1)[:, None]
