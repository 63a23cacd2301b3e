"""How tensors of a checkpoint make ours, and the way back, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part:
    """Tensors of ours out of those of a checkpoint; this one takes them as they are."""

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Our tensors."""
        return list(given)

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """The checkpoint's tensors: what `join` was given."""
        return list(ours)


class Rows(Part):
    """Several matrices, or biases, one below the other; ``sizes``: of each, along ``dim``."""

    def __init__(self, *sizes: int, dim: int = 0):
        self.sizes, self.dim = sizes, dim

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(given), self.dim)]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours[0].split(self.sizes, self.dim))


class Pieces(Part):
    """Rows by name, in one order there and in another here.

    Args:
        sizes: rows of each piece; names may recur with an index, such as `("q", 3)`.
        theirs: the pieces of each of the checkpoint's tensors.
        ours: of each of ours.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        theirs: Sequence[Sequence[tuple[str, int]]],
        ours: Sequence[Sequence[tuple[str, int]]],
    ):
        self.sizes, self.theirs, self.ours = sizes, theirs, ours

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return self._move(given, self.theirs, self.ours)

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return self._move(ours, self.ours, self.theirs)

    def _move(
        self,
        given: Sequence[Tensor],
        before: Sequence[Sequence[tuple[str, int]]],
        after: Sequence[Sequence[tuple[str, int]]],
    ) -> list[Tensor]:
        held = {}
        for tensor, names in zip(given, before, strict=True):
            sizes = [self.sizes[name] for name, _ in names]
            held |= dict(zip(names, tensor.split(sizes), strict=True))
        return [torch.cat([held[name] for name in names]) for names in after]


class Transposed(Part):
    """A matrix that is stored the other way round, `(d_in, d_out)`."""

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [t.T for t in given]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [t.T for t in ours]


class Taps(Part):
    """Weights of a causal convolution by channel: `(W, 1, C)` there, `(C, W)` here."""

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [t[:, 0].T for t in given]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [t.T[:, None] for t in ours]


class First(Part):
    """The one entry of a first dimension that is 1 there and not here."""

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [t[0] for t in given]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [t[None] for t in ours]


class Folded(Part):
    """A vector there, ``rows`` rows of it here."""

    def __init__(self, rows: int):
        self.rows = rows

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [t.unflatten(0, (self.rows, -1)) for t in given]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [t.flatten() for t in ours]


class Chain(Part):
    """One part after another."""

    def __init__(self, *parts: Part):
        self.parts = parts

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        for part in self.parts:
            given = part.join(given)
        return list(given)

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        for part in reversed(self.parts):
            ours = part.split(ours)
        return list(ours)


class Experts(Part):
    """``n`` experts of ``each`` matrices, stacked `(n, rows, columns)`."""

    def __init__(self, n: int, each: int = 1):
        self.n, self.each = n, each

    def join(self, given: Sequence[Tensor]) -> list[Tensor]:
        groups = [given[i : i + self.each] for i in range(0, len(given), self.each)]
        return [torch.stack([torch.cat(list(group)) for group in groups])]

    def split(self, ours: Sequence[Tensor]) -> list[Tensor]:
        return [part for expert in ours[0].unbind(0) for part in expert.chunk(self.each)]


class Entry(NamedTuple):
    """A line of a family's table: names of ours, and of theirs that hold the same."""

    ours: str | tuple[str, ...]
    theirs: tuple[str, ...]
    part: Part = Part()

    @property
    def own(self) -> tuple[str, ...]:
        """Names of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours
