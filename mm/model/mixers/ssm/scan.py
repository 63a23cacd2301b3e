"""Recurrences over the documents of a call, with their State.

B rows, T tokens, W state width, N slots, R rows of one document, L their length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.complex_scan import complex_scan, multiply
from mm.layout import Layout
from mm.model.context import Ctx
from mm.model.sequence import Link, carry_over, decay
from mm.model.stateful import StatePart
from mm.model.varlen import PackedRows
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Hidden(DataclassState):
    """What a recurrence carries."""

    h: Tensor  # (N, ...)


class RecurrentState(StatePart):
    """Keeps one tensor a slot, the state of a recurrence after the slot's last token.

    Args:
        shape: of a slot's tensor.
        initial: what a document's state begins with.
        wide: keep float32 or wider; else the dtype of the parameters around.
        dtype: keep this one instead.
    """

    def __init__(
        self,
        *shape: int,
        initial: float = 0.0,
        wide: bool = True,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.shape, self.initial, self.keeps_wide, self.own_dtype = shape, initial, wide, dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.own_dtype or (self.wide if self.keeps_wide else self.like.dtype)

    def first(self) -> Tensor | float:
        """What a document's state begins with, of a slot's shape or for all of it."""
        return self.initial

    def begin(self, n: int) -> Tensor:
        """`(n, ...)` states before the first token of a document."""
        return self.like.new_full((n, *self.shape), self.initial, dtype=self.dtype)

    def advance(
        self,
        run: Callable[[PackedRows, Tensor], tuple[Tensor, Tensor]],
        ctx: Ctx,
        state: State,
    ) -> tuple[Tensor, Hidden]:
        """Run documents on from their slots: outputs `(B, T, ...)` and the State after the call.

        Args:
            run: takes the call's rows and what each begins from `(R, ...)`; returns outputs `(R, L,
                ...)` and the state after each row's last token `(R, ...)`.
        """
        assert isinstance(state, Hidden)
        docs = PackedRows.of(ctx.layout, state.h.shape[0])
        y, last = run(docs, docs.read(state.h, self.first()))
        return docs.pack(y), docs.write(state, h=last)

    def across(
        self,
        fresh: Callable[[], Tensor],
        run: Callable[[PackedRows, Tensor], tuple[Tensor, Tensor]],
        ctx: Ctx,
        link: Callable[[], Link] | None = None,
    ) -> Tensor:
        """Outputs `(B, T, ...)` of a call without a State: where rows are shared, of the own slice.

        Args:
            fresh: makes those of documents that all begin in this call.
            run: as of `advance`.
            link: as of `carry_over`.
        """
        shard = ctx.shard
        if shard is None:
            return fresh()
        first = self.begin(ctx.layout.shape[0])
        return carry_over(fresh, run, first, shard, link() if link is not None else None)

    def initial_state(self, n: int, max_len: int) -> Hidden:
        return Hidden(self.begin(n))


class DiagonalScan(RecurrentState):
    """``h_t = a_t h_{t-1} + b_t`` in every document; keeps h `(N, W)`, float32 or wider.

    Args:
        width: W.
        initial: what a document's state begins with.
    """

    def __init__(self, width: int, initial: float = 0.0):
        super().__init__(width, initial=initial)

    def forward(
        self,
        scan: Callable[..., tuple[Tensor, Tensor]],
        a: Tensor,
        b_BTW: Tensor,
        ctx: Ctx,
        state: State | None,
    ) -> tuple[Tensor, Hidden | None]:
        """States `(B, T, W)` after each token, and the State after the call.

        Args:
            scan: `linear_scan` or `complex_scan`.
            a: `(B, T, W)`, or `(W,)` where ``scan`` takes a constant.
            b_BTW: `(B, T, W)`.
        """

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            rates = docs.unpack(a) if a.dim() == 3 else a
            h, _ = scan(rates, docs.unpack(b_BTW), None, before)
            return h, docs.last(h, before)

        if state is None:
            fresh = lambda: scan(a, b_BTW, starts(ctx.layout))[0]
            return self.across(fresh, run, ctx, lambda: self._link(scan, a, b_BTW)), None
        return self.advance(run, ctx, state)

    def _link(self, scan: Callable[..., tuple[Tensor, Tensor]], a: Tensor, b_BTW: Tensor) -> Link:
        """What a slice of one document does to the state before it."""
        if self.initial:  # logarithms
            add = lambda total, before, own: torch.logaddexp(total + before, own)
            return Link(add, lambda: a.sum(1), self.shape)

        def total() -> Tensor:
            one = torch.ones_like(b_BTW[:, 0], dtype=self.dtype)
            if scan is complex_scan:
                real, _ = one.chunk(2, -1)
                one = torch.cat((real, torch.zeros_like(real)), -1)
            return scan(a, torch.zeros_like(b_BTW), None, one)[1]

        if scan is complex_scan:
            turn = lambda total, before, own: multiply(total, before) + own
            return Link(turn, total, self.shape)
        return decay(total, *self.shape)


def starts(layout: Layout) -> Tensor:
    """`(B, T)` bool: a document (or padding) begins here."""
    document = layout.fields.document
    if not document.shape[1]:
        return document.bool()
    return F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
