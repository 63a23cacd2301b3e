"""Tasks on the saved model, and whether a run is done."""

from __future__ import annotations

import logging

from mm.run import Run
from mm.trainer.health.signals import Interrupted, Stop
from mm.trainer.log import metrics

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


def evaluate(run: Run, stop: Stop) -> dict[str, float]:
    """Figures of the last stage's tasks on the saved model, by ``eval/<task>/<figure>``.

    A signal leaves it at once with none: a resumed run does it again.
    """
    from mm.decoders.generate import Generator

    out: dict[str, float] = {}
    try:
        with stop.at_once():
            generator = Generator.from_pretrained(run.folder / "model")
            for config in run.stages[-1].tasks:
                figures = config.build().evaluate(generator, seed=run.seed)
                out |= {f"eval/{config.kind}/{k}": v for k, v in figures.items()}
    except Interrupted:
        log.warning("stopped by a signal in the evaluation; run the same command to do it")
        return {}
    return out
