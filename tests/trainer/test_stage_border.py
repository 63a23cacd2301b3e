"""Two stages: a run that is stopped, or goes back, at their border is as one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from trainer_runs import Calls, losses, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import INTERRUPTED, Trainer, train

STEPS = 3  # of the first stage
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema": {"ema": {"decay": 0.9}},
    "schedule_free": {
        "optimizer": {"kind": "schedule_free_adamw", "lr": 1e-2},
        "schedule": {"shape": "constant", "warmup": 2},
    },
    "teacher": {"objective": "toy_teacher"},
    "teacher_and_ema": {"objective": "toy_teacher", "ema": {"decay": 0.9}},
}


def two_stages(
    out: Path,
    name: str,
    form: str,
    data: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    **change: Any,
) -> Run:
    """A run of two stages of the same form; ``data`` merges into the data of each."""
    values = make_run(out, name, steps=STEPS, **change).to_dict()
    (stage,) = values["stages"]
    stage |= FORMS[form]
    values["stages"] = [{**stage, "data": stage["data"] | each} for each in data]
    return Run.model_validate(values)


def stopped(run: Run) -> None:
    with pytest.raises(SystemExit) as code:
        train(run)
    assert code.value.code == INTERRUPTED


def assert_same(whole: Run, other: Run) -> None:
    """The same losses, and the same bits in every tensor of the last checkpoint and the model."""
    assert losses(other) == losses(whole)
    a, b = (checkpoint.newest(r.folder / "checkpoints") for r in (whole, other))
    assert a is not None and b is not None and a.state["step"] == b.state["step"]
    files = sorted(p.name for p in a.folder.glob("*.safetensors"))
    assert files == sorted(p.name for p in b.folder.glob("*.safetensors"))
    for file in files:
        assert (a.folder / file).read_bytes() == (b.folder / file).read_bytes(), file
    left, right = (r.folder / "model" / "model.safetensors" for r in (whole, other))
    assert left.read_bytes() == right.read_bytes()


# By default every form at one stage, but one form at stage 3 in its place.
BORDERS = [
    pytest.param(form, zero, marks=[pytest.mark.slow] * (zero != (3 if form == "ema" else 1)))
    for form in sorted(FORMS)
    for zero in (0, 1, 3)
]


@pytest.mark.parametrize("form, zero", BORDERS)
def test_a_resume_at_the_border_is_as_the_unbroken_run(
    tmp_path: Path, form: str, zero: int
) -> None:
    whole = two_stages(tmp_path, "whole", form, stage=zero)
    train(whole)
    halves = two_stages(tmp_path, "halves", form, ({"signal_at": STEPS - 1}, {}), stage=zero)
    stopped(halves)
    saved = checkpoint.newest(halves.folder / "checkpoints")
    assert saved is not None and (saved.state["step"], saved.state["stage"]) == (STEPS, 0)
    assert train(halves)["resumed_from"] == STEPS
    assert_same(whole, halves)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[pytest.mark.slow] * (form not in ("ema", "plain")))
        for form in sorted(FORMS)
    ],
)
def test_a_return_to_the_border_is_as_a_run_without_the_bad_batches(
    tmp_path: Path, form: str
) -> None:
    """The newest checkpoint is the first stage's last one: what it handed over is handed again."""
    change: dict[str, Any] = {"model": {"spike_at": 17}, "engine": {"max_skips": 1}}
    run = two_stages(tmp_path, "run", form, ({}, {"spikes": (0, 1)}), **change)
    train(run)
    (event,) = (json.loads(line) for line in (run.folder / "events.jsonl").open())
    assert (event["event"], event["step"], event["to"]) == ("rollback", STEPS + 1, STEPS)
    without = two_stages(tmp_path, "without", form, ({}, {"first": 2}), **change)
    train(without)
    assert_same(without, run)


def teachers(run: Run) -> list[torch.Tensor]:
    """A matrix of the teacher after every step."""
    files = sorted((run.folder / "checkpoints").glob("step_*/teacher.safetensors"))
    assert len(files) == 2 * STEPS
    return [toys.load_file(str(file))["embed.weight"] for file in files]


def test_an_average_goes_on_over_the_border(tmp_path: Path) -> None:
    run = two_stages(tmp_path, "run", "teacher", checkpoints={"every": 1, "keep_last": 9})
    train(run)
    found = teachers(run)
    model = run.folder / f"checkpoints/step_{STEPS + 1:06d}/model.safetensors"
    weight = toys.load_file(str(model))["embed.weight"]
    assert torch.equal(found[STEPS], found[STEPS - 1].lerp(weight, 1 - 0.8))


def test_a_frozen_network_keeps_the_weights_of_the_stage_before(tmp_path: Path) -> None:
    """Also when the run is stopped and goes on in the second stage."""
    runs = []
    for name, data in (("whole", {}), ("halves", {"signal_at": 1})):
        keep = {"every": 1, "keep_last": 9}
        values = two_stages(tmp_path, name, "teacher", ({}, data), checkpoints=keep).to_dict()
        values["stages"][1]["objective"]["frozen"] = True
        runs.append(Run.model_validate(values))
    train(runs[0])
    stopped(runs[1])
    train(runs[1])
    assert_same(*runs)
    found = teachers(runs[1])
    assert not torch.equal(found[0], found[1])
    assert all(torch.equal(found[STEPS - 1], after) for after in found[STEPS:])


def test_a_frozen_network_takes_no_gradient(tmp_path: Path) -> None:
    found: list[bool] = []

    def look(trainer: Any) -> None:
        for module in trainer.stage.frozen.values():
            assert not module.training
            found.extend(p.requires_grad or p.grad is not None for p in module.parameters())

    Trainer(make_run(tmp_path, steps=1, objective="toy_teacher"), [Calls("post_step", look)]).fit()
    assert found and not any(found)
