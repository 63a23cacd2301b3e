"""What hides keys and what changes scores of attention, each in one value.

R rows, T queries, S keys, H query heads, N distances. What comes in two belongs to the queries and
to the keys: one without the other counts as unset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskSpec(NamedTuple):
    """Which keys a query sees: those that no field hides."""

    allowed_RTS: Tensor | None = None
    """`(R or 1, T, S)` bool, True where the query may see the key."""
    causal: bool = False
    """Query t sees keys up to ``S - T + t`` (the last query sees all)."""
    window: int | None = None
    """Query t sees no key before ``S - T + t - window + 1``."""
    document_RT: Tensor | None = None
    """`(R, T)` int: a query sees keys of its own document; 0 is padding."""
    document_RS: Tensor | None = None
    starts_M: Tensor | None = None
    """`(M,)` int32, where known besides ``document_RT``: first of the R * T places of each document
    and each row, ascending, some perhaps twice; the last is R * T."""
    prefix_RT: Tensor | None = None
    """`(R, T)` int: what shares a number above 0 sees each other, even where ``causal`` forbids."""
    prefix_RS: Tensor | None = None

    def is_set(self) -> bool:
        """Whether anything but ``causal`` hides keys."""
        return (
            self.allowed_RTS is not None
            or self.window is not None
            or self.document_RT is not None
            or self.prefix_RT is not None
        )

    def dense(self, T: int, S: int, device: torch.device) -> Tensor | None:
        """Return `(R or 1, T, S)` bool of all conditions, or None when everything is allowed."""
        seen = self.allowed_RTS
        if self.causal:
            late = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None]
            together = _together(self.prefix_RT, self.prefix_RS)
            late = late if together is None else late | together
            seen = late if seen is None else seen & late
        if self.window is not None:
            first = S - T - self.window + 1
            near = torch.ones(T, S, dtype=torch.bool, device=device).triu(first)[None]
            seen = near if seen is None else seen & near
        same = _together(self.document_RT, self.document_RS)
        if same is None:
            return seen
        return same if seen is None else seen & same


def _together(q: Tensor | None, k: Tensor | None) -> Tensor | None:
    """`(R, T, S)`: the same number that is not zero."""
    if q is None or k is None:
        return None
    return (q[:, :, None] == k[:, None, :]) & (k != 0)[:, None, :]


class ScoreSpec(NamedTuple):
    """How scores come from the products of queries and keys, and weights from scores."""

    bias_RHTS: Tensor | None = None
    """Broadcasts to `(R, H, T, S)`, added to the scores."""
    gain_RHTS: Tensor | None = None
    """Broadcasts to `(R, H, T, S)`, multiplied after the softmax (URPE)."""
    fade_RTH: Tensor | None = None
    """`(R, T, H)`: minus its distance to ``fade_RSH`` is added (ALiBi, forget gates)."""
    fade_RSH: Tensor | None = None
    relative_NH: Tensor | None = None
    """`(N, H)`, N odd: entry ``N // 2 + position_RT - position_RS``, clamped, is added."""
    position_RT: Tensor | None = None
    """`(R, T)` int, for ``relative_NH``."""
    position_RS: Tensor | None = None
    scale: float | None = None
    """Factor of the products; default ``K ** -0.5``."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)`` before anything is added."""
    sink_H: Tensor | None = None
    """`(H,)` score of a key that every query sees and whose value is zero."""

    def of_heads(self, first: int, n: int) -> ScoreSpec:
        """Return the spec of ``n`` query heads from ``first`` on."""
        own = lambda x, dim: x if x is None or x.shape[dim] == 1 else x.narrow(dim, first, n)
        return self._replace(
            bias_RHTS=own(self.bias_RHTS, -3),
            gain_RHTS=own(self.gain_RHTS, -3),
            fade_RTH=own(self.fade_RTH, -1),
            fade_RSH=own(self.fade_RSH, -1),
            relative_NH=own(self.relative_NH, -1),
            sink_H=own(self.sink_H, 0),
        )

    def factor(self, width: int) -> float:
        """Return the factor of the products for keys of this width."""
        return self.scale or 1 / math.sqrt(width)

    def total_bias(self) -> Tensor | None:
        """Return all that is added to the scores; broadcasts to `(R, H, T, S)`."""
        total = self.bias_RHTS
        if self.fade_RTH is not None and self.fade_RSH is not None:
            faded = -(self.fade_RTH.mT[..., :, None] - self.fade_RSH.mT[..., None, :]).abs()
            total = faded if total is None else total + faded
        if self.relative_NH is not None:
            assert self.position_RT is not None and self.position_RS is not None
            far = self.relative_NH.shape[0] // 2
            distance = self.position_RT[:, :, None].long() - self.position_RS[:, None, :].long()
            index = distance.clamp(-far, far) + far
            near = F.embedding(index, self.relative_NH).movedim(-1, 1)
            total = near if total is None else total + near
        return total


NO_MASK, PLAIN_SCORE = MaskSpec(), ScoreSpec()
_SCHEMA = {
    Tensor | None: "Tensor?",
    bool: "bool",
    int | None: "int?",
    float | None: "float?",
}
# Types in a `torch.library` schema of all fields, in order: both specs side by side.
FIELDS: dict[str, str] = {
    name: _SCHEMA[kind]
    for spec in (MaskSpec, ScoreSpec)
    for name, kind in get_type_hints(spec).items()
}


def join(mask: MaskSpec, score: ScoreSpec) -> tuple[Any, ...]:
    """Return the values of `FIELDS`."""
    return *mask, *score


def split(values: Sequence[Any]) -> tuple[MaskSpec, ScoreSpec]:
    """Return the specs of the values of `FIELDS`: the inverse of `join`."""
    n = len(MaskSpec._fields)
    return MaskSpec(*values[:n]), ScoreSpec(*values[n:])


def find_set(spec: MaskSpec | ScoreSpec, *names: str) -> str | None:
    """Return the first of ``names`` that the spec sets, or None."""
    for name in names:
        if getattr(spec, name) is not None:
            return name
    return None
