"""The context of one pass: where things stand, who sees whom, and what layers share.

B rows, T tokens, D model, S streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mm.layout import Fields, Layout, Moves
from mm.mask import Mask
from mm.shard import Shard

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Memory:
    """Something else to attend to: encoder states, neighbours, compressed context.

    With a State it is read where a document begins, and kept: later calls need not bring it.
    """

    # The READER's document numbers, slots and fresh flags, as many of each: that is the link. A
    # document may have no position here.
    layout: Layout
    mask: Mask  # of reader Fields and memory Fields
    x: Tensor  # (B, Tm, D)


@dataclass(frozen=True, slots=True)
class Ctx:
    """Immutable context of one pass.

    A layer that publishes something returns a successor (`dataclasses.replace`).
    """

    layout: Layout
    mask: Mask
    ids: Tensor | None = None  # (B, T, S), for mixers that look at tokens
    memories: Mapping[str, Memory] = field(default_factory=dict)
    provided: Mapping[str, Tensor] = field(default_factory=dict)  # what Providers made, by name
    # What earlier layers left for later ones, by name; it belongs to this layout, and a tensor is
    # (B, T, ...): the replay of a draft takes its rows.
    published: Mapping[str, Any] = field(default_factory=dict)
    scheduled: Mapping[str, float] = field(default_factory=dict)  # host values equal on all ranks
    # Intermediates and statistics asked for; nothing is paid when empty.
    return_intermediates: frozenset[str] = frozenset()
    # Of counter-based noise (`mm.model.noise`): recomputation draws the same.
    seed: Tensor | int = 0
    visit: int = 0  # how many layers ran before in this pass
    draft: bool = False  # the returned State must be able to accept() a prefix of this call
    # Where processes share the tokens of a row: `layout` is that of the own slice.
    shard: Shard | None = None

    def cached(self, name: str, make: Callable[[Layout, Mask], T]) -> T:
        """What all layers of a pass share: made on demand, once for each (name, layout, mask).

        ``make`` sees the layout and the mask alone, so what it makes can depend on nothing else but
        ``name``; it makes no gradients. Inside a graph of `torch.compile` that nobody prepared
        (`Layer.prefetch`) each layer makes its own.
        """
        memo, key = self.layout.memo, f"{name}|{self.mask.key}"
        if key in memo:
            return memo[key]
        if torch.compiler.is_compiling():
            return make(self.layout, self.mask)
        with torch.no_grad():
            made = memo[key] = make(self.layout, self.mask)
        return made

    def cached_on_host(self, name: str, make: Callable[[Layout, Mask], T]) -> T | None:
        """`cached` of something that looks at values, which a graph cannot.

        None inside a graph unless it was made before.
        """
        if torch.compiler.is_compiling():
            return self.layout.memo.get(f"{name}|{self.mask.key}")
        return self.cached(name, make)

    def at_places(self, fields: Fields) -> Ctx:
        """This context for a matrix over other places, which have these fields; for it alone."""
        return replace(self, layout=replace(self.layout, fields=fields))

    def hand_on(self, inner: Ctx | None) -> Ctx | None:
        """The successor of this context after a part ran in ``inner``'s.

        What the part published, where it published it for this layout; None when there is nothing
        new.
        """
        if inner is None or inner.layout is not self.layout:
            return None
        return replace(self, published=inner.published)

    def derive(
        self,
        index: Tensor | None = None,
        *,
        document: Tensor | None = None,
        again: Moves | None = None,
        mask: Mask | None = None,
        time: Literal["moves", "stays"] = "moves",
        slots: bool = True,
    ) -> Ctx:
        """The context of the same content in other positions: `Layout.derive`, and the ids along.

        What was published belongs to the old layout and stays behind. Without ``slots`` nothing is
        carried, so nothing is drafted. ``mask``: of the new context; default the same.
        """
        layout = self.layout.derive(index, document=document, again=again, time=time, slots=slots)
        ids = self.ids
        if ids is not None and index is not None:
            ids = ids.flatten(0, 1)[index].view_as(ids)
        return replace(
            self,
            layout=layout,
            mask=mask or self.mask,
            ids=ids,
            published={},
            draft=self.draft and slots,
        )
