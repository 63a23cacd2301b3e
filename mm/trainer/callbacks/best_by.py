"""The best step by a task's figure, in place of the held-out loss."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mm.errors import UserError, did_you_mean
from mm.run import BestBy, Run
from mm.tasks.base import by_name
from mm.trainer.callbacks.base import Callback, Training


class Judge(Protocol):
    """Who keeps the best step (`HeldOut`)."""

    def judge(self, step: int, loss: float, share: float) -> None: ...


class BestByFigure(Callback):
    """Judges each step at which the task of `Stage.best_by` was measured; behind the tasks."""

    def __init__(self, run: Run, judge: Judge):
        self.run, self.held_out = run, judge

    def check(self, trainer: Training) -> None:
        for index, stage in enumerate(self.run.stages):
            if stage.best_by is None:
                continue
            tasks = by_name(stage.tasks)
            task = tasks.get(stage.best_by.task)
            if task is None or not task.every:
                near = did_you_mean(stage.best_by.task, tasks)
                raise UserError(
                    f"stages.{index}.best_by: no task '{stage.best_by.task}' with `every` in this "
                    f"stage{near}"
                )

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        stage = trainer.stage
        by, done = stage.config.best_by, step - stage.begin
        if by is None or step == trainer.stage_end:
            return
        task = by_name(stage.config.tasks)[by.task]
        if not task.every or done % task.every:
            return
        value = torch.tensor([_score(by, metrics)], dtype=torch.float64, device=trainer.device)
        if dist.get_world_size() > 1:  # the first process alone has the figures
            dist.broadcast(value, 0)
        self.held_out.judge(step, float(value), done / stage.config.budget.steps)


def _score(by: BestBy, metrics: dict[str, Any]) -> float:
    """Less is better; NaN where the task found nothing, or this process did not measure it."""
    names = [k for k in metrics if k.startswith(f"eval/{by.task}/")]
    value = metrics.get(f"eval/{by.task}/{by.figure}", math.nan)
    if names and not isinstance(value, (int, float)):
        raise UserError(f"best_by.figure: eval/{by.task}/{by.figure} is no number")
    if names and math.isnan(value):
        short = [name.removeprefix(f"eval/{by.task}/") for name in names]
        raise UserError(
            f"best_by.figure: task '{by.task}' has no figure '{by.figure}', it has: "
            f"{', '.join(sorted(short))}"
        )
    return by.score(float(value))
