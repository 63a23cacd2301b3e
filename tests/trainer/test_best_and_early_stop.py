"""What follows from held-out losses: the best checkpoint, its export, alarms, an early end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_toys as toys
from pydantic import ValidationError
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.decoders.generate import Generator
from mm.errors import UserError
from mm.run import BestBy, Run
from mm.trainer.callbacks import best_by
from mm.trainer.held_out import HeldOut
from mm.trainer.loop import train

EVERY_STEP = {"eval_every": 1, "eval_batches": 1}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Held-out losses by step, in place of measured ones: decisions alone are tried here."""
    given: list[float] = []

    def measure(self: HeldOut, trainer: Any, data: Any) -> dict[str, float]:
        loss = given[trainer.step - 1]
        return {"val/loss": loss, "val/text/loss": loss, "val/text/loss_chance": 3.0}

    monkeypatch.setattr(HeldOut, "_measure", measure)
    yield given


def kept(run: Run) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run.folder / "checkpoints").glob("step_*"))


def tensors(run: Run, step: int) -> dict[str, torch.Tensor]:
    folder = run.folder / "checkpoints" / f"step_{step:06d}"
    return toys.load_file(str(folder / "model.safetensors"))


def exported_step(run: Run, steps: Sequence[int]) -> int:
    """The kept checkpoint whose weights the saved model has."""
    model = toys.load_toy(run.folder)
    (found,) = [
        s for s in steps if all(torch.equal(t, model[k]) for k, t in tensors(run, s).items())
    ]
    return found


def test_the_best_checkpoint_stays_and_is_exported(
    tmp_path: Path, script: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mm.trainer")
    script += [4.0, 2.0, 2.5, 2.2, 2.6, 2.7]
    change = {"checkpoints": {"every": 2, "keep_last": 1}, "stage_keys": EVERY_STEP}
    run = make_run(tmp_path, **change)
    train(run)
    assert kept(run) == [6]
    best = make_run(tmp_path, "best", **change)
    best = Run.model_validate(best.to_dict() | {"export": "best"})
    train(best)
    assert kept(best) == [2, 6]
    assert (best.folder / "checkpoints" / "best").read_text() == "step_000002"
    assert exported_step(best, [2, 6]) == 2
    assert "step 2, the best held-out loss (2)" in caplog.text
    assert train(best)["new_steps"] == 0 and exported_step(best, [2, 6]) == 2
    last = best.model_copy(update={"export": "last"})
    assert train(last)["new_steps"] == 0 and exported_step(best, [2, 6]) == 6


def test_a_new_best_is_saved_between_the_save_points(tmp_path: Path, script: list[float]) -> None:
    script += [4.0, 3.0, 2.0, 2.2, 2.6, 2.7]
    keep = {"every": 0, "keep_last": 1, "keep_best": True, "background": True}
    run = make_run(tmp_path, checkpoints=keep, stage_keys=EVERY_STEP)
    train(run)
    assert kept(run) == [3, 6] and exported_step(run, [3, 6]) == 6


def test_a_stage_ends_early_and_knows_it(
    tmp_path: Path, script: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mm.trainer")
    script += [4.0, 2.0, 2.5, 2.2, 1.0, 1.0]
    run = make_run(tmp_path, stage_keys=EVERY_STEP | {"early_stop": 2})
    out = train(run)
    assert out["step"] == 4 and [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert "stages.0 ends early at step 4: 2 held-out losses without a new best" in caplog.text
    assert kept(run) == [3, 4] and exported_step(run, [3, 4]) == 4
    again = train(run)
    assert again["new_steps"] == 0 and "nothing to do" in caplog.text
    patient = make_run(tmp_path, stage_keys=EVERY_STEP | {"early_stop": 3})
    assert train(patient)["step"] == 6  # more patience: it goes on
    whole = make_run(tmp_path, "whole", stage_keys=EVERY_STEP)
    train(whole)
    assert losses(run) == losses(whole)


def test_the_best_step_by_a_tasks_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is exported, and ends the stage, whatever the held-out loss says."""
    caplog.set_level("INFO", "mm.trainer")
    figures = iter([0.1, 0.9, 0.2, 0.3, 0.5])
    found = lambda self, generator, seed=0: {"accuracy": next(figures)}
    monkeypatch.setattr(toys.ToyTaskConfig, "evaluate", found)
    tasks = [{"kind": "toy_task", "name": "toys", "every": 1}]
    by = {"task": "toys", "figure": "accuracy"}
    keys = {"tasks": tasks, "best_by": by, "early_stop": 2, "eval_every": 0}
    run = make_run(tmp_path, steps=9, stage_keys=keys)
    run = Run.model_validate(run.to_dict() | {"export": "best", "evaluate": False})
    out = train(run)
    assert out["step"] == 4 and out["best"] == [2, 0.9, "toys/accuracy"]
    assert exported_step(run, kept(run)) == 2
    assert "2 times toys/accuracy without a new best since step 2 (0.9)" in caplog.text
    assert "exported: step 2, the best toys/accuracy (0.9)" in caplog.text

    figures = iter([0.5, 0.1, 0.2])
    low = keys | {"best_by": by | {"goal": "lowest"}, "early_stop": None}
    run = make_run(tmp_path, "low", steps=4, stage_keys=low)
    out = train(Run.model_validate(run.to_dict() | {"evaluate": False}))
    assert out["best"] == [2, 0.1, "toys/accuracy"]
    refused = (
        ({"task": "toy"}, "no task 'toy' with `every`"),
        ({"figure": "wer"}, "no figure 'wer'"),
    )
    for n, (change, line) in enumerate(refused):
        figures = iter([0.5, 0.1, 0.2])
        bad = make_run(tmp_path, f"bad{n}", stage_keys=keys | {"best_by": by | change})
        with pytest.raises(UserError, match=line):
            train(bad)


def test_the_next_stage_begins_where_one_ended_early(
    tmp_path: Path, script: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps, its schedule and its tasks; also in a run that resumes."""
    monkeypatch.setattr(Generator, "from_pretrained", toys.load_saved)
    script += [2.0, 3.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.2]
    keys = EVERY_STEP | {"early_stop": 1, "tasks": [{"kind": "toy_task", "every": 2}]}
    one = make_run(tmp_path, "two", steps=4, stage_keys=keys).to_dict()
    second = one["stages"][0] | {"early_stop": None}
    second["data"] = second["data"] | {"signal_at": 0}
    run = Run.model_validate(one | {"stages": [one["stages"][0], second]})
    with pytest.raises(SystemExit):
        train(run)
    assert [row["step"] for row in rows(run)] == [1, 2, 2, 3]  # two: a row of its tasks
    out = train(run)
    assert out["resumed_from"] == 3 and out["step"] == 6
    rates = [row["optim/lr"] for row in rows(run) if "optim/lr" in row]
    assert rates[2:] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])  # a warm-up of its own
    measured = [r["step"] for r in rows(run) if any(k.startswith("eval/") for k in r)]
    assert measured == [2, 4, 6]
    assert train(run)["new_steps"] == 0


def test_a_figure_is_judged_when_its_task_is_due_in_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage of 8 steps begins after 3: the task of every second step is due at 5, 7 and 9.

    At 11, its last step, it is measured after training.
    """
    monkeypatch.setattr(best_by.dist, "get_world_size", lambda: 1)
    judged: list[tuple[int, float, float]] = []
    judge: Any = SimpleNamespace(judge=lambda *given: judged.append(given))
    by = BestBy(task="a", figure="accuracy")
    config = SimpleNamespace(
        best_by=by,
        tasks=[SimpleNamespace(full_name="a", every=2)],
        budget=SimpleNamespace(steps=8),
    )
    stage = SimpleNamespace(config=config, begin=3)
    trainer: Any = SimpleNamespace(stage=stage, stage_end=11, device=torch.device("cpu"))
    callback = best_by.BestByFigure(None, judge)  # type: ignore[arg-type]
    for step in range(4, 12):
        callback.post_step(trainer, step, {"eval/a/accuracy": step / 16})
    assert judged == [(5, -5 / 16, 0.25), (7, -7 / 16, 0.5), (9, -9 / 16, 0.75)]


def test_alarms_below_chance_and_when_it_rises(
    tmp_path: Path, script: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    script += [9.0, 2.0, 2.5, 3.1, 3.2, 3.3]
    run = make_run(tmp_path, stage_keys=EVERY_STEP)
    train(run)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said  # each once
    assert "step 4: held-out loss of text is 3.1 nats a token, worse than the 3" in said[0]
    assert "step 4: held-out loss is 3.1 and was best at step 2 (2)" in said[1]
    events = [json.loads(x) for x in (run.folder / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["held-out: text worse than chance", "held-out: rising"]


def test_what_needs_held_out_losses_is_refused_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError, match="early_stop: it needs held-out losses"):
        make_run(tmp_path, stage_keys={"eval_every": 0, "early_stop": 2})
    with pytest.raises(UserError, match="need held-out losses: its eval_every is 0"):
        train(make_run(tmp_path, checkpoints={"keep_best": True}))
    monkeypatch.setattr(toys.ToyStreamConfig, "held_out", lambda self, split: None)
    with pytest.raises(UserError, match="--val-share"):
        train(make_run(tmp_path, stage_keys={"eval_every": 1, "early_stop": 2}))
    assert not [*tmp_path.rglob("config.yaml")]  # a refusal writes nothing
