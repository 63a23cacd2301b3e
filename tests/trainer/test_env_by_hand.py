"""What a step lends an objective: its generators, and the States of rows that go on."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.model.slices import Placed
from mm.state import DataclassState
from mm.trainer import env as envs
from mm.trainer import stateful
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.env import TrainerEnv
from mm.trainer.stateful import FILE, CarriedStates

CPU = torch.device("cpu")


def env_of(monkeypatch: pytest.MonkeyPatch, rank: int | None = None, share: int = 1) -> TrainerEnv:
    """That of a rank; None: of a process alone, without a process group."""
    monkeypatch.setattr(envs.dist, "is_initialized", lambda: rank is not None)
    monkeypatch.setattr(envs.dist, "get_rank", lambda: rank)
    group: Any = SimpleNamespace(size=share) if share > 1 else None
    return TrainerEnv(5, CPU, "fp32", group)


def test_noise_is_of_the_step_and_of_the_rows_that_ranks_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first step it is that of step 0; a process alone draws as the first of many."""
    batches = [Batch.of_ids(torch.zeros(1, 2, dtype=torch.int64)) for _ in range(2)]

    def drawn(env: TrainerEnv, step: int | None) -> tuple[Any, ...]:
        if step is not None:
            env.begin(step, {})
        env.know(batches)
        noise = torch.rand(1, generator=env.rng).item(), torch.rand(1).item()
        return [env.seed_of(b) for b in batches], *(noise if step is not None else ())

    alone = env_of(monkeypatch)
    assert drawn(alone, None) == drawn(alone, 0)[:1]
    assert drawn(alone, 3) == drawn(env_of(monkeypatch, 0), 3) != drawn(alone, 4)
    second = drawn(env_of(monkeypatch, 1), 3)
    assert second != drawn(alone, 3)
    assert [drawn(env_of(monkeypatch, rank, 2), 3) for rank in (1, 2)] == [drawn(alone, 3), second]
    assert len({*drawn(alone, 3)[0], *second[0], alone.seed_of(batches[0].to(CPU))}) == 5


@dataclass(frozen=True)
class Rows(DataclassState):
    h: Tensor  # (N, 2)
    empty: Tensor  # (N, 0)


def rows_of(*numbers: float) -> Rows:
    h = torch.tensor(numbers, dtype=torch.float32)[:, None].repeat(1, 2)
    return Rows(h, torch.zeros(len(numbers), 0))


def firsts(state: Any) -> list[float]:
    return state.h[:, 0].tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_states_of_all_rows_are_saved_in_their_order(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Each of the ranks has as many; another number of them takes its own rows again."""
    monkeypatch.setattr(stateful.dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(stateful.dist, "get_world_size", lambda: world)
    n = 4 // world
    parts = [
        CarriedStates(rows_of(*range(n * r, n * r + n)), [range(n * r, n * r + n)])
        for r in range(world)
    ]
    held = [part.own_rows() for part in parts]
    for own in held:
        assert own["000"].placed == Placed((4, 2), "F32", None, 0, 2 * n, True)
        assert own["001"].placed.shape == (4, 0)
    whole = torch.cat([own["000"].mine.reshape(-1) for own in held])  # type: ignore[union-attr]
    assert whole.tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    table = {"000": whole.view(4, 2), "001": torch.zeros(4, 0)}
    snapshot = Snapshot({"step": 1, "stage": 0}, {FILE: table})
    for first in range(3):
        new = CarriedStates(
            rows_of(9.0, 9.0), [range(first, first + 1), range(first + 1, first + 2)]
        )
        new.load(snapshot)
        assert firsts(new.state) == [first, first + 1]
    with pytest.raises(UserError, match="holds 1 State tensors a row, the model has 2"):
        parts[0].load(Snapshot({}, {FILE: {"000": whole}}))


def test_a_step_that_was_not_applied_leaves_the_rows_as_they_were() -> None:
    carried = CarriedStates(rows_of(0.0, 1.0, 2.0, 3.0), [range(4, 6), range(6, 8)])
    assert firsts(carried.before(1)) == [2.0, 3.0]
    with pytest.raises(ValueError, match="none of the step's"):
        carried.before(-1)
    for applied, want in ((False, [0.0, 1.0, 2.0, 3.0]), (True, [6.0, 7.0, 8.0, 9.0])):
        for micro, made in ((1, rows_of(8.0, 9.0)), (0, rows_of(6.0, 7.0))):
            carried.after(micro, SimpleNamespace(state=made))  # type: ignore[arg-type]
        carried.commit(applied)
        assert firsts(carried.state) == want
        carried.commit(True)  # nothing was made since then
        assert firsts(carried.state) == want
