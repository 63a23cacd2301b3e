"""What looks a fixed number of tokens back, with its State.

B rows, T tokens, W width, P tokens kept, C conv size, N slots, R rows of one document, L their
length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.kernels.causal_conv import causal_conv
from mm.model.context import Ctx
from mm.model.sequence import halo
from mm.model.stateful import StatePart
from mm.model.varlen import PackedRows
from mm.state import DataclassState, State


@dataclass(frozen=True)
class Tail(DataclassState):
    """The last inputs of each slot."""

    x: Tensor  # (N, P, W)


class TokenTail(StatePart):
    """Keeps the last ``size`` inputs of ``width`` of each document."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.width, self.size = width, size

    def extend(self, x_BTW: Tensor, ctx: Ctx, state: State) -> tuple[Tensor, PackedRows, Tail]:
        """Rows `(R, P + L, W)` of what was kept and this call's inputs, and the State after it."""
        assert isinstance(state, Tail)
        P, docs = state.x.shape[1], PackedRows.of(ctx.layout, state.x.shape[0])
        rows = docs.unpack(x_BTW)
        inputs = torch.cat((docs.read(state.x).to(rows.dtype), rows), dim=1)
        positions = docs.length[:, None] + torch.arange(P, device=rows.device)
        last = inputs.gather(1, positions[..., None].expand(-1, -1, inputs.shape[-1]))
        return inputs, docs, docs.write(state, x=last)

    def forward(
        self, x_BTW: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[list[Tensor], Tail | None]:
        """``x`` of 0, 1, .. ``size`` tokens ago, `(B, T, W)` each, and the State after the call.

        Zeros before a document's start.
        """
        P = self.size
        if state is not None:
            inputs, docs, after = self.extend(x_BTW, ctx, state)
            L = inputs.shape[1] - P
            back = [docs.pack(inputs[:, P - j : P - j + L]) for j in range(P + 1)]
            return back, after
        document = ctx.layout.fields.document
        if ctx.shard is not None:  # what is before the slice of a row comes from another process
            x_BTW, document = halo(x_BTW, P, ctx.shard)
            back, _ = self._look_back(x_BTW, document)
            return [x[:, P:] for x in back], None
        return self._look_back(x_BTW, document)

    def _look_back(self, x_BTW: Tensor, document: Tensor) -> tuple[list[Tensor], None]:
        T, back = x_BTW.shape[1], [x_BTW]
        for j in range(1, self.size + 1):
            if j >= T:
                back.append(torch.zeros_like(x_BTW))
                continue
            same = (document[:, j:] == document[:, :-j])[..., None]
            # Selected, not multiplied: the neighbour document may hold inf.
            back.append(F.pad(x_BTW[:, :-j].masked_fill(~same, 0), (0, 0, j, 0)))
        return back, None

    def convolve(
        self, u_BTW: Tensor, weight_CW: Tensor, bias_W: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Tail | None]:
        """`causal_conv` of `(B, T, W)` with C = ``size + 1``, and the State after the call."""
        if state is None and ctx.shard is not None:
            u_BTW, document = halo(u_BTW, self.size, ctx.shard)
            return causal_conv(u_BTW, weight_CW, bias_W, document)[:, self.size :], None
        if state is None:
            return causal_conv(u_BTW, weight_CW, bias_W, ctx.layout.fields.document), None
        inputs, docs, after = self.extend(u_BTW, ctx, state)
        # What was kept is the document's own past: no borders, and the first outputs are its.
        same = torch.ones_like(inputs[..., 0], dtype=torch.int32)
        y = causal_conv(inputs, weight_CW, bias_W, same)[:, self.size :]
        return docs.pack(y), after

    def initial_state(self, n: int, max_len: int) -> Tail:
        return Tail(self.like.new_zeros(n, self.size, self.width))


class ShortConv(TokenTail):
    """Causal depthwise convolution of ``conv_size`` tokens inside documents.

    Args:
        bias: added by channel.
        init: weights normal, of standard deviation ``conv_size ** -0.5``, or uniform up to it.
    """

    def __init__(
        self,
        width: int,
        conv_size: int,
        bias: bool = True,
        init: Literal["normal", "uniform"] = "normal",
    ):
        super().__init__(width, conv_size - 1)
        self.init = init
        self.weight = nn.Parameter(torch.empty(conv_size, width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def init_weights(self) -> None:
        scale = self.weight.shape[0] ** -0.5
        if self.init == "normal":
            nn.init.normal_(self.weight, std=scale)
        else:
            nn.init.uniform_(self.weight, -scale, scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, u_BTW: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Tail | None]:
        """`causal_conv` of `(B, T, W)`, and the State after the call."""
        bias = self.bias if self.bias is not None else torch.zeros_like(self.weight[0])
        return self.convolve(u_BTW, self.weight, bias, ctx, state)


class NoConv(StatePart):
    """Stands where a layer has no `ShortConv`: changes nothing and has no State."""

    def forward(self, u_BTW: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, None]:
        return u_BTW, None
