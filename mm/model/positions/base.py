"""Position: the plug point of whatever tells places apart.

B rows, T tokens, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mm.kernels.attention.spec import ScoreSpec
from mm.layout import Fields
from mm.model.context import Ctx


class Position:
    """Plug point; every hook optional."""

    length_general: bool = True  # False: there are places it does not know
    # Non-empty: `rotate` is `apply` of what `prepare` makes, a table that is worth sharing over the
    # layers of a pass under this name.
    key: str = ""
    # `scores` are vectors, a ``fade`` of each side: whole rows of documents cost no matrix.
    fades: bool = False

    def prepare_call(self, ctx: Ctx, fields: Fields | None = None) -> Any:
        """`prepare` of the call's fields, or of ``fields`` with drawn positions; once a pass."""
        true = ctx.layout.fields
        if fields is None or fields.position is true.position:
            return ctx.cached(
                f"position.{self.key}", lambda layout, mask: self.prepare(layout.fields)
            )
        name = f"position.{self.key}.drawn.{int(ctx.seed)}"
        return ctx.cached(name, lambda layout, mask: self.prepare(fields))

    def rotate_call(
        self, ctx: Ctx, q: Tensor, k: Tensor, fields: Fields | None = None
    ) -> tuple[Tensor, Tensor]:
        """`rotate` queries and keys of the call, by a table that all layers of a pass share."""
        if not self.key:
            f = ctx.layout.fields if fields is None else fields
            return self.rotate(q, k, f, f)
        table = self.prepare_call(ctx, fields)
        return self.apply(q, table), self.apply(k, table)

    def rotate_normed(
        self, ctx: Ctx, q: Tensor, k: Tensor, norms: tuple[nn.Module, nn.Module], fields: Fields
    ) -> tuple[Tensor, Tensor]:
        """`rotate_call` of queries and keys that their norms have normed."""
        if not self.key:
            return self.rotate_call(ctx, norms[0](q), norms[1](k), fields)
        table = self.prepare_call(ctx, fields)
        return self.apply_normed(q, norms[0], table), self.apply_normed(k, norms[1], table)

    def prepare(self, f: Fields) -> Any:
        """What `apply` needs to know of the places."""
        return None

    def apply(self, x: Tensor, prepared: Any) -> Tensor:
        """`(B, T, H, K)` queries or keys to rotated ones: `rotate` with a prepared table."""
        return x

    def apply_normed(self, x: Tensor, norm: nn.Module, prepared: Any) -> Tensor:
        """`apply` of what ``norm`` has normed."""
        return self.apply(norm(x), prepared)

    def ids(self, f: Fields, ctx: Ctx) -> Tensor:
        return f.position

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        """Vectors with their places: asked by the embedder, or by a layer with this position."""
        return x_BTD

    def rotate(self, q: Tensor, k: Tensor, fq: Fields, fk: Fields) -> tuple[Tensor, Tensor]:
        """`(B, T, H, K)` queries and keys to rotated ones. Keys are cached after rotation."""
        if not self.key:
            return q, k
        return self.apply(q, self.prepare(fq)), self.apply(k, self.prepare(fk))

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor | None:
        return None

    def gain(self, fq: Fields, fk: Fields) -> Tensor | None:
        return None

    def scores(self, q: Tensor, fq: Fields, fk: Fields) -> ScoreSpec:
        """`score` and `gain` in one value.

        Overridden where vectors say as much as a score of every pair.
        """
        return ScoreSpec(self.score(q, fq, fk), self.gain(fq, fk))
