"""Mixers that look a fixed number of tokens back, and their State. B rows, T tokens, W width, P
places kept, N slots, R rows of one document, L their length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.causal_conv import causal_conv
from mm.model.context import Ctx
from mm.model.varlen import PackedRows
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Tail(DataclassState):
    """The last inputs of each slot."""

    x: Tensor  # (N, P, W)

    def accept(self, n_N: Tensor) -> Tail:
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> Tail:
        return self


@dataclass(frozen=True)
class DraftTail(DataclassState):
    """The tail before a draft call, then the call's inputs."""

    x: Tensor  # (N, P + L, W)
    length: Tensor  # (N,)
    kept: int  # P

    def accept(self, n_N: Tensor) -> Tail:
        n = torch.minimum(n_N.to(self.length), self.length)
        places = n[:, None] + torch.arange(self.kept, device=n.device)
        return Tail(self.x.gather(1, places[..., None].expand(-1, -1, self.x.shape[-1])))

    def commit(self) -> Tail:
        return self.accept(self.length)


def _forward_cached(x: Tensor, ctx: Ctx, state: State) -> tuple[Tensor, PackedRows, State]:
    """Rows `(R, P + L, W)` of the tails and this call's inputs, and the State after them."""
    assert isinstance(state, Tail | DraftTail)
    old = state.commit().x
    (N, P), docs = old.shape[:2], PackedRows.of(ctx.layout, old.shape[0])
    rows = docs.unpack(x)
    inputs = torch.cat((docs.read(old).to(rows.dtype), rows), dim=1)
    w = docs.written(N)
    taken = w.take(inputs).to(old.dtype)
    # A slot that nobody writes keeps its tail, as one that a row of length 0 wrote.
    first = torch.where(w.hit[:, None, None], taken[:, :P], old)
    drafted = DraftTail(torch.cat((first, taken[:, P:]), dim=1), w.length, P)
    return inputs, docs, drafted if ctx.draft else drafted.commit()


def preceding(
    x_BTW: Tensor, places: int, ctx: Ctx, state: State | None
) -> tuple[list[Tensor], State | None]:
    """``x`` of 0, 1, .. ``places`` tokens ago in each document, `(B, T, W)` each, zeros before its
    start; and the State after the call.
    """
    B, T = x_BTW.shape[:2]
    if state is not None:
        inputs, docs, after = _forward_cached(x_BTW, ctx, state)
        L = inputs.shape[1] - places
        back = [docs.pack(inputs[:, places - j : places - j + L], B, T) for j in range(places + 1)]
        return back, after
    document, back = ctx.layout.fields.document, [x_BTW]
    for j in range(1, places + 1):
        if j >= T:
            back.append(torch.zeros_like(x_BTW))
            continue
        same = (document[:, j:] == document[:, :-j])[..., None]
        # Selected, not multiplied: the neighbour document may hold inf.
        back.append(F.pad(x_BTW[:, :-j].masked_fill(~same, 0), (0, 0, j, 0)))
    return back, None


def convolved(
    u_BTW: Tensor, weight_CW: Tensor, bias_W: Tensor, ctx: Ctx, state: State | None
) -> tuple[Tensor, State | None]:
    """Depthwise `causal_conv` inside documents, `(B, T, W)`, and the State after the call."""
    if state is None:
        return causal_conv(u_BTW, weight_CW, bias_W, ctx.layout.fields.document), None
    inputs, docs, after = _forward_cached(u_BTW, ctx, state)
    # The tail is the document's own past: no borders, and the first outputs are the tail's.
    same = torch.ones_like(inputs[..., 0], dtype=torch.int32)
    y = causal_conv(inputs, weight_CW, bias_W, same)[:, weight_CW.shape[0] - 1 :]
    return docs.pack(y, *u_BTW.shape[:2]), after
