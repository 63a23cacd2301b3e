"""What is carried between calls. Dim 0 of every leaf is N slots: sequences, not rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor


class State(ABC):
    """Tree of tensors over slots.

    A forward consumes it; `fork` to keep it. States are differentiable inputs.
    """

    @abstractmethod
    def map(self, f: Callable[..., Tensor], *others: Self) -> Self:
        """Apply ``f`` leaf by leaf (to the same leaf of every tree)."""

    def accept(self, n_N: Tensor) -> State:
        """After a draft call: the state as if only ``n_N[i]`` tokens of slot i had come.

        `(N,)` int.

        Raises:
            ValueError: the State is not of a draft call.
        """
        raise ValueError("accept() takes the State of a call with draft=True")

    def commit(self) -> State:
        """The State that the next call begins from: an unaccepted draft counts as fed."""
        return self

    def leaves(self) -> Iterator[Tensor]:
        """Every tensor, in a fixed order."""
        found: list[Tensor] = []
        self.map(lambda t: (found.append(t), t)[1])
        return iter(found)

    def select(self, slots_n: Tensor) -> Self:
        """Keep (repeat, reorder) slots: beams, batch joins and leaves, tree paths."""
        return self.map(once(lambda t: t.index_select(0, slots_n)))

    def fork(self) -> Self:
        return self.map(once(torch.clone))

    def detach(self) -> Self:
        """Truncate back-propagation through time here; the caller's choice."""
        return self.map(torch.detach)

    def cat(self, *others: Self) -> Self:
        return self.map(once(lambda *t: torch.cat(t)), *others)

    def n_bytes(self) -> int:
        """Live bytes of all leaves."""
        return sum(t.numel() * t.element_size() for t in self.leaves())


def once(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``f``, which makes one tensor of what several leaves share: they go on sharing it."""
    made: dict[tuple[int, ...], tuple[Any, Tensor]] = {}

    def run(*leaves: Tensor) -> Tensor:
        key = tuple(map(id, leaves))
        if key not in made:
            made[key] = leaves, f(*leaves)  # kept: a number may not come to stand for another
        return made[key][1]

    return run


def map_tree(f: Callable[..., Tensor], *trees: Any) -> Any:
    """Apply ``f`` over tensors, States, tuples and mappings of the same shape.

    None and host values stay.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return f(*trees)
    if isinstance(first, State):
        return first.map(f, *trees[1:])
    if isinstance(first, Mapping):
        return {k: map_tree(f, *(t[k] for t in trees)) for k in first}
    if isinstance(first, tuple):
        mapped = [map_tree(f, *each) for each in zip(*trees, strict=True)]
        return type(first)(*mapped) if hasattr(first, "_fields") else tuple(mapped)
    return first


class DataclassState(State):
    """A State that is a frozen dataclass: `map` goes over its fields."""

    def map(self, f: Callable[..., Tensor], *others: Self) -> Self:
        return type(self)(
            **{
                d.name: map_tree(f, getattr(self, d.name), *(getattr(o, d.name) for o in others))
                for d in fields(self)  # type: ignore[arg-type]
            }
        )


class StateTuple(State):
    """States of several layers (or visits), in order; None where a layer has none."""

    def __init__(self, *parts: State | None):
        self.parts = parts

    def __getitem__(self, i: int) -> State | None:
        return self.parts[i]

    def __len__(self) -> int:
        return len(self.parts)

    def map(self, f: Callable[..., Tensor], *others: Self) -> Self:
        return type(self)(
            *(map_tree(f, p, *(o.parts[i] for o in others)) for i, p in enumerate(self.parts))
        )

    def accept(self, n_N: Tensor) -> StateTuple:
        return StateTuple(*(p.accept(n_N) if p is not None else None for p in self.parts))

    def commit(self) -> StateTuple:
        return StateTuple(*(p.commit() if p is not None else None for p in self.parts))


def join_parts(*parts: State | None) -> State | None:
    """The State of something whose parts have these: of the one part, or a StateTuple.

    None when none has any.
    """
    if len(parts) == 1:
        return parts[0]
    return StateTuple(*parts) if any(part is not None for part in parts) else None


def parts_of(state: State | None, n: int) -> tuple[State | None, ...]:
    """What `join_parts` joined of ``n`` parts; ``n`` times None where there is no State."""
    if state is None or n == 1:
        return (state,) * n
    assert isinstance(state, StateTuple) and len(state) == n
    return state.parts
