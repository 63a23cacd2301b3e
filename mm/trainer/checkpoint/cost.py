"""What a checkpoint will cost each process, from the shapes of its tensors alone.

By the code that places the tensors of a real one: `Span.on` and `spread`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from mm.model.slices import Placed
from mm.trainer.checkpoint.held import ANY, Files, Held, place_of, spread
from mm.trainer.engine.zero_shards import Span


@dataclass(frozen=True)
class Cost:
    """Of one save.

    Attributes:
        total: bytes of tensors, of all processes.
        most: bytes of the process that writes most.
        files: with tensors, of all processes.
    """

    total: int
    most: int
    files: int

    def seconds(self, bytes_per_second: float, processes: int) -> float:
        """Time to write, ``processes`` sharing ``bytes_per_second`` (those of a node)."""
        return self.most * processes / bytes_per_second


def spans_of(shapes: Mapping[str, tuple[int, ...]], stage: int, world: int) -> list[Span]:
    """Where ZeRO cuts fp32 parameters of one group, as `Shards` reads it from the engine."""
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    total = sum(size.numel() for size in sizes.values())
    out, first = [], 0
    for name, size in sizes.items():
        each = stage in (0, 3)
        length = -(-size.numel() // world) if each else -(-total // world)
        out.append(Span(name, size, first if not each else 0, length, each))
        first += size.numel()
    return out


def files_of(
    shapes: Mapping[str, tuple[int, ...]], stage: int, world: int, states: Iterable[str]
) -> dict[str, dict[str, Held]]:
    """What a checkpoint of one network holds: fp32 masters, and elementwise fp32 ``states``."""
    spans = spans_of(shapes, stage, world)
    alike = lambda span: Placed(tuple(span.shape), "F32", ANY)
    places = {s.name: alike(s) if stage == 0 else place_of(s, torch.float32) for s in spans}
    model = {name: Held(place, None) for name, place in places.items()}
    kept = {f"{state}/{name}": held for state in states for name, held in model.items()}
    return {"model": model, "model.optimizer": kept}


def cost(files: Mapping[str, Mapping[str, Held]], world: int) -> Cost:
    """Bytes and files of a save by ``world`` processes."""
    given: Files = spread(files, 0, world)
    loads, paths = [0] * world, 0
    for table in given.values():
        has = set()
        for held in table.values():
            place = held.placed
            for rank in place.holders(0, place.numel) if place.numel else ():
                if n := place.on(rank).n:
                    loads[rank] += n * place.n_bytes // place.numel
                    has.add(rank)
        paths += len(has)
    return Cost(sum(loads), max(loads), paths)
