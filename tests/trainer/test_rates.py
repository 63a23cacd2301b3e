"""Learning rates as the trainer sets them: by group and by stage; scheduled values by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_runs import Calls, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.run import Run
from mm.schedule import Schedule
from mm.trainer.loop import Trainer, train


@pytest.mark.parametrize("stage", [0, 2])
def test_every_group_keeps_its_own_rate(tmp_path: Path, stage: int) -> None:
    """Under muP matrices learn at base/width of the rate; the schedule multiplies each group's."""
    mixers = {"attention": {"heads": 2}}
    backbone = {"kind": "stack", "depth": 1, "mixers": mixers, "ffn": {"kind": "swiglu"}}
    run = make_run(tmp_path, steps=3, stage=stage)
    model = {"kind": "lm", "d_model": 32, "mup_base": 8, "backbone": backbone}
    run = Run.model_validate(run.to_dict() | {"model": model})
    found: list[list[tuple[float, float]]] = []

    def note(trainer: Any) -> None:
        groups = trainer.stage.engines["model"].base.param_groups
        found.append([(g["lr"], g["initial_lr"]) for g in groups])

    Trainer(run, [Calls("post_step", note)]).fit()
    schedule = run.stages[0].schedule
    assert len(found) == 3
    for step, groups in enumerate(found):
        assert len({initial for _, initial in groups}) > 1, "muP makes several rates"
        for lr, initial in groups:
            assert lr == pytest.approx(initial * schedule(step, 3)), step


def test_a_later_stage_begins_its_own_schedule(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4)
    stage = run.stages[0].model_copy(update={"schedule": Schedule(shape="cosine", warmup=3)})
    run = run.model_copy(update={"stages": (stage, stage)})
    train(run)
    rates = [row["optim/lr"] for row in rows(run)]
    assert len(rates) == 8 and rates[:4] == rates[4:]
    assert rates[0] < rates[1] < rates[2], "it warms up"


def test_every_step_draws_its_scheduled_values_anew(tmp_path: Path) -> None:
    """And a rerun draws the same: they depend on seed and step."""
    seen: list[float] = []

    def draw(trainer: Any) -> None:
        objective = trainer.stage.objective
        if not hasattr(objective, "drawn"):
            objective.drawn = True
            objective.scheduled = lambda step, rng: {"books": float(rng.random())}
        seen.append(trainer.stage.env.scheduled.get("books", -1.0))

    for name in ("once", "twice"):
        Trainer(make_run(tmp_path, name, steps=6), [Calls("post_step", draw)]).fit()
    once, twice = seen[:6], seen[6:]
    assert once == twice and once[0] == -1.0  # the first step is over when the hook replaces it
    assert len(set(once[1:])) == 5
