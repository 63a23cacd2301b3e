"""Who may see whom: pure predicates on the Fields of both sides, closed under & | ~. Every op ANDs
"same document".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mm.layout import Fields

Hint = Literal["causal", "full", "window", "general"]


class Mask(ABC):
    """Predicate on (reader, read) Fields. ``hint`` is what a kernel may exploit, ``reach`` bounds
    the cache.
    """

    hint: ClassVar[Hint] = "general"
    reach: int | None = None
    atomic: str | None = (
        # places sharing this non-zero field see each other both ways: a chunk may not split them
        None
    )

    @abstractmethod
    def allowed(self, q: Fields, k: Fields) -> Tensor:
        """`(B, Tq, Tk)` bool by broadcasting."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def dense(self, q: Fields, k: Fields) -> Tensor:
        """`(B, Tq, Tk)` bool: `allowed` and the same non-padding document."""
        same = q.document[:, :, None] == k.document[:, None, :]
        return self.allowed(q, k) & same & (k.document != 0)[:, None, :]


def _times(q: Fields, k: Fields) -> tuple[Tensor, Tensor]:
    return q.position[:, :, None, 0], k.position[:, None, :, 0]


@dataclass(frozen=True)
class Causal(Mask):
    """Places at the same time or before."""

    hint: ClassVar[Hint] = "causal"

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return tq >= tk


@dataclass(frozen=True)
class Full(Mask):
    """Everything in the document."""

    hint: ClassVar[Hint] = "full"

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return torch.ones_like(tq == tk)


@dataclass(frozen=True)
class Window(Mask):
    """The ``size`` latest places, own one included."""

    size: int
    hint: ClassVar[Hint] = "window"

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.size

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return (tq >= tk) & (tq - tk < self.size)


@dataclass(frozen=True)
class Prefix(Mask):
    """Causal, and places that share a non-zero ``name`` field see each other both ways (prefix-LM,
    image blocks).
    """

    name: str = "prefix"

    @property
    def atomic(self) -> str:  # type: ignore[override]
        return self.name

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        gq, gk = q.extra[self.name][:, :, None], k.extra[self.name][:, None, :]
        return (tq >= tk) | ((gq == gk) & (gk != 0))


@dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    @property
    def reach(self) -> int | None:  # type: ignore[override]
        known = [r for r in (self.a.reach, self.b.reach) if r is not None]
        return min(known) if known else None

    @property
    def atomic(self) -> str | None:  # type: ignore[override]
        return self.a.atomic or self.b.atomic

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return self.a.allowed(q, k) & self.b.allowed(q, k)


@dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    @property
    def reach(self) -> int | None:  # type: ignore[override]
        both = (self.a.reach, self.b.reach)
        return None if None in both else max(both)  # type: ignore[type-var]

    @property
    def atomic(self) -> str | None:  # type: ignore[override]
        return self.a.atomic or self.b.atomic

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return self.a.allowed(q, k) | self.b.allowed(q, k)


@dataclass(frozen=True)
class Not(Mask):
    a: Mask

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return ~self.a.allowed(q, k)
