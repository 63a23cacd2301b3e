"""A state space with a full matrix over the documents of a call, with its State.

B rows, T tokens, D channels, N states of each, M readouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.dense_ssm import dense_ssm
from mm.model.context import Ctx
from mm.model.mixers.ssm.scan import Hidden, RecurrentState
from mm.model.sequence import Link
from mm.model.varlen import PackedRows, per_document
from mm.state import State


class DenseMemory(RecurrentState):
    """N linear states a channel that do not look at the input; keeps `(slots, D, N)`."""

    documents_apart = True

    def forward(
        self, u_BTD: Tensor, a: Tensor, b: Tensor, c: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, Hidden | None]:
        """Readouts `(B, T, D, M)` of ``h_t = a h_{t-1} + b u_t`` in every document.

        And the State after the call. Matrices as in `dense_ssm`.
        """

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            # Filled, not multiplied: what follows a document in its row may hold inf.
            rows = docs.unpack(u_BTD).masked_fill(~docs.valid[..., None], 0)
            return dense_ssm(rows, a, b, c, before, docs.length)

        if state is None:
            fresh = lambda: per_document(lambda rows: dense_ssm(rows, a, b, c)[0], ctx, u_BTD)
            return self.across(fresh, run, ctx, lambda: _link(a, u_BTD.shape[1])), None
        return self.advance(run, ctx, state)


def _link(a: Tensor, n: int) -> Link:
    """``n`` tokens multiply a state by ``a ** n``, which every process knows."""
    power = torch.linalg.matrix_power(a.double(), n).to(a.dtype)  # rounding grows with n
    return Link(lambda _, before, own: (power @ before[..., None])[..., 0] + own)
