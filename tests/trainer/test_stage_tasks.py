"""Tasks of a run: by name, at every stage's end, while training, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from pydantic import ValidationError
from trainer_runs import Calls, losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.cli.eval import task_rows
from mm.decoders.generate import Generator
from mm.registry import TASKS
from mm.run import Run
from mm.tasks.base import by_name
from mm.trainer.loop import INTERRUPTED, Trainer, train

KEY = "eval/toy_task_toys/weights"


@pytest.fixture(autouse=True)
def _toys_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "from_pretrained", toys.load_saved)


def two_stages(out: Path, name: str, **keys: Any) -> Run:
    run = make_run(out, name, steps=3, checkpoints={"every": 0}, stage_keys={"tasks": ["toy_task"]})
    last = {"tasks": [{"kind": "toy_task", "name": "last"}]} | keys
    first, second = (run.stages[0].to_dict() for _ in range(2))
    return Run.model_validate(run.to_dict() | {"stages": [first, second | last]})


def evaluated(run: Run) -> dict[int, dict[str, Any]]:
    found = {r["step"]: {k: v for k, v in r.items() if k.startswith("eval/")} for r in rows(run)}
    return {step: figures for step, figures in found.items() if figures}


def test_default_names_tell_tasks_of_one_kind_apart() -> None:
    spoken, drawn = "runs/a/spoken", "runs/a/drawn"
    tasks = [
        TASKS.parse({"kind": "recognition", "data": spoken, "sources": ["audio"]}),
        TASKS.parse({"kind": "recognition", "data": drawn, "sources": ["image"]}),
        TASKS.parse({"kind": "recognition", "data": drawn, "sources": ["image"], "split": "val"}),
        TASKS.parse({"kind": "judged_generation", "data": drawn, "sources": ["text"]}),
        TASKS.parse({"kind": "bits_per_byte", "data": drawn, "modalities": ["image"]}),
        TASKS.parse({"kind": "bits_per_byte", "data": drawn, "name": "mine"}),
    ]
    assert list(by_name(tasks)) == [
        "recognition_audio_to_text_spoken",
        "recognition_image_to_text_drawn",
        "recognition_image_to_text_drawn_2",
        "judged_generation_text_to_image_drawn",
        "bits_per_byte_image_drawn",
        "mine",
    ]
    assert list(by_name(tasks).values()) == tasks


def test_two_tasks_of_one_given_name_are_refused(tmp_path: Path) -> None:
    tasks = [{"kind": "toy_task", "name": "a"}, {"kind": "toy_task", "name": "a"}]
    with pytest.raises(ValidationError, match="two are called 'a'"):
        make_run(tmp_path, stage_keys={"tasks": tasks})
    with pytest.raises(ValidationError, match="pattern"):
        make_run(tmp_path, stage_keys={"tasks": [{"kind": "toy_task", "name": "a/b"}]})


def test_a_figure_of_two_tasks_has_their_names_before_it() -> None:
    figures = {"a": {"x_accuracy": 0.5, "x_chance": 0.1}, "b": {"x_accuracy": 0.7, "y_db": 1.0}}
    assert task_rows(figures) == [
        {"name": "a/x_accuracy", "value": 0.5, "unit": "share", "chance": 0.1, "task": "a"},
        {"name": "b/x_accuracy", "value": 0.7, "unit": "share", "task": "b"},
        {"name": "y_db", "value": 1.0, "unit": "dB", "task": "b"},
    ]


def test_every_stage_is_measured_at_its_own_end(tmp_path: Path) -> None:
    """Also where a signal comes between the first stage's end and its tasks."""
    whole = two_stages(tmp_path, "whole")
    out = train(whole)
    found = evaluated(whole)
    assert [r["step"] for r in rows(whole) if any(k.startswith("eval/") for k in r)] == [3, 6]
    assert set(found[3]) == {KEY, "eval/toy_task_toys/chance"}
    assert set(found[6]) == {"eval/last/weights", "eval/last/chance"}
    saved = sum(
        float(t.double().sum()) for k, t in toys.load_toy(whole.folder).items() if k != "seen"
    )
    assert found[6]["eval/last/weights"] == pytest.approx(saved)
    assert {KEY, "eval/last/weights"} <= out.keys()
    broken = two_stages(tmp_path, "broken")
    stop = Calls(
        "on_save", lambda trainer: trainer.step == 3 and os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as stopped:
        Trainer(broken, [stop]).fit()
    assert stopped.value.code == INTERRUPTED
    train(broken)
    assert evaluated(broken) == found


def test_a_task_with_every_counts_from_the_begin_of_its_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4, checkpoints={"every": 0})
    first, second = (run.stages[0].to_dict() for _ in range(2))
    later = second | {"tasks": [{"kind": "toy_task", "every": 3}]}
    run = Run.model_validate(run.to_dict() | {"stages": [first, later]})
    train(run)
    assert list(evaluated(run)) == [7, 8], "after three of its steps, and at its end"


def test_a_task_with_every_measures_the_weights_that_train(tmp_path: Path) -> None:
    """Not at the last step, which measures what the stage leaves; and it moves no bit."""
    task = {"kind": "toy_task", "every": 2}
    runs = [
        make_run(tmp_path, f"zero{stage}", stage=stage, stage_keys={"tasks": [task]})
        for stage in (1, 3)
    ]
    plain = make_run(tmp_path, "plain", model={"dropout": 0.1})
    measured = make_run(tmp_path, "m", model={"dropout": 0.1}, stage_keys={"tasks": [task]})
    for run in (*runs, plain, measured):
        train(run)
    first, second = (evaluated(run) for run in runs)
    assert list(first) == [2, 4, 6] and len({found[KEY] for found in first.values()}) == 3
    for step, found in first.items():
        assert found[KEY] == pytest.approx(second[step][KEY], rel=1e-4)
    assert losses(plain) == losses(measured)
    a, b = (toys.load_toy(run.folder) for run in (plain, measured))
    assert all(torch.equal(a[key], b[key]) for key in a)
