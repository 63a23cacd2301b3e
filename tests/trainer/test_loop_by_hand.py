"""The loop between its steps: what it writes before the first one, and from stage to stage."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.batch import Batch
from mm.trainer import loop, ranks, state
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.health.heartbeat import Heartbeat
from mm.trainer.health.signals import Stop
from mm.trainer.log.tracker import Tracker
from mm.trainer.loop import Trainer
from mm.trainer.state import TrainState

CPU = torch.device("cpu")


def test_a_signal_between_two_stages_tells_the_step_that_was_not_begun(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer: Any = Trainer.__new__(Trainer)
    trainer.state, trainer._stop, trainer.device = SimpleNamespace(step=4), Stop(), CPU
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit), trainer._starting():
        trainer._stop._ask(15, None)
    assert "before step 5;" in caplog.text


def test_a_run_is_described_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its callbacks are in order: figures before the lines that have them."""
    monkeypatch.setattr(loop.folder, "_commit", lambda: None)
    trainer = Trainer(make_run(tmp_path))
    trainer.device, trainer.env = CPU, SimpleNamespace(precision="fp32")  # type: ignore[assignment]
    trainer._told, trainer._init_from = {"world": 1, "stages": []}, {"step": 7}
    trainer.folder.mkdir()
    before = list(trainer.callbacks)
    with contextlib.ExitStack() as stack:
        trainer._write_start(None, stack)
        heart, *rest = trainer.callbacks
        assert isinstance(heart, Heartbeat)
        n = len(trainer._figures)
        assert rest[:n] == before[:n] and rest[n + 2 :] == before[n:]
        assert rest[n] is trainer.file and isinstance(rest[n + 1], Tracker)
    read = lambda name: json.loads((trainer.folder / name).read_text())
    assert read("start.json") == {"world": 1, "stages": []}
    assert read("environment.json")["init_from"] == {"step": 7}
    assert (trainer.folder / "config.yaml").is_file() and trainer.file.path.is_file()


class Stages(Trainer):
    """Three stages that end at 2, 4 and 6, of steps that do nothing but count."""

    def __init__(self, step: int, tasks: tuple[int, int, int]) -> None:
        self.done: list[str] = []
        stages = [SimpleNamespace(tasks=t, ema=None) for t in tasks]
        self.run: Any = SimpleNamespace(stages=stages)
        self.held_out: Any = SimpleNamespace(ends=lambda: [2, 4, 6])
        self.state: Any = SimpleNamespace(step=step)
        self._build(loop.start.first_stage([2, 4, 6], step), None)

    def _build(self, index: int, snapshot: Snapshot | None) -> None:
        close = lambda: self.done.append(f"close {index}")
        self.state.stage = SimpleNamespace(index=index, close=close, nets=["model"])

    def _enter(self, index: int, snapshot: Snapshot | None) -> None:
        assert snapshot is not None
        self.done.append(f"stage {index} from {snapshot.state['step']}")
        self._build(index, snapshot)

    def _starting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _train(self) -> Snapshot | None:
        if self.step == self.stage_end:
            return None
        self.state.step = self.stage_end
        return saved(self.step)

    def _evaluate(self, index: int, left: Snapshot | None = None) -> None:
        assert left is not None
        self.done.append(f"tasks of {index} on {left.state['step']}")


def saved(step: int) -> Snapshot:
    """With an optimizer's state, and a network that the stage has not."""
    table = {"w": torch.tensor([float(step)])}
    return Snapshot({"step": step, "stage": 0}, {"model": table, "model.optimizer": {}, "x": table})


@pytest.mark.parametrize(
    "step, tasks, done",
    [
        (0, (1, 0, 1), "close 0; tasks of 0 on 2; stage 1 from 2; close 1; stage 2 from 4; "),
        (2, (1, 1, 1), "tasks of 0 on 2; close 1; tasks of 1 on 4; stage 2 from 4; "),
        (3, (1, 0, 0), "close 1; stage 2 from 4; "),
        (6, (1, 1, 1), ""),
    ],
)
def test_tasks_of_a_stage_run_once_where_it_ended(
    step: int, tasks: tuple[int, int, int], done: str
) -> None:
    """Those of the last run on the saved model, later; those of one long past were run."""
    trainer = Stages(step, tasks)
    begun = saved(step) if step else None
    last = trainer._train_stages(begun)
    assert "; ".join(trainer.done) == f"{done}close 2"
    assert last.state["step"] == 6 and last.tensors("model")["w"].tolist() == [6.0]
    assert set(last.files) == {"model"}


@pytest.mark.parametrize("share, rows", [(None, [0, 1, 2, 3]), (2, [0, 2])])
def test_a_save_has_the_rows_of_all_ranks_that_read_their_own(
    monkeypatch: pytest.MonkeyPatch, share: int | None, rows: list[int]
) -> None:
    """Those of ranks that share rows once; what is saved is of this moment."""
    monkeypatch.setattr(ranks, "merge_states", lambda states: [s["rows"] for s in states])
    monkeypatch.setattr(state, "collect", lambda stage: ({}, {}))
    monkeypatch.setattr(state.resume_check, "keep", lambda stage, step, batch: ({}, {}))
    figures: Any = SimpleNamespace(skipped=0, totals={"text": [1]}, state_dict=dict)
    data = {"rows": [5]}
    sequence = SimpleNamespace(size=share) if share is not None else None
    stage: Any = SimpleNamespace(
        index=1,
        stream=SimpleNamespace(state_dict=lambda: data),
        env=SimpleNamespace(seed=3, sequence=sequence),
        from_folders={},
    )
    made = TrainState(figures, figures, figures, step=4, stage=stage)
    moment = made.save({"world": 4}, Batch.of_ids(torch.zeros(1, 1, dtype=torch.int64)))
    data["rows"].append(6)
    figures.totals["text"].append(2)
    kept = ("step", "stage", "world", "data", "bytes_per_token")
    want = [4, 1, 4, {"rows": [5]}, {"text": [1]}]
    assert [moment.state[key] for key in kept] == want
    assert moment.merge([{"rows": n} for n in range(1, 5)]) == [1 + n for n in rows]
