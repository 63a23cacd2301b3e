"""What mixers of this family keep of a document, with its State.

B rows, T tokens, H heads, K key width, V value width, W width of a vector, N slots, R rows of one
document, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm.model.context import Ctx
from mm.model.mixers.ssm.scan import Hidden, RecurrentState
from mm.model.varlen import PackedRows, per_document
from mm.state import State


class MatrixMemory(RecurrentState):
    """A matrix `(H, K, V)` that an Op changes token by token: zeros at first, float32 or wider."""

    def __init__(self, heads: int, key_dim: int, value_dim: int):
        super().__init__(heads, key_dim, value_dim)

    def forward(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        parts: Sequence[Tensor | None],
        ctx: Ctx,
        state: State | None,
    ) -> tuple[Tensor, Hidden | None]:
        """Outputs `(B, T, H, V)` of every document, and the State after the call.

        Args:
            op: `linear_attention`, `delta_rule` or alike: ``op(*parts, S)`` makes outputs `(R, L,
                H, V)` and the last matrix `(R, H, K, V)`; S is left out where documents begin.
                Zeros in all parts of a token leave the matrix alone.
            parts: `(B, T, ...)` each; `(H,)` holds for all tokens; the last may be None.
        """
        if state is None:
            tokens = [t for t in parts if t is not None and t.dim() > 1]
            constants = [t for t in parts if t is not None and t.dim() == 1]
            return per_document(lambda *x: op(*x, *constants)[0], ctx, *tokens), None

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            def rows(t: Tensor | None) -> Tensor | None:
                if t is None:
                    return None
                t = docs.unpack(t if t.dim() > 1 else t.expand(*ctx.layout.shape, -1))
                # Zeros where there is no token: it writes nothing, and nothing decays.
                return t.masked_fill(~docs.valid.view(*docs.valid.shape, *[1] * (t.dim() - 2)), 0)

            return op(*map(rows, parts), before)

        return self.advance(run, ctx, state)


class ScaledSums(RecurrentState):
    """Sums in units of ``exp(m)``, after ``peaks`` largest exponents m so far: -inf at first.

    Args:
        peaks: how many of the numbers that are kept are an m.
        width: W, m and sums together.
    """

    def __init__(self, peaks: int, width: int):
        super().__init__(width)
        self.peaks = peaks

    def forward(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        parts: Sequence[Tensor],
        ctx: Ctx,
        state: State | None,
    ) -> tuple[Tensor, Hidden | None]:
        """Outputs `(B, T, V)` of every document, and the State after the call.

        Args:
            op: ``op(*parts, before)`` makes outputs `(R, L, V)` and what is kept after each token
                `(R, L, W)` from that before the first one `(R, W)`.
            parts: `(B, T, ...)` each.
        """
        if state is None:
            return per_document(lambda *x: op(*x, self.begin(len(x[0])))[0], ctx, *parts), None

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            o, h = op(*map(docs.unpack, parts), before)
            return o, docs.last(h, before)

        return self.advance(run, ctx, state)

    def first(self) -> Tensor:
        return self.begin(1)[0]

    def begin(self, n: int) -> Tensor:
        """`(n, W)`: no exponent at all, and nothing summed up."""
        h = super().begin(n)
        h[:, : self.peaks] = -torch.inf
        return h
