"""Masks as text: ``causal | (same_item & modality == image)``.

A term is ``causal``, ``full``, ``window(N)``, ``same_FIELD`` (equal and not 0), ``distance < N``
(back in time), ``FIELD == VALUE`` of both sides, ``q.FIELD`` of the reader or ``k.FIELD`` of what
is read alone, or a field by itself (not 0). Terms are joined by ``& | ~`` and parentheses, which
bind less than comparisons do.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mm.errors import did_you_mean
from mm.layout import Fields
from mm.mask import Causal, Full, Mask, Prefix, Window

AXES = ("time", "row", "column")
ALWAYS = ("modality", "document", *AXES)  # fields that every layout has
MARKED = ("prefix", "item")  # and those that data and model make
MAX_LENGTH = 400
_OPS: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}
_BY_SIGN = dict(_OPS.values())


def field_of(f: Fields, name: str) -> Tensor:
    """`(B, T)` of a field by its name."""
    if name in AXES:
        return f.position[..., min(AXES.index(name), f.position.shape[-1] - 1)]
    return (
        {"modality": f.modality, "document": f.document}[name] if name in ALWAYS else f.extra[name]
    )


class _OfFields(Mask):
    name: str

    @property
    def fields(self) -> frozenset[str]:
        return frozenset({self.name} - {*ALWAYS})


@dataclass(frozen=True)
class Same(_OfFields):
    """Both sides have the same number in a field, and it is not 0."""

    name: str

    @property
    def key(self) -> str:
        return f"same_{self.name}"

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        a, b = field_of(q, self.name)[:, :, None], field_of(k, self.name)[:, None, :]
        return (a == b) & (b != 0)


@dataclass(frozen=True)
class Compare(_OfFields):
    """A field of both sides, or of one, compares with a number."""

    name: str
    sign: str
    value: int
    side: Literal["both", "q", "k"] = "both"

    @property
    def key(self) -> str:
        side = "" if self.side == "both" else f"{self.side}."
        return f"({side}{self.name} {self.sign} {self.value})"

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        holds = lambda f: _BY_SIGN[self.sign](field_of(f, self.name), self.value)
        a, b = holds(q)[:, :, None], holds(k)[:, None, :]
        if self.side == "both":
            return a & b
        return (a | ~a) & b if self.side == "k" else a & (b | ~b)


@dataclass(frozen=True)
class Distance(Mask):
    """How far the reader stands behind what it reads, in time, compares with a number."""

    sign: str
    value: int
    fields: ClassVar[frozenset[str]] = frozenset()

    @property
    def key(self) -> str:
        return f"(distance {self.sign} {self.value})"

    def allowed(self, q: Fields, k: Fields) -> Tensor:
        far = field_of(q, "time")[:, :, None] - field_of(k, "time")[:, None, :]
        return _BY_SIGN[self.sign](far, self.value)


WORDS: Mapping[str, Mask] = {"causal": Causal(), "full": Full(), "prefix": Prefix()}


def parse_mask(
    text: str, modalities: Mapping[str, int] | None = None, fields: Sequence[str] = ()
) -> Mask:
    """The mask that ``text`` says: one of `WORDS`, or an expression.

    Args:
        modalities: number of each modality's name; None: they are not known yet, and any name
            stands for one.
        fields: named ones besides `ALWAYS` and `MARKED`.
    Raises:
        ValueError: it is no such expression, or names a field or modality that is not there.
    """
    if text.strip() in WORDS:
        return WORDS[text.strip()]
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a mask of {len(text)} characters: {MAX_LENGTH} at most")
    words = text.replace("&", " and ").replace("|", " or ").replace("~", " not ")
    try:
        tree = ast.parse(words.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(
            f"mask '{text}' is no expression such as: causal | (same_item & modality == image)"
        ) from None
    return _Reader(text, modalities, {*ALWAYS, *MARKED, *fields}).read(tree)


class _Reader:
    """From a syntax tree to a mask."""

    def __init__(self, text: str, modalities: Mapping[str, int] | None, known: set[str]):
        self.text, self.modalities, self.known = text, modalities, known

    def read(self, node: ast.expr) -> Mask:
        match node:
            case ast.BoolOp(op=op, values=values):
                first, *others = map(self.read, values)
                for other in others:
                    first = first & other if isinstance(op, ast.And) else first | other
                return first
            case ast.UnaryOp(op=ast.Not(), operand=inside):
                return ~self.read(inside)
            case ast.Name(id="causal"):
                return Causal()
            case ast.Name(id="full" | "same_document"):
                return Full()
            case ast.Name(id=name) if name.startswith("same_"):
                return Same(self._field(name.removeprefix("same_"), "same_"))
            case ast.Call(func=ast.Name(id="window"), args=[ast.Constant(value=int(n))]) if n > 0:
                return Window(n)
            case ast.Name() | ast.Attribute():
                name, side = self._side(node)
                return Compare(name, "!=", 0, side)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPS:
                sign = _OPS[type(op)][0]
                if isinstance(left, ast.Name) and left.id == "distance":
                    return Distance(sign, self._number(right, ""))
                name, side = self._side(left)
                return Compare(name, sign, self._number(right, name), side)
        raise self._fault(node)

    def _side(self, node: ast.expr) -> tuple[str, Literal["both", "q", "k"]]:
        match node:
            case ast.Name(id=name):
                return self._field(name), "both"
            case ast.Attribute(value=ast.Name(id="q" | "k" as side), attr=name):
                return self._field(name), side
        raise self._fault(node)

    def _field(self, name: str, before: str = "") -> str:
        if name not in self.known:
            terms = {"causal", "full", "window", "distance"} | {f"same_{n}" for n in self.known}
            near = did_you_mean(before + name, self.known | terms)
            raise ValueError(f"mask '{self.text}': no field '{name}'{near}")
        return name

    def _number(self, node: ast.expr, field: str) -> int:
        match node:
            case ast.Constant(value=int(n)):
                return n
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(n))):
                return -n
            case ast.Name(id=name) if field == "modality":
                if self.modalities is None:
                    return 0
                if name not in self.modalities:
                    near = did_you_mean(name, {*self.modalities})
                    raise ValueError(f"mask '{self.text}': no modality '{name}'{near}")
                return self.modalities[name]
        raise self._fault(node)

    def _fault(self, node: ast.expr) -> ValueError:
        return ValueError(
            f"mask '{self.text}': cannot read '{ast.unparse(node)[:60]}': terms are causal, full, "
            "window(N), same_FIELD, distance < N, FIELD == VALUE, q.FIELD, k.FIELD"
        )


def looks_ahead(mask: Mask, modality: int) -> bool:
    """Whether a target of a modality (its number) may see the one after it, which it predicts."""
    one = torch.ones(1, 2, dtype=torch.int32)
    time = torch.arange(2, dtype=torch.int32)[None, :, None].expand(1, 2, len(AXES))
    named = {name: one * (name == "item") for name in mask.fields}
    both = Fields(time, one, one * modality, named)
    return bool(mask.allowed(both, both)[0, 0, 1])
