"""Tasks while a stage trains: those with `every`, on the weights that train."""

from __future__ import annotations

import logging
from typing import Any

from mm.errors import UserError
from mm.tasks.base import Task, by_name
from mm.tasks.run import measure, wait_for_all
from mm.trainer.callbacks.base import Callback, Training

log = logging.getLogger("mm.trainer")

PROBLEM = "problem"  # in place of a figure


class TasksWhileTraining(Callback):
    """Adds ``eval/<task>/<figure>`` to the metrics of the steps that a task asks for.

    The ranks take the tasks from one list. Not of a stage's last step: its end measures what it
    leaves.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def on_stage_start(self, trainer: Training) -> None:
        self._tasks = by_name(trainer.stage.config.tasks)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        done = step - trainer.stage.begin
        due = {k: t for k, t in self._tasks.items() if t.every and done % t.every == 0}
        if not due or trainer.vocabulary is None or step == trainer.stage_end:
            return
        from mm.decoders.generate import Generator

        trainer.phase("evaluate", step)
        with trainer.unsharded() as module:
            generator = Generator(module, trainer.vocabulary, trainer.tokenizers)

            def figures_of(task: Task) -> dict[str, Any]:
                try:
                    return task.build().evaluate(generator, seed=trainer.run.seed)
                except UserError as error:  # such as logits that are not finite yet
                    return {PROBLEM: str(error)}

            for n, found in measure(list(due.values()), figures_of):
                name, figures = list(due)[n], found["figures"]
                if PROBLEM in figures:
                    log.warning("step %d: task %s: %s", step, name, figures[PROBLEM])
                    continue
                metrics |= {f"eval/{name}/{k}": v for k, v in figures.items()}
            wait_for_all()  # a rank without a task would time out in the next collective
        trainer.phase("report", step)
