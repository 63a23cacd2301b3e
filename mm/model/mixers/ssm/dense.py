"""Running a state space with a full matrix over the documents of a call. B rows, T tokens, D
channels, N states of each, M readouts, R rows of one document, L their length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.dense_ssm import dense_ssm
from mm.model.context import Ctx
from mm.model.layer import Caps, Mixer
from mm.model.mixers.ssm.scan import Hidden, advanced, commit
from mm.model.varlen import PackedRows, per_document
from mm.state import State


class DenseMemory(Mixer):
    """A mixer whose state are N linear states a channel that do not look at the input."""

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, channels: int, states: int):
        super().__init__()
        self.channels, self.states = channels, states

    def remembered(
        self, u: Tensor, a: Tensor, b: Tensor, c: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Readouts `(B, T, D, M)` of ``h_t = a h_{t-1} + b u_t`` in every document, and the State
        after them; matrices as in `dense_ssm`.
        """
        B, T = u.shape[:2]
        if state is None:
            return per_document(lambda rows: dense_ssm(rows, a, b, c)[0], ctx, u), None
        old = commit(state)
        docs = PackedRows.of(ctx.layout, old.h.shape[0])
        rows, before = docs.unpack(u), docs.read(old.h)
        first = before.view(-1, self.channels, self.states)
        if not ctx.draft:
            y, last = dense_ssm(rows, a, b, c, first, docs.length)
            h = docs.written(old.h.shape[0]).write(old.h, last.flatten(1))
            return docs.pack(y, B, T), Hidden(h)
        # A draft is short: every state may be stored.
        eye = torch.eye(self.states, dtype=a.dtype, device=a.device)[None]
        h, _ = dense_ssm(rows, a, b, eye, first)
        y = torch.einsum("rldn,dmn->rldm", h, c.to(h.dtype).expand(self.channels, -1, -1))
        return docs.pack(y, B, T), advanced(old, docs, before, h.flatten(2), draft=True)

    def _like(self) -> Tensor:
        return next(self.parameters()).detach()

    def initial_state(self, n: int, max_len: int) -> Hidden:
        wide = torch.promote_types(self._like().dtype, torch.float32)
        return Hidden(self._like().new_zeros(n, self.channels * self.states, dtype=wide))

    def state_bytes(self, n: int, max_len: int) -> int:
        return n * self.channels * self.states * max(self._like().element_size(), 4)
