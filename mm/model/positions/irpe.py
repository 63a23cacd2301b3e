"""Relative positions on a grid. R rows, T queries, S keys, H heads, K head width, N buckets."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


def piecewise(x: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Integer index of a signed offset: exact up to ``alpha``, then logarithmic, at most ``beta``.

    ``g(x) = round(x)`` for ``|x| <= alpha``, else ``sign(x) min(beta, round(alpha + log(|x| /
    alpha) / log(gamma / alpha) (beta - alpha)))``. Source: Wu et al. 2021 (arXiv:2107.14222), eq.
    18.
    """
    x = x.to(torch.float64)
    ratio = (x.abs().clamp_min(alpha) / alpha).log() / math.log(gamma / alpha)
    far = x.sign() * (alpha + ratio * (beta - alpha)).round().clamp_max(beta)
    return torch.where(x.abs() <= alpha, x.round(), far).long()


class IRPE(nn.Module, Position):
    """Add ``b[I(i, j)]`` (``bias``) or ``q_i . r[I(i, j)]`` (``contextual``) to the logits.

    ``I`` buckets the offset of key from query in rows and columns: ``euclidean`` its length,
    ``quantization`` the rank of its length among the lengths that a grid has, ``cross`` rows and
    columns by tables of their own, whose terms add up, ``product`` pairs of buckets. The contextual
    form multiplies queries with the N vectors and gathers: ``T N K`` products, not ``T S K``.

    Source: Wu et al. 2021, iRPE (arXiv:2107.14222), the four methods and both modes, index
    function eq. 18. Contextual form on keys; on queries and values too: mixer `irpe_attention`.
    """

    def __init__(self, heads: int, head_dim: int, config: IRPEConfig):
        super().__init__()
        self.config = config
        count = 2 * config.beta + 1
        if config.method == "product":
            count *= count
        elif config.method == "cross":
            count *= 2  # rows, then columns
        width = (head_dim,) if config.mode == "contextual" else ()
        self.table = nn.Parameter(torch.empty(heads, count, *width))

    def init_weights(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def buckets(self, fq: Fields, fk: Fields) -> list[Tensor]:
        """Indices `(R, T, S)` into the table, of each of its terms."""
        c = self.config
        # Positions of plain text have no rows and columns: time stands for both.
        axes = [axis if axis < fq.position.shape[-1] else 0 for axis in c.axes]
        row, column = (
            (fq.position[:, :, None, axis] - fk.position[:, None, :, axis]) for axis in axes
        )
        index = lambda x: piecewise(x, c.alpha, c.beta, c.gamma) + c.beta
        side = 2 * c.beta + 1
        if c.method == "cross":
            return [index(row), index(column) + side]
        if c.method == "product":
            return [index(row) * side + index(column)]
        square = (row.long().square() + column.long().square()).contiguous()
        if c.method == "euclidean":
            return [index(square.to(torch.float64).sqrt().round())]
        # Lengths of offsets are few: 0, 1, sqrt 2, 2, sqrt 5, ... by their rank.
        reach = torch.arange(2 * c.gamma + 1, device=square.device)
        lengths = (reach[:, None].square() + reach.square()).unique()
        return [index(torch.searchsorted(lengths, square).clamp_max(len(lengths) - 1))]

    def score(self, q: Tensor, fq: Fields, fk: Fields) -> Tensor:
        """`(R, H, T, S)`.

        ``q`` `(R, T, H, K)`; logits are scaled by ``K ** -0.5``, and so is the contextual term.
        """
        R, T, H, K = q.shape
        found = self.buckets(fq, fk)
        if self.config.mode == "bias":
            table = self.table.T  # (N, H)
            return sum(nn.functional.embedding(i, table) for i in found).movedim(-1, 1)  # type: ignore[union-attr]
        wide = torch.promote_types(q.dtype, torch.float32)
        terms = torch.einsum("rthk,hnk->rhtn", q.to(wide), self.table.to(wide)) * K**-0.5
        S = fk.document.shape[1]
        return torch.stack(
            [terms.gather(3, i.expand(R, T, S)[:, None].expand(-1, H, -1, -1)) for i in found]
        ).sum(0)


@POSITIONS.register("irpe")
class IRPEConfig(Config):
    """Relative positions in rows and columns, bucketed."""

    kind: Literal["irpe"] = "irpe"
    method: Literal["euclidean", "quantization", "cross", "product"] = "product"
    mode: Literal["bias", "contextual"] = "contextual"
    axes: Annotated[tuple[int, int], Field(description="axes of positions: row, column")] = (1, 2)
    alpha: Annotated[float, Field(gt=0, description="offsets up to here have own buckets")] = 1.9
    beta: Annotated[int, Field(gt=0, description="largest bucket to either side")] = 3
    gamma: Annotated[int, Field(gt=0, description="offset that falls into the largest")] = 15

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> IRPE:
        if not self.alpha < self.beta <= self.gamma:
            raise ValueError("irpe: alpha < beta <= gamma must hold")
        return IRPE(heads, head_dim, self)
