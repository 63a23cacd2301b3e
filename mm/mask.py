"""Who may see whom: pure predicates on the Fields of both sides, closed under & | ~.

Every op ANDs "same document".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mm.layout import Doc, Fields

Hint = Literal["causal", "full", "window", "general"]


class Mask(ABC):
    """Predicate on (reader, read) Fields.

    ``hint`` is what a kernel may exploit, ``reach`` bounds the cache.
    """

    hint: ClassVar[Hint] = "general"
    reach: int | None = None
    atomic: str | None = (
        # places sharing this non-zero field see each other both ways: a chunk may not split them
        None
    )

    @property
    def key(self) -> str:
        """Names what the predicate is: equal masks have equal keys (`Ctx.cached`)."""
        return repr(self)

    @property
    def fields(self) -> frozenset[str]:
        """Named fields (`Fields.extra`) that the predicate reads."""
        return frozenset()

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
    key: ClassVar[str] = "causal"  # type: ignore[misc]

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return tq >= tk


@dataclass(frozen=True)
class Full(Mask):
    """Everything in the document."""

    hint: ClassVar[Hint] = "full"
    key: ClassVar[str] = "full"  # type: ignore[misc]

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return torch.ones_like(tq == tk)


@dataclass(frozen=True)
class Window(Mask):
    """The ``size`` latest places, own one included."""

    size: int
    hint: ClassVar[Hint] = "window"

    @property
    def key(self) -> str:
        return f"window.{self.size}"

    @property
    def reach(self) -> int:  # type: ignore[override]
        return self.size

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        return (tq >= tk) & (tq - tk < self.size)


@dataclass(frozen=True)
class Prefix(Mask):
    """Causal, and places that share a non-zero ``name`` field see each other both ways.

    A prefix-LM, image blocks.
    """

    name: str = "prefix"

    @property
    def key(self) -> str:
        return f"prefix.{self.name}"

    @property
    def atomic(self) -> str:  # type: ignore[override]
        return self.name

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({self.name})

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        gq, gk = q.extra[self.name][:, :, None], k.extra[self.name][:, None, :]
        return (tq >= tk) | ((gq == gk) & (gk != 0))


@dataclass(frozen=True)
class ParallelBlocks(Mask):
    """A prefix that all see, pieces that do not see each other, a question that sees all.

    Each is causal in itself. `parallel_blocks` lays them out.

    The prefix is the sink that keeps the pieces' attention from spreading. Source: Zhang et al.
    2024 (arXiv:2412.16545); layout: Ratner et al. 2022 (arXiv:2212.10947).
    """

    name: str = "block"  # field: 0 = prefix, 1.. = pieces, -1 = question

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({self.name})

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        tq, tk = _times(q, k)
        bq, bk = q.extra[self.name][:, :, None], k.extra[self.name][:, None, :]
        return ((tq >= tk) & ((bq == bk) | (bk == 0))) | ((bq == -1) & (bk != -1))


def parallel_blocks(
    prefix: int, pieces: Sequence[int], question: int, name: str = "block", slot: int = -1
) -> Doc:
    """One document: ``prefix`` tokens, ``pieces`` at the same positions, then a ``question``.

    The pieces stand behind the prefix, the question behind the longest piece.
    """
    sizes = (prefix, *pieces, question)
    begins = (0, *[prefix] * len(pieces), prefix + max(pieces, default=0))
    position = np.concatenate([at + np.arange(n) for at, n in zip(begins, sizes, strict=True)])
    blocks = np.repeat([0, *range(1, len(pieces) + 1), -1], sizes)
    return Doc(sum(sizes), position[:, None], extra={name: blocks.astype(np.int32)}, slot=slot)


@dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    @property
    def key(self) -> str:
        return f"({self.a.key} & {self.b.key})"

    @property
    def reach(self) -> int | None:  # type: ignore[override]
        known = [r for r in (self.a.reach, self.b.reach) if r is not None]
        return min(known) if known else None

    @property
    def atomic(self) -> str | None:  # type: ignore[override]
        return self.a.atomic or self.b.atomic

    @property
    def fields(self) -> frozenset[str]:
        return self.a.fields | self.b.fields

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return self.a.allowed(q, k) & self.b.allowed(q, k)


@dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    @property
    def key(self) -> str:
        return f"({self.a.key} | {self.b.key})"

    @property
    def reach(self) -> int | None:  # type: ignore[override]
        both = (self.a.reach, self.b.reach)
        return None if None in both else max(both)  # type: ignore[type-var]

    @property
    def atomic(self) -> str | None:  # type: ignore[override]
        return self.a.atomic or self.b.atomic

    @property
    def fields(self) -> frozenset[str]:
        return self.a.fields | self.b.fields

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return self.a.allowed(q, k) | self.b.allowed(q, k)


@dataclass(frozen=True)
class Not(Mask):
    a: Mask

    @property
    def key(self) -> str:
        return f"~{self.a.key}"

    @property
    def fields(self) -> frozenset[str]:
        return self.a.fields

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        return ~self.a.allowed(q, k)
