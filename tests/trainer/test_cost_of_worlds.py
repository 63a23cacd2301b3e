"""Costs of save, load and build: W processes and a model W times as large, each does as much.

At stage 0, where every process has the whole model, a model of one size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mm.model import slices
from mm.model.slices import INDEX, Slice, Slices, file_name, index_text
from mm.model.tensor_file import Planned, write_file
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint.cost import files_of
from mm.trainer.checkpoint.held import spread
from mm.trainer.engine import cutter as cutters
from mm.trainer.engine.cutter import Cutter

WORLDS, BAR = (1, 8, 64, 512), 1.25
STATES = ("exp_avg", "exp_avg_sq")
Tables = dict[str, dict[str, Tensor]]


def shapes(times: int) -> dict[str, tuple[int, ...]]:
    """Of a model with ``times`` as many values in as many tensors."""
    layers = {f"{i}.{n}": (s * times, 24) for i in range(3) for n, s in (("up", 64), ("down", 37))}
    return {"embed": (101 * times, 24), **layers, "norm": (24 * times,)}


def larger(world: int, stage: int) -> int:
    """Times that the model of a world is larger; each process of stage 0 has all of it."""
    return world if stage else 1


def held_by(rank: int, world: int, stage: int) -> tuple[dict[str, Any], Tables]:
    """Where all tensors are, and the elements of those that ``rank`` writes."""
    files = spread(files_of(shapes(larger(world, stage)), stage, world, STATES), rank, world)
    placed = {f: {n: h.placed for n, h in t.items()} for f, t in files.items()}
    own: Tables = {}
    for file, table in placed.items():
        for name, place in table.items():
            if n := place.on(rank).n:
                shape = place.shape if n == place.numel else (n,)
                own.setdefault(file, {})[name] = torch.full(shape, float(rank))
    return placed, own


@pytest.fixture(scope="module", params=range(4))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints of all worlds at one stage: folder by world; and the bytes of each process."""
    root, wrote = tmp_path_factory.mktemp("worlds"), {}
    for world in WORLDS:
        folder = root / str(world)
        folder.mkdir()
        each = [0] * world
        for rank in range(world):
            placed, own = held_by(rank, world, request.param)
            for file, table in own.items():
                path = folder / file_name(file, rank, world)
                plan = [
                    Planned(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in table.items()
                ]
                write_file(path, plan, {})
                each[rank] += path.stat().st_size
            if not rank:
                (folder / INDEX).write_text(index_text(placed, world))
        wrote[world] = each
    return request.param, root, wrote


def grows(figures: Mapping[int, float]) -> dict[int, float]:
    """Of the worlds that cost more than the bar allows."""
    return {w: n / figures[1] for w, n in figures.items() if n > BAR * figures[1]}


@pytest.mark.slow
def test_a_process_writes_as_much_in_every_world(saved: Any) -> None:
    """Nor does the index grow: every process reads it."""
    _, root, wrote = saved
    assert not grows({w: max(each) for w, each in wrote.items()})
    assert not grows({w: (root / str(w) / INDEX).stat().st_size for w in WORLDS})


@pytest.mark.slow
@pytest.mark.parametrize("times", [1.0, 0.5, 2.0])
def test_a_process_reads_as_much_in_every_world(
    saved: Any, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it trains of masters and states, from a checkpoint of as many processes or others."""
    stage, root, _ = saved
    opened: list[str] = []
    real = lambda path, **kw: opened.append(path) or safe_open(path, **kw)
    monkeypatch.setattr(slices, "safe_open", real)
    values, files = dict.fromkeys(WORLDS, 0.0), dict.fromkeys(WORLDS, 0)
    for world in WORLDS:
        now = max(1, int(world * times))
        there = files_of(shapes(larger(world, stage)), stage, now, STATES)
        for rank in sorted({0, now // 3, now - 1}):
            found = Slices(root / str(world))
            opened.clear()
            for file, table in there.items():
                for name, held in table.items():
                    part = held.placed.on(rank) if stage else Slice(0, 0, held.placed.numel)
                    if part.n:
                        found.read(file, name, part.start, part.n)
            share = now / world if stage else 1  # of fewer processes each has more
            values[world] = max(values[world], found.n_read * share)
            files[world] = max(files[world], len(opened))
    assert not grows(values)
    # of weights and of states; at stage 0 a process at most writes each of the 24 tensors
    most = 2 * (2 + 1 / times) if stage else 24
    assert all(n <= most for n in files.values()), files


@pytest.mark.slow
def test_a_process_looks_into_as_many_bytes_before_a_resume(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fault_of` with its share of the files."""
    _, root, _ = saved
    hashed: list[int] = []
    monkeypatch.setattr(check, "digest", lambda path: hashed.append(path.stat().st_size) or "x")
    most = {}
    for world in WORLDS:
        folder: Path = root / str(world)
        (folder / check.STATE).write_text("{}")
        names = [p.name for p in folder.iterdir() if p.name != check.MARK]
        (folder / check.MARK).write_text(str({n: "x" for n in names}).replace("'", '"'))
        most[world] = 0
        for rank in sorted({0, world // 3, world - 1}):
            hashed.clear()
            check.fault_of(folder, (rank, world))
            most[world] = max(most[world], sum(hashed))
    assert not grows(most)


def test_a_process_builds_its_slices_alone_from_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage 3: what `Cutter.load` asks for."""
    most = {}
    for world in WORLDS:
        module = nn.Module()
        for name, shape in shapes(world).items():
            p: Any = nn.Parameter(torch.empty(0))
            p.ds_numel = math.prod(shape)
            p.ds_tensor = torch.empty(-(-p.ds_numel // world))
            module.register_parameter(name.replace(".", "_"), p)
        most[world] = 0
        for rank in sorted({0, world // 3, world - 1}):
            monkeypatch.setattr(cutters.dist, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(cutters.dist, "get_world_size", lambda world=world: world)
            asked: list[int] = []
            cut = Cutter.__new__(Cutter)
            cut.frozen = {}

            def read(name: str, start: int, n: int, asked: list[int] = asked) -> Tensor:
                asked.append(n)
                return torch.zeros(n)

            cut.load(module, read)
            most[world] = max(most[world], sum(asked))
    assert not grows(most) and min(most.values()) > 0
