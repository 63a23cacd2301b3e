"""Learning rates as the trainer sets them: by group and by stage; scheduled values by step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generation_toys import VOCABULARY
from trainer_runs import Calls, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.model.noise import STEP_SEED
from mm.registry import NETWORKS
from mm.run import Run
from mm.schedule import Schedule
from mm.trainer.env import TrainerEnv
from mm.trainer.loop import Trainer, train
from mm.trainer.optimizers.adamw import AdamWConfig
from mm.trainer.stage import StageState


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


def test_all_ranks_know_the_same_number_of_a_step() -> None:
    """Of it `nested` draws its width; the objective's own draws stay what they were."""
    seen: dict[int, list[float]] = {0: [], 1: []}
    objective = SimpleNamespace(scheduled=lambda step, rng: {"books": float(rng.random())})
    for rank, numbers in seen.items():
        env = TrainerEnv(5, torch.device("cpu"), "fp32")
        env._rank = rank
        for step in range(4):
            stage: Any = SimpleNamespace(env=env, objective=objective)
            assert StageState.begin_step(stage, step).keys() == {"books"}
            alone = np.random.default_rng((5, step)).random()
            assert env.scheduled["books"] == float(alone)
            numbers.append(env.scheduled[STEP_SEED])
    assert seen[0] == seen[1] and len({*seen[0]}) == 4


def test_rates_by_pattern_reach_the_groups() -> None:
    """LoRA+ (B 16 times as fast as A) and rates by layer are one setting; decay goes with them."""
    model = NETWORKS.parse(
        {"kind": "lm", "d_model": 16, "linear": "lora", "backbone": {"kind": "stack", "depth": 2}}
    ).build(VOCABULARY)
    rates = {"*.lora_b": 16.0, "backbone.layers.0.*": 0.5}
    optimizer = AdamWConfig(lr=1e-2, rates=rates)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for group in optimizer.groups(model):
        for p in group["params"]:
            seen[names[id(p)]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == {*names.values()}
    for name, (lr, decay) in seen.items():
        wanted = 1e-2 * (16 if name.endswith("lora_b") else 1)
        wanted *= 0.5 if name.startswith("backbone.layers.0.") else 1
        assert lr == pytest.approx(wanted), name
        assert decay in (0.0, 0.1), name
    with pytest.raises(UserError, match="no parameter that trains is called 'nothing'"):
        AdamWConfig(rates={"nothing": 2.0}).groups(model)


def test_a_step_moves_by_its_own_rate() -> None:
    """One step of AdamW moves every element by its rate, whatever the gradient."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = AdamWConfig(lr=1e-3, weight_decay=0.0, rates={"1.*": 8.0}, eps=1e-12).build(net)
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    for name, p in net.named_parameters():
        wanted = 8e-3 if name.startswith("1.") else 1e-3
        moved = (p - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, wanted), rtol=1e-3, atol=1e-7)
