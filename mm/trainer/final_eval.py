"""Tasks on what a stage leaves, and whether a run is done."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mm.run import Run
from mm.tasks.base import by_name
from mm.trainer.callbacks.base import Training
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.export import mark
from mm.trainer.health.signals import Interrupted, Stop
from mm.trainer.log import metrics
from mm.trainer.stage import load_weights, make_module

log = logging.getLogger("mm.trainer")


def is_done(run: Run, step: int, steps: int) -> bool:
    """True when all ``steps`` are done, the model of the last is saved and its tasks were run."""
    saved = run.folder / "model.step"
    if step < steps or not (run.folder / "model" / "config.json").is_file():
        return False
    if saved.is_file() and saved.read_text() != mark(run, step):
        return False  # a longer run was killed before its model was saved, or another is asked for
    return was_evaluated(run, len(run.stages) - 1, step)


def was_evaluated(run: Run, index: int, step: int) -> bool:
    """Whether the tasks of stage ``index``, which ended at ``step``, have nothing left to do."""
    if not run.evaluate or not run.stages[index].tasks:
        return True
    path = run.folder / "metrics.jsonl"
    rows = metrics.read(path) if path.is_file() else []
    return any(k.startswith("eval/") for row in rows if row["step"] >= step for k in row)


def of_stage(trainer: Training, index: int, stop: Stop, left: Snapshot | None) -> dict[str, Any]:
    """Figures of the tasks of stage ``index``, by ``eval/<task>/<figure>``.

    Of the model that the run saved; or of what the stage ``left``, if they are not in metrics.jsonl
    yet. A signal leaves it at once with none: a resumed run does it again.
    """
    from mm.decoders.generate import Generator

    run, out = trainer.run, dict[str, Any]()
    if not run.evaluate or not run.stages[index].tasks:
        return {}
    if left is not None and was_evaluated(run, index, trainer.step):
        return {}
    try:
        with stop.at_once():
            if left is None or trainer.vocabulary is None:
                generator = Generator.from_pretrained(run.folder / "model")
            else:
                module = make_module(run.model, trainer.vocabulary, run.seed, torch.device("cpu"))
                load_weights(module, left.tensors("model"), f"stage {index}")
                generator = Generator(module.eval(), trainer.vocabulary, trainer.tokenizers)
            for name, config in by_name(run.stages[index].tasks).items():
                figures = config.build().evaluate(generator, seed=run.seed)
                out |= {f"eval/{name}/{k}": v for k, v in figures.items()}
    except Interrupted:
        log.warning("stopped by a signal in the evaluation; run the same command to do it")
        return {}
    return out
