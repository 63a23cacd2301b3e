"""Every registered optimizer: resume, ZeRO stages, oracles, refusals; EMA, schedules, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from pydantic import ValidationError
from test_trainer import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.registry import OPTIMIZERS
from mm.run import Ema, Run, Schedule
from mm.trainer.trainer import INTERRUPTED, train

KINDS = sorted(OPTIMIZERS)
STAGES = [0, 1, 2, 3]
RATES = {"lion": 2e-3, "sgd_sai": 5e-3}


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def optimizer_run(out: Path, name: str, kind: str, *, steps: int, **change: Any) -> Run:
    """A run of the toy model with an optimizer and an EMA."""
    settings = change.pop("optimizer", {})
    ema = change.pop("ema", {"decay": 0.9})
    shape = "constant" if OPTIMIZERS.get(kind).own_schedule else "wsd"  # type: ignore[attr-defined]
    values = make_run(out, name, steps=steps, **change).to_dict()
    values["stages"][0]["optimizer"] = {"kind": kind, "lr": RATES.get(kind, 1e-2), **settings}
    values["stages"][0]["schedule"] = {"shape": shape, "warmup": 2}
    values["stages"][0]["ema"] = ema
    return Run.model_validate(values)


def saved(run: Run, step: int, kind: str) -> dict[str, torch.Tensor]:
    return toys.load_file(str(run.folder / f"checkpoints/step_{step:06d}/{kind}.safetensors"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_law_resume_is_bitwise(tmp_path: Path, kind: str, stage: int) -> None:
    """Train 10 = train 5, stop, train 5: losses, weights, every state, EMA and exported model."""
    change: dict[str, Any] = {"steps": 10, "stage": stage, "checkpoints": {"every": 0}}
    whole = optimizer_run(tmp_path, "whole", kind, **change)
    train(whole)
    halves = optimizer_run(tmp_path, "halves", kind, data={"signal_at": 4}, **change)
    with pytest.raises(SystemExit) as stopped:
        train(halves)
    assert stopped.value.code == INTERRUPTED and len(rows(halves)) == 5
    assert train(halves)["resumed_from"] == 5
    assert losses(whole) == losses(halves)
    assert losses(whole)[-1] < losses(whole)[0]
    for file in ("model", "model.optimizer"):
        a, b = saved(whole, 10, file), saved(halves, 10, file)
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.equal(a[key], b[key]), key
    a, b = toys.load_toy(whole.folder), toys.load_toy(halves.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_law_stages_are_equal_and_another_stage_goes_on(tmp_path: Path, kind: str) -> None:
    """Losses of stages 0-3 agree, and a run that changes its stage at step 3 agrees too."""
    runs = [optimizer_run(tmp_path, f"s{s}", kind, steps=6, stage=s) for s in STAGES]
    for run in runs:
        train(run)
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=5e-6)
    for first, then in ((0, 2), (3, 0), (1, 3)):
        name = f"from{first}"
        half = optimizer_run(tmp_path, name, kind, steps=6, stage=first, data={"signal_at": 2})
        with pytest.raises(SystemExit):
            train(half)
        on = optimizer_run(tmp_path, name, kind, steps=6, stage=then)
        assert train(on)["resumed_from"] == 3
        assert losses(on) == pytest.approx(losses(runs[0]), rel=5e-6), (first, then)
