"""Tasks on the saved model, and whether a run is done."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mm.run import Run
from mm.trainer.health.signals import Interrupted, Stop
from mm.trainer.log import metrics

if TYPE_CHECKING:
    from mm.trainer.loop import Trainer

log = logging.getLogger("mm.trainer")


def is_done(run: Run, step: int) -> bool:
    """True when all steps are done, the model of the last is saved and its tasks were run."""
    mark = run.folder / "model.step"
    if step < sum(stage.budget.steps for stage in run.stages):
        return False
    if not (run.folder / "model" / "config.json").is_file():
        return False
    if mark.is_file() and mark.read_text() != str(step):
        return False  # a longer run was killed before its model was saved
    if not run.evaluate or not run.stages[-1].tasks:
        return True
    rows = metrics.read(run.folder / "metrics.jsonl")
    return any(k.startswith("eval/") for row in rows if row["step"] >= step for k in row)


def evaluate(trainer: Trainer, stop: Stop) -> dict[str, Any]:
    """Run the last stage's tasks on the saved model; one ``eval/...`` line in metrics.jsonl.

    A signal leaves it at once, with nothing written: a resumed run does it again.
    """
    run = trainer.run
    tasks = run.stages[-1].tasks
    if not tasks or not run.evaluate or not trainer.is_main:
        return {}
    from mm.decoders.generate import Generator

    out: dict[str, Any] = {}
    try:
        with stop.at_once():
            generator = Generator.from_pretrained(trainer.folder / "model")
            for config in tasks:
                figures = config.build().evaluate(generator, seed=run.seed)
                out |= {f"eval/{config.kind}/{k}": v for k, v in figures.items()}
    except Interrupted:
        log.warning("stopped by a signal in the evaluation; run the same command to do it")
        return {}
    trainer.file.write({"step": trainer.step, **out})
    trainer.tracker.log(out, trainer.step)
    return out
