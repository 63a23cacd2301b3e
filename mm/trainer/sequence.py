"""Processes that share the tokens of each row (`engine.sequence`): who they are, what each gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mm.batch import Batch
from mm.errors import UserError
from mm.launch import environment
from mm.launch.batch import require_groups
from mm.launch.environment import Ranks
from mm.layout import Layout
from mm.model.model import Model
from mm.model.sequence import why_not
from mm.objectives.objective import Objective
from mm.run import Run
from mm.shard import Shard

# Fields of a batch that `SequenceGroup.split` knows.
CUT = ("layout", "ids", "targets", "weight", "places", "labels", "values", "keys", "shard")


def data_ranks(size: int) -> Ranks:
    """This process among those that read rows of their own: ``size`` in a row read the same ones.

    Raises:
        UserError: the processes do not divide into groups of ``size``.
    """
    me = environment.ranks()
    require_groups(me.world, size)
    return me._replace(rank=me.rank // size, world=me.world // size)


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share rows with this one."""

    rank: int
    size: int
    group: Any

    @staticmethod
    def join(size: int) -> SequenceGroup | None:
        """Make the groups of all processes; None where each has rows of its own. On all ranks.

        Raises UserError as `data_ranks`.
        """
        mine = data_ranks(size)
        if size == 1:
            return None
        groups = [
            dist.new_group(list(range(first * size, (first + 1) * size)))
            for first in range(mine.world)
        ]
        return SequenceGroup(environment.ranks().rank % size, size, groups[mine.rank])

    def split(self, batch: Batch) -> Batch:
        """The own slice of the tokens of a batch on the host; rows are padded until they divide.

        Raises UserError where it holds more than tokens of rows.
        """
        rows = batch.ids.shape[:2]
        unknown = [getattr(batch, f.name) for f in fields(batch) if f.name not in CUT]
        other = [name for found in unknown if found for name in found]
        other += [name for name, v in batch.labels.items() if v.shape[:2] != rows]
        other += [name for name, v in batch.values.items() if not v.is_full]
        if other:
            raise UserError(
                f"engine.sequence {self.size}: '{other[0]}' of a batch is no token of a row and "
                "cannot be split; set engine.sequence=1"
            )
        batch = _padded(batch, self.size)
        shard, layout = Shard.of(batch.layout, self.rank, self.size, self.group)
        cut = lambda x: shard.slice(x).contiguous()

        def own(places: Tensor) -> Tensor:
            found = shard.own(places.long(), -1)
            return found[found >= 0].to(places.dtype)

        return replace(
            batch,
            layout=layout,
            ids=cut(batch.ids),
            targets=cut(batch.targets),
            weight=cut(batch.weight),
            places={k: own(v) for k, v in batch.places.items()},
            labels={k: cut(v) for k, v in batch.labels.items()},
            shard=replace(shard, ids=batch.ids),
        )

    def total(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of what each process has of the same rows, () float64 each. On all of them."""
        if not sums:
            return {}
        flat = torch.stack([sums[k].double() for k in sorted(sums)])
        dist.all_reduce(flat, group=self.group)
        return dict(zip(sorted(sums), flat, strict=True))


def _padded(batch: Batch, size: int) -> Batch:
    B, T = batch.layout.shape
    more = -T % size
    if not more:
        return batch
    pad = lambda x, value=0: F.pad(x, (0, 0) * (x.dim() - 2) + (0, more), value=value)
    moved = lambda flat: (flat.long() // T * (T + more) + flat.long() % T).to(flat.dtype)
    old = batch.layout
    starts = torch.where(old.cu_seqlens == B * T, B * (T + more), moved(old.cu_seqlens))
    layout = Layout(old.fields.map(pad), starts, old.slot, old.fresh, old.max_seqlen)
    return replace(
        batch,
        layout=layout,
        ids=pad(batch.ids, -1),
        targets=pad(batch.targets, -1),
        weight=pad(batch.weight),
        places={k: moved(v) for k, v in batch.places.items()},
        labels={k: pad(v) for k, v in batch.labels.items()},
        values={k: replace(v, place=moved(v.place)) for k, v in batch.values.items()},
    )


def require_shares(
    run: Run, index: int, objective: Objective, module: nn.Module, name: str
) -> None:
    """Check that the networks and data of a stage can be split as `engine.sequence` says.

    Raises:
        UserError: naming what cannot, and the key.
    """
    size, data = run.engine.sequence, run.stages[index].data
    if size == 1:
        return
    why = None
    length = getattr(data, "seq_len", None)
    if run.engine.compile:
        why = "engine.compile cannot follow what processes pass each other: set it to false"
    elif not isinstance(module, Model):
        why = f"network '{name}' is no language model: it has no rows of tokens"
    elif getattr(data, "kind", "") == "stateful":
        why = f"stages.{index}.data 'stateful' carries States of whole rows: use 'packed'"
    elif type(objective).corrupt is not Objective.corrupt:
        why = f"stages.{index}.objective draws for whole rows: use next_token"
    elif length is not None and length % size:
        near = max(size, (length + size // 2) // size * size)
        why = f"stages.{index}.data.seq_len {length} does not divide: set it to {near}, the nearest"
    else:
        why = why_not(module, size)
    if why is not None:
        raise UserError(f"engine.sequence {size}: {why}; or set engine.sequence=1")
