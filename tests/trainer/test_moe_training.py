"""Mixture of experts in the loop: every ZeRO stage alike, losses weighed, loads told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.run import Run
from mm.trainer.loop import train

MODEL = {
    "kind": "lm",
    "d_model": 16,
    "backbone": {
        "kind": "stack",
        "depth": 2,
        "pattern": "attention",
        "mixers": {"attention": {"heads": 2}},
        "ffn": {"kind": "moe", "experts": 4, "hidden": 8, "shared": 1, "bias_rate": 0.05},
    },
}
OBJECTIVE = {"kind": "next_token", "aux_weights": {"balance": 0.5, "router_z": 0.1}}


def moe_run(out: Path, name: str, ffn: dict[str, Any] | None = None, **change: Any) -> Run:
    values = make_run(out, name, objective=OBJECTIVE, **change).to_dict()
    backbone = {**MODEL["backbone"], "ffn": MODEL["backbone"]["ffn"] | (ffn or {})}
    values["model"] = MODEL | {"backbone": backbone}
    return Run.model_validate(values)


def check_stages(tmp_path: Path, *stages: int) -> None:
    runs = [moe_run(tmp_path, f"stage{stage}", stage=stage) for stage in stages]
    for run in runs:
        train(run)
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=2e-5)
        for name in ("load_max", "router_entropy"):  # the biases chose alike
            key = f"aux/backbone.layers.1.ffn.{name}"
            assert losses(run, key) == pytest.approx(losses(runs[0], key), rel=2e-5)
    row = rows(runs[0])[0]
    for name in ("balance", "router_z"):
        each = [row[f"aux/backbone.layers.{i}.ffn.{name}"] for i in range(2)]
        assert row[f"loss/{name}"] == pytest.approx(sum(each), rel=1e-5) and min(each) > 0
    assert row["aux/backbone.layers.0.ffn.dropped"] == 0
    assert 1 <= row["aux/backbone.layers.0.ffn.load_max"] <= 2


def test_losses_and_loads_of_stages_0_and_3_are_equal(tmp_path: Path) -> None:
    check_stages(tmp_path, 0, 3)


@pytest.mark.slow
def test_losses_and_loads_of_all_stages_are_equal(tmp_path: Path) -> None:
    check_stages(tmp_path, 0, 1, 2, 3)


def test_a_resume_goes_on_with_the_biases(tmp_path: Path) -> None:
    """Train 6 = train 3 + resume 3, bit by bit."""
    whole = moe_run(tmp_path, "whole", stage=1)
    train(whole)
    halves = moe_run(tmp_path, "halves", data={"signal_at": 2}, stage=1)
    with pytest.raises(SystemExit):
        train(halves)
    assert train(halves)["resumed_from"] == 3
    assert losses(whole) == losses(halves)
    saved = "checkpoints/step_000006/model.safetensors"
    a, b = (toys.load_file(str(run.folder / saved)) for run in (whole, halves))
    biases = [name for name in a if name.endswith("ffn.bias")]
    assert len(biases) == 2 and all(a[name].abs().max() > 0 for name in biases)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_choices_over_the_capacity_are_told(tmp_path: Path) -> None:
    run = moe_run(tmp_path, "capacity", {"capacity": 0.5}, stage=0, steps=2)
    train(run)
    assert all(0.3 < share < 0.9 for share in losses(run, "aux/backbone.layers.0.ffn.dropped"))
