"""What the tensors of an optimizer hold: parameters at ZeRO stage 0, flat slices at 1-3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mm.model.slices import Slice, slice_of


@dataclass(frozen=True)
class Span:
    """One parameter in the shards of all ranks.

    Stages 1 and 2 cut the concatenation of a group's parameters into equal shards of ``size``, and
    ``first`` is the parameter's place in it. Stage 3 cuts every parameter into slices of ``size``
    (``each``), and ``first`` is their place in a shard.
    """

    name: str
    shape: torch.Size
    first: int
    size: int
    each: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def on(self, rank: int) -> Slice:
        """The slice that ``rank`` holds; n = 0 when it holds none."""
        return slice_of(rank, self.numel, self.first, self.size, self.each)


class Shards:
    """All tensors that the optimizer updates, with their spans, in the same order on all ranks.

    Attributes:
        spans: tensor -> the parameters of its group, held by this rank or not.
        groups: tensor -> index of its parameter group.
        wire: device of what processes send each other; the tensors may be on the host (offload).
    """

    wire: torch.device | None = None  # that of the tensors

    def __init__(
        self, spans: Mapping[Tensor, Sequence[Span]], groups: Mapping[Tensor, int], split: bool
    ):
        self.spans, self.groups = spans, groups
        self._sizes: dict[Tensor, Tensor] = {}
        self.rank, self.world = 0, 1
        if split and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @classmethod
    def from_groups(cls, groups: Sequence[Mapping], names: Mapping[Tensor, str]) -> Shards:
        """Stage 0: every parameter is its own shard, the same on all ranks."""
        spans, where = {}, {}
        for i, group in enumerate(groups):
            for p in group["params"]:
                spans[p] = [Span(names[p], p.shape, 0, p.numel(), True)]
                where[p] = i
        return cls(spans, where, split=False)

    @classmethod
    def of_flats(
        cls,
        flats: Sequence[Tensor],
        groups: Sequence[Sequence[Tensor]],
        names: Mapping[Tensor, str],
    ) -> Shards:
        """Stages 1 and 2: ``flats[i]`` is this rank's part of the parameters ``groups[i]``."""
        spans, where = {}, {}
        for i, (flat, group) in enumerate(zip(flats, groups, strict=True)):
            first, spans[flat], where[flat] = 0, [], i
            for p in group:
                spans[flat].append(Span(names[p], p.shape, first, flat.numel(), False))
                first += p.numel()
        return cls(spans, where, split=True)

    @classmethod
    def of_slices(
        cls,
        flats: Sequence[Tensor],
        groups: Sequence[Sequence[Tensor]],
        names: Mapping[Tensor, str],
        group_of: Mapping[int, int],
    ) -> Shards:
        """Stage 3: ``flats[i]`` holds this rank's slice of every parameter of ``groups[i]``."""
        spans, where = {}, {}
        for i, (flat, group) in enumerate(zip(flats, groups, strict=True)):
            first, spans[flat], where[flat] = 0, [], group_of[i]
            for p in group:
                size = p.partition_numel()  # type: ignore[attr-defined]
                shape = torch.Size(p.ds_shape)  # type: ignore[attr-defined]
                spans[flat].append(Span(names[p], shape, first, size, True))
                first += size
        return cls(spans, where, split=True)

    def mine(self, x: Tensor) -> Iterator[tuple[int, Span, Slice]]:
        """Number in ``spans[x]``, span and slice of each parameter this rank has a part of."""
        for i, span in enumerate(self.spans[x]):
            part = span.on(self.rank)
            if part.n:
                yield i, span, part

    def sizes(self, x: Tensor) -> Tensor:
        """Elements of every parameter in ``spans[x]``, `(spans,)` float32."""
        if x not in self._sizes:
            numels = [float(span.numel) for span in self.spans[x]]
            self._sizes[x] = torch.tensor(numels, device=x.device)
        return self._sizes[x]

    def sums(self, x: Tensor, *values: Tensor) -> Tensor:
        """Sum tensors of the shape of ``x`` over each parameter: `(len(values), spans)` float32.

        All ranks get it. Accumulated in float64, so that it hardly depends on where a shard ends.
        """
        out = torch.zeros(len(values), len(self.spans[x]), dtype=torch.float64, device=x.device)
        for i, _, part in self.mine(x):
            for row, value in zip(out, values, strict=True):
                row[i] = value.reshape(-1)[part.at : part.at + part.n].sum(dtype=torch.float64)
        if self.world > 1:
            sent = out.to(self.wire or x.device)
            dist.all_reduce(sent)
            out = sent.to(x.device)
        return out.float()

    def gather(self, x: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Slice]]:
        """Whole tensors of the parameters that this rank has a part of, with its slice.

        One collective; for its time every rank holds ``value`` of the whole group.
        """
        if self.world == 1:
            parts = value.reshape(1, -1)
        else:
            mine = value.reshape(-1).to(self.wire or value.device)
            parts = mine.new_empty(self.world, mine.numel())
            dist.all_gather_into_tensor(parts.view(-1), mine)
            parts = parts.to(value.device)
        for _, span, part in self.mine(x):
            pieces = [span.on(rank) for rank in range(self.world)]
            rows = [parts[r, s.at : s.at + s.n] for r, s in enumerate(pieces) if s.n]
            yield (rows[0] if len(rows) == 1 else torch.cat(rows)).view(span.shape), part

    def full(self, x: Tensor, value: Tensor, span: Span) -> Tensor:
        """``value`` of one parameter, whole, on all ranks (one collective)."""
        part = span.on(self.rank)
        if self.world == 1:
            return value.reshape(-1)[part.at : part.at + part.n].view(span.shape)
        out = value.new_zeros(span.numel)
        out[part.start : part.start + part.n] = value[part.at : part.at + part.n]
        sent = out.to(self.wire or out.device)
        dist.all_reduce(sent)
        return sent.to(out.device).view(span.shape)

    def put(self, value: Tensor, span: Span, read: Callable[[int, int], Tensor]) -> None:
        """Fill this rank's slice of a parameter in ``value``, which is like its shard.

        ``read``: elements ``start : start + n`` of the whole one.
        """
        part = span.on(self.rank)
        if part.n:
            value.view(-1)[part.at : part.at + part.n].copy_(read(part.start, part.n))


def join_slices(mine: Tensor, shape: torch.Size) -> Tensor:
    """A parameter whole on all ranks, of the slices of stage 3 that they hold on the host."""
    pieces: list[Tensor] = [mine] * dist.get_world_size()
    if len(pieces) > 1:
        dist.all_gather_object(pieces, mine)
    return torch.cat(pieces).view(shape)
