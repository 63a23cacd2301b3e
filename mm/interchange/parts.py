"""How tensors of a checkpoint make one of ours, and the way back, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Part:
    """One tensor of ours out of those of a checkpoint; this one takes it as it is."""

    def join(self, given: Sequence[Tensor]) -> Tensor:
        """Our tensor."""
        (tensor,) = given
        return tensor

    def split(self, ours: Tensor) -> list[Tensor]:
        """The checkpoint's tensors: what `join` was given."""
        return [ours]


class Rows(Part):
    """Several matrices, or biases, one below the other; ``sizes``: rows of each."""

    def __init__(self, *sizes: int):
        self.sizes = sizes

    def join(self, given: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(given))

    def split(self, ours: Tensor) -> list[Tensor]:
        return list(ours.split(self.sizes))


class Transposed(Part):
    """A matrix that is stored the other way round, `(d_in, d_out)`."""

    def join(self, given: Sequence[Tensor]) -> Tensor:
        return given[0].T

    def split(self, ours: Tensor) -> list[Tensor]:
        return [ours.T]


class Experts(Part):
    """``n`` experts of ``each`` matrices, stacked `(n, rows, columns)`."""

    def __init__(self, n: int, each: int = 1):
        self.n, self.each = n, each

    def join(self, given: Sequence[Tensor]) -> Tensor:
        groups = [given[i : i + self.each] for i in range(0, len(given), self.each)]
        return torch.stack([torch.cat(list(group)) for group in groups])

    def split(self, ours: Tensor) -> list[Tensor]:
        return [part for expert in ours.unbind(0) for part in expert.chunk(self.each)]


class Entry(NamedTuple):
    """A line of a family's table."""

    ours: str
    theirs: tuple[str, ...]
    part: Part = Part()
