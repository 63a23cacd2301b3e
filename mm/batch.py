"""Batch: the only type that data and model share.

And Sum, the only form in which a loss or statistic travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.layout import Layout
from mm.shard import Shard


class Sum(NamedTuple):
    """A total and its count, summed over micro-batches and ranks, divided once."""

    total: Tensor  # () float32, with gradient; a statistic (EMA sums) may have any shape
    count: Tensor  # () float32, detached

    def __add__(self, other: Sum) -> Sum:  # type: ignore[override]
        return Sum(self.total + other.total, self.count + other.count)

    def detach(self) -> Sum:
        return Sum(self.total.detach(), self.count.detach())

    def mean(self) -> Tensor:
        """Total over count; 0 where nothing was counted."""
        return self.total / self.count.clamp_min(1e-12)


def add_sums(into: dict[str, Sum], more: Mapping[str, Sum]) -> None:
    """Add each of ``more`` to the one of its name."""
    for name, value in more.items():
        into[name] = into[name] + value if name in into else value


@dataclass(frozen=True, slots=True)
class Values:
    """Continuous data of G items and their RESERVED places.

    An item may turn out shorter than its ``room``.

    Never empty: a rank without this modality carries one zero item with room 0, so that the module
    runs on all ranks.
    """

    data: Tensor  # (G, L, ...)
    length: Tensor  # (G,) int32: valid part of L
    place: Tensor  # (G,) int32 first flat place
    room: Tensor  # (G,) int32 reserved places; unfilled ones become padding
    # On the host: rows and columns of each item's cells; None: each is one row
    grid: tuple[tuple[int, int], ...] | None = None
    is_full: bool = False  # known on the host: every item is as long as its room

    def grids(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of every item, (G,) int64 each, on the host."""
        G, L = self.data.shape[:2]
        pairs = self.grid or ((1, L),) * G
        rows, columns = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        return rows, columns

    def floats(self, dtype: torch.dtype) -> Tensor:
        """``data`` in a dtype of floats; 0 and 255 of uint8 become -1 and 1."""
        if self.data.dtype == torch.uint8:
            return self.data.to(dtype) * (2 / 255) - 1
        return self.data.to(dtype)

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Values:
        """Every tensor, by a function of each."""
        data, length, place, room = map(move, (self.data, self.length, self.place, self.room))
        return Values(data, length, place, room, self.grid, self.is_full)

    @staticmethod
    def items(data: Tensor, length: Tensor | None = None) -> Values:
        """Items without places in a sequence (tokenizer training). ``data`` (G, L, ...)."""
        G, L = data.shape[0], data.shape[1]
        zero = torch.zeros(G, dtype=torch.int32)
        return Values(
            data,
            torch.full((G,), L, dtype=torch.int32) if length is None else length.to(torch.int32),
            zero,
            zero,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank. B rows, T tokens, S streams, P places."""

    layout: Layout
    ids: Tensor  # (B, T, S) int32, -1 = no id in this stream
    targets: Tensor  # (B, T, S) int32: what place t predicts, -1 = none
    weight: Tensor  # (B, T) float32 weight of that prediction
    places: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # head -> (P,) int32 flat places, computed on the host
    values: Mapping[str, Values] = field(default_factory=dict)
    labels: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # per document, item or place: "target_modality" (B, T) int32, ...
    # Second sequences of the same documents: document m of each goes with document m of this one
    parts: Mapping[str, Batch] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    head_targets: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # head -> (P, ...) what it predicts at its `places`, where that is no id of `targets`
    shard: Shard | None = None  # the batch is a slice of the tokens of its rows
    # On the host: its copy that is on the way to a device. A successor (`replace`) has none
    sent: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def to(self, device: Any) -> Batch:
        """Copy every tensor to a device."""
        return self.map_tensors(lambda t: t.to(device, non_blocking=True))

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """`to` by a function of each tensor."""
        return replace(
            self,
            layout=self.layout.map_tensors(move),
            ids=move(self.ids),
            targets=move(self.targets),
            weight=move(self.weight),
            places={k: move(v) for k, v in self.places.items()},
            values={k: v.map_tensors(move) for k, v in self.values.items()},
            labels={k: move(v) for k, v in self.labels.items()},
            parts={k: v.map_tensors(move) for k, v in self.parts.items()},
            head_targets={k: move(v) for k, v in self.head_targets.items()},
            shard=self.shard.map_tensors(move) if self.shard is not None else None,
        )

    @staticmethod
    def of_ids(ids_BTS: Tensor, layout: Layout | None = None) -> Batch:
        """A batch to run forward only: no targets. ``ids_BTS`` (B, T, S) or (B, T) int."""
        if ids_BTS.dim() == 2:
            ids_BTS = ids_BTS[..., None]
        B, T, _ = ids_BTS.shape
        ids = ids_BTS.to(torch.int32)
        return Batch(
            layout or Layout.plain(B, T).to(ids.device),
            ids,
            torch.full_like(ids, -1),
            torch.zeros(B, T, device=ids.device),
        )

    @staticmethod
    def of_values(
        values: Mapping[str, Values],
        keys: tuple[str, ...] = (),
        labels: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """A batch of raw items without a sequence (tokenizer training)."""
        empty = torch.zeros(0, 0, 1, dtype=torch.int32)
        layout = Layout.from_rows([], 0)
        return Batch(
            layout,
            empty,
            empty,
            torch.zeros(0, 0),
            values=dict(values),
            labels=dict(labels or {}),
            keys=keys,
        )
