"""What classic recurrent networks share. B rows, T tokens, D model, W width, S state width, N
slots, R rows of one document, L their length.

They are sequential: token t waits for token t - 1's matrix product. Documents run beside one
another, time does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm.mask import Causal
from mm.model.layer import Caps, Ctx, Linear, Mixer, Out
from mm.model.rows import Docs, Groups
from mm.model.scan_state import Hidden, advanced, settled
from mm.state import State

GROUPS = "rnn.groups"


class RNN(Mixer):
    """``out(h)`` of a recurrent network over each document, by torch's own fused kernels.

    Parameters are laid out as in `torch.nn.GRU` and `torch.nn.LSTM`, so that theirs can be copied.
    """

    caps = Caps(causal=True, step=True, shard=None)
    gates: ClassVar[int]
    parts: ClassVar[int]  # vectors of width W that the state holds

    def __init__(self, d_model: int, width: int, linear: Callable[..., Linear]):
        super().__init__()
        self.width = width
        rows = self.gates * width
        self.weight_ih = nn.Parameter(torch.empty(rows, d_model))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.out = linear(width, d_model, "out")

    def init_weights(self) -> None:
        nn.init.normal_(self.weight_ih, std=self.weight_ih.shape[1] ** -0.5)
        for block in self.weight_hh.detach().chunk(self.gates):
            # Orthogonal: the state's length is kept through time, whatever the gates.
            block.copy_(nn.init.orthogonal_(torch.empty(block.shape)))
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)

    def outputs(self, x_RLD: Tensor, before_RS: Tensor) -> Tensor:
        """Outputs `(R, L, W)` of rows of one document that begin from ``before_RS``."""
        raise NotImplementedError

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `(R, L, W)` and the states after each token `(R, L, S)`."""
        raise NotImplementedError

    def weights(self) -> list[Tensor]:
        """In the order of torch's kernels."""
        return [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]

    def shares(self, serving: bool) -> Mapping[str, Callable[[Ctx], Any]]:
        return {} if serving else {GROUPS: lambda ctx: Groups.of(ctx.layout, Causal())}

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        x = x_BTD.to(self.weight_ih.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y, after = (
                (self._whole(x, ctx), None) if state is None else self._continued(x, ctx, state)
            )
        return Out(self.out(y.to(x_BTD.dtype), ctx), after)

    def _begin(self, n: int) -> Tensor:
        return self.weight_ih.new_zeros(n, self.parts * self.width)

    def _whole(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Outputs of documents that all begin here."""
        B, T = x.shape[:2]
        groups = ctx.shared.get(GROUPS)
        if groups is not None or not torch.compiler.is_compiling():
            groups = groups or Groups.of(ctx.layout, Causal())
            done = [self._run(part, self._begin(group.rows)) for group, (part,) in groups.split(x)]
            return groups.join(done, B, T)
        # Grouping looks at values, which a graph cannot.
        docs = Docs.of(ctx.layout, 0)
        rows = docs.unpack(x)
        return docs.pack(self._run(rows, self._begin(rows.shape[0])), B, T)

    def _run(self, rows: Tensor, before: Tensor) -> Tensor:
        return self.outputs(rows, before) if rows.shape[:2].numel() else self._nothing(rows)[0]

    def _nothing(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        R, L = rows.shape[:2]
        return rows.new_zeros(R, L, self.width), rows.new_zeros(R, L, self.parts * self.width)

    def _continued(self, x: Tensor, ctx: Ctx, state: State) -> tuple[Tensor, State]:
        """Outputs of documents that go on from their slots."""
        B, T = x.shape[:2]
        old = settled(state)
        docs = Docs.of(ctx.layout, old.h.shape[0])
        rows, before = docs.unpack(x), docs.read(old.h)
        y, h = self.states(rows, before) if rows.shape[:2].numel() else self._nothing(rows)
        return docs.pack(y, B, T), advanced(old, docs, before, h, ctx.draft)

    def initial_state(self, n: int, max_len: int) -> Hidden:
        return Hidden(self._begin(n).detach())

    def state_bytes(self, n: int, max_len: int) -> int:
        return n * self.parts * self.width * self.weight_ih.element_size()
