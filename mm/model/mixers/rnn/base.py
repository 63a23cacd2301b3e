"""What recurrent networks without a parallel form share.

B rows, T tokens, D model, W width, S state width, N slots, R rows of one document, L their length.

They are sequential: token t waits for what token t - 1 left. Documents run beside one another, time
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out
from mm.model.layer_config import LayerConfig
from mm.model.mixers.ssm.scan import RecurrentState
from mm.model.varlen import PackedRows, per_document
from mm.state import State


class Recurrence(Mixer):
    """``out(y)`` of a recurrence that sees one document a row and begins each at zeros.

    Inputs come in the dtype of the parameters, states in that of `memory`. Subclasses set ``out``
    and write `states`.

    Args:
        width: W, of the outputs.
        size: S, of the state.
        wide: whether the state is float32 or wider (`RecurrentState`).
    """

    documents_apart = True
    caps = Caps(causal=True, step=True, shard=None, sequential=True)
    out: nn.Module

    def __init__(self, width: int, size: int, wide: bool = True):
        super().__init__()
        self.width = width
        self.memory = RecurrentState(size, wide=wide)

    def outputs(self, x_RLD: Tensor, before_RS: Tensor) -> Tensor:
        """Outputs `(R, L, W)` of rows of one document that begin from ``before_RS``."""
        return self.states(x_RLD, before_RS)[0]

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, W)` and the states after each token `(R, L, S)`."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        x = x_BTD.to(self.memory.like.dtype)
        nothing = lambda rows: rows.new_zeros(*rows.shape[:2], self.width)

        def begin(rows: Tensor) -> Tensor:
            full = rows.shape[:2].numel()
            return self.outputs(rows, self.memory.begin(len(rows))) if full else nothing(rows)

        def go_on(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            rows = docs.unpack(x)
            if not rows.shape[:2].numel():
                return nothing(rows), before
            y, h = self.states(rows, before)
            return y, docs.last(h, before)

        with torch.autocast(x.device.type, enabled=False):
            if state is None:
                y, after = per_document(begin, ctx, x), None
            else:
                y, after = self.memory.advance(go_on, ctx, state)
        return Out(self.out(y.to(x_BTD.dtype), ctx), after)


class Cell(Recurrence):
    """A recurrence stepped as its paper writes it.

    What needs no state is computed for all tokens at once, as matrix products; the state's first W
    entries are the output.
    """

    def inputs(self, x_RLD: Tensor) -> Sequence[Tensor]:
        """What `step` reads of each token, `(R, L, ...)` each."""
        raise NotImplementedError

    def step(self, read: Sequence[Tensor], before_RS: Tensor) -> Tensor:
        """The state `(R, S)` after a token."""
        raise NotImplementedError

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        h, kept = before_RS, []
        # unbind, not [:, t]: the backward of an index writes a whole zero tensor a step.
        for read in zip(*(part.unbind(1) for part in self.inputs(x_RLD)), strict=True):
            h = self.step(read, h)
            kept.append(h)
        states = torch.stack(kept, 1)
        return states[..., : self.width], states


class RNNConfig(LayerConfig):
    """What `RNN` is built of."""

    width: Annotated[int, Field(gt=0, description="default d_model")] | None = None
    rank: int | None = Field(
        default=None, gt=0, description="of the state's matrices; default full"
    )
    diagonal: Annotated[bool, Field(description="a low rank is beside a diagonal")] = False

    small = {"width": 6}


class RNN(Recurrence):
    """``out(h)`` of a recurrent network over each document, by torch's own fused kernels.

    Parameters are laid out as in `torch.nn.GRU` and `torch.nn.LSTM`, so that theirs can be copied.
    With ``rank`` the state's matrices are ``L R`` or ``L R + diag(d)``, so that width no longer
    costs width squared parameters; the kernels are given the product.

    Source of the low rank: Miceli Barone 2016, Low-rank passthrough neural networks
    (arXiv:1603.03116).
    """

    overwrites = True
    gates: ClassVar[int]
    parts: ClassVar[int]  # vectors of width W that the state holds

    def __init__(self, d_model: int, config: RNNConfig, linear: LinearFactory):
        width, rank = config.width or d_model, config.rank
        super().__init__(width, self.parts * width, wide=False)  # as torch's kernels move it
        self.rank, rows = rank, self.gates * width
        self.weight_ih = nn.Parameter(torch.empty(rows, d_model))
        if rank is None:
            self.weight_hh = nn.Parameter(torch.empty(rows, width))
        else:
            self.low = nn.Parameter(torch.empty(self.gates, rank, width))  # R
            self.high = nn.Parameter(torch.empty(self.gates, width, rank))  # L
        kept = rank is not None and config.diagonal
        self.diagonal = nn.Parameter(torch.empty(self.gates, width)) if kept else None
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.normal_(self.weight_ih, std=self.weight_ih.shape[1] ** -0.5)
        if self.rank is None:
            for block in self.weight_hh.detach().chunk(self.gates):
                # Orthogonal: the state's length is kept through time, whatever the gates.
                block.copy_(nn.init.orthogonal_(torch.empty(block.shape)))
        else:
            nn.init.normal_(self.low, std=self.width**-0.5)
            nn.init.normal_(self.high, std=self.rank**-0.5)
        if self.diagonal is not None:
            nn.init.zeros_(self.diagonal)
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)

    def recurrent(self) -> Tensor:
        """The matrix `(gates * W, W)` that the state is multiplied by."""
        if self.rank is None:
            return self.weight_hh
        product = self.high @ self.low
        if self.diagonal is not None:
            product = product + torch.diag_embed(self.diagonal)
        return product.flatten(0, 1)

    def weights(self) -> list[Tensor]:
        """In the order of torch's kernels."""
        return [self.weight_ih, self.recurrent(), self.bias_ih, self.bias_hh]
