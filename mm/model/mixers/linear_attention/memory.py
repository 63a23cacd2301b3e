"""What mixers of this family keep of a document, with its State.

B rows, T tokens, H heads, K key width, V value width, W width of a vector, N slots, R rows of one
document, L their length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.op import exact
from mm.model.context import Ctx
from mm.model.length_buckets import stays_flat
from mm.model.mixers.ssm.scan import Hidden, RecurrentState, starts
from mm.model.sequence import Link, decay
from mm.model.varlen import PackedRows, per_document
from mm.state import State

FORGETS = -1000.0  # log decay: its exponential is 0, in float64, too


class MatrixMemory(RecurrentState):
    """A matrix `(H, K, V)` that an Op changes token by token: zeros at first, float32 or wider."""

    # late: queries read what was there before their token.
    # What a token does to the matrix besides what it adds: scales its rows, the last of ``parts``
    # the logarithms (or None); or any linear map of them, and the third of ``parts`` are values.
    change: Literal["scale", "map"]

    def __init__(
        self,
        heads: int,
        key_dim: int,
        value_dim: int,
        change: Literal["scale", "map"] = "scale",
        late: bool = False,
    ):
        super().__init__(heads, key_dim, value_dim)
        self.change, self.late = change, late

    def forward(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        parts: Sequence[Tensor | None],
        ctx: Ctx,
        state: State | None,
        rows_whole: bool = True,
    ) -> tuple[Tensor, Hidden | None]:
        """Outputs `(B, T, H, V)` of every document, and the State after the call.

        Args:
            op: `linear_attention`, `delta_rule` or alike: ``op(*parts, S)`` makes outputs `(R, L,
                H, V)` and the last matrix `(R, H, K, V)`; S is left out where documents begin.
                Zeros in all parts of a token leave the matrix alone.
            parts: `(B, T, ...)` each; `(H,)` holds for all tokens; the last may be None.
            rows_whole: ``op`` may be given several documents in a row: what it remembers decays by
                the last of ``parts``, and nothing else goes from token to token.
        """

        def fresh() -> Tensor:
            if rows_whole and stays_flat(ctx.layout):
                return op(*self._apart(parts, ctx))[0]
            tokens = [t for t in parts if t is not None and t.dim() > 1]
            constants = [t for t in parts if t is not None and t.dim() == 1]
            return per_document(lambda *x: op(*x, *constants)[0], ctx, *tokens)

        def rows(docs: PackedRows, t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            t = docs.unpack(t if t.dim() > 1 else t.expand(*ctx.layout.shape, -1))
            # Zeros where there is no token: it writes nothing, and nothing decays.
            return t.masked_fill(~docs.valid.view(*docs.valid.shape, *[1] * (t.dim() - 2)), 0)

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            return op(*(rows(docs, t) for t in parts), before)

        if state is None:
            return self.across(fresh, run, ctx, lambda: self._link(op, parts, rows, ctx)), None
        return self.advance(run, ctx, state)

    def _apart(self, parts: Sequence[Tensor | None], ctx: Ctx) -> list[Tensor | None]:
        """``parts`` of whole rows in which a document knows nothing of the one before it.

        Its first token's decay leaves nothing. So a row goes to the kernel as it is, whatever
        documents it holds, and shapes stay the same.
        """
        q, k, *more, g = parts
        assert k is not None
        if g is None:
            g = k.new_zeros(self.shape[0], dtype=self.dtype)
        if g.dim() == 1:
            g = g.expand(*ctx.layout.shape, -1)
        begins = starts(ctx.layout)
        if self.late:  # a token's own decay and key come after it: those of a document's last one
            begins = F.pad(begins[:, 1:], (0, 1))
            k = k.masked_fill(begins[..., None, None], 0)
        return [q, k, *more, g.masked_fill(begins[(..., *[None] * (g.dim() - 2))], FORGETS)]

    def _link(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        parts: Sequence[Tensor | None],
        rows: Callable[[PackedRows, Tensor | None], Tensor | None],
        ctx: Ctx,
    ) -> Link:
        """What a slice of one document does to the matrix before it."""
        (B, T), (H, K, _) = ctx.layout.shape, self.shape
        if self.change == "map":
            change = lambda a, before, own: a @ before + own
            return Link(change, lambda: self._map(op, parts), (H, K, K))
        _, _, _, g = parts

        @exact
        def leave(k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
            """Sum of keys times values, each with the decays after it."""
            k, v = k.to(self.dtype), v.to(self.dtype)
            if g is not None:
                # Summed from the end: a difference of two long sums would lose bits.
                late = torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), 1).to(self.dtype)
                after = late.flip(1).cumsum(1).flip(1).exp()
                k = k * (after if after.dim() == 4 else after[..., None])
            return torch.einsum("rlhk,rlhv->rhkv", k, v)

        def own(docs: PackedRows) -> Tensor:
            k, v, decays = (rows(docs, t) for t in parts[1:])
            assert k is not None and v is not None
            return leave(k, v, decays)

        if g is None:
            return Link(lambda _, before, after: before + after, leave=own)

        def total() -> Tensor:
            summed = g.expand(B, T, -1).sum(1) if g.dim() == 1 else g.sum(1)
            return summed.exp().view(B, H, -1, 1)

        return decay(total, H, K if g.dim() == 4 else 1, 1)._replace(leave=own)

    def _map(
        self, op: Callable[..., tuple[Tensor, Tensor]], parts: Sequence[Tensor | None]
    ) -> Tensor:
        """`(B, H, K, K)`: what becomes of the unit matrix where nothing is written."""
        q, k, v, *rest = parts
        assert v is not None
        B, H, K = len(v), *self.shape[:2]
        one = torch.eye(K, dtype=self.dtype, device=v.device).expand(B, H, K, K).contiguous()
        return op(q, k, v.new_zeros(*v.shape[:3], K), *rest, one)[1]


class ScaledSums(RecurrentState):
    """Sums in units of ``exp(m)``, after ``peaks`` largest exponents m so far: -inf at first.

    Args:
        peaks: how many of the numbers that are kept are an m.
        width: W, m and sums together.
    """

    documents_apart = True

    def __init__(self, peaks: int, width: int):
        super().__init__(width)
        self.peaks = peaks

    def forward(
        self,
        op: Callable[..., tuple[Tensor, Tensor]],
        parts: Sequence[Tensor],
        ctx: Ctx,
        state: State | None,
        spread: Callable[[Tensor], Tensor],
        fall: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> tuple[Tensor, Hidden | None]:
        """Outputs `(B, T, V)` of every document, and the State after the call.

        Args:
            op: ``op(*parts, before)`` makes outputs `(R, L, V)` and what is kept after each token
                `(R, L, W)` from that before the first one `(R, W)`.
            parts: `(B, T, ...)` each.
            spread: a factor of each m `(B, peaks)` to one of each sum `(B, W - peaks)`.
            fall: by how much T tokens lower an exponent.
        """

        def fresh() -> Tensor:
            return per_document(lambda *x: op(*x, self.begin(len(x[0])))[0], ctx, *parts)

        def run(docs: PackedRows, before: Tensor) -> tuple[Tensor, Tensor]:
            o, h = op(*map(docs.unpack, parts), before)
            return o, docs.last(h, before)

        if state is None:
            return self.across(fresh, run, ctx, lambda: Link(self._join(spread, fall()))), None
        return self.advance(run, ctx, state)

    def _join(
        self, spread: Callable[[Tensor], Tensor], fall: Tensor | float
    ) -> Callable[[None, Tensor, Tensor], Tensor]:
        """Sums before a slice of one document and its own, in units of the larger exponent."""

        def join(_: None, before: Tensor, own: Tensor) -> Tensor:
            n = self.peaks
            late = before[:, :n].detach() - fall
            m = torch.maximum(late, own[:, :n]).detach()
            old, new = spread((late - m).exp()), spread((own[:, :n].detach() - m).exp())
            return torch.cat((m, old * before[:, n:] + new * own[:, n:]), 1)

        return join

    def first(self) -> Tensor:
        return self.begin(1)[0]

    def begin(self, n: int) -> Tensor:
        """`(n, W)`: no exponent at all, and nothing summed up."""
        h = super().begin(n)
        h[:, : self.peaks] = -torch.inf
        return h
