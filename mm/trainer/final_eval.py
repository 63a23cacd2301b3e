"""Tasks on what a stage leaves, and whether a run is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.run import Run
from mm.tasks.base import by_name
from mm.trainer.health.signals import Interrupted, Stop
from mm.trainer.log import metrics
from mm.trainer.stage import load_weights, make_module
from mm.vocabulary import Vocabulary

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
    return was_evaluated(run, len(run.stages) - 1, step)


def was_evaluated(run: Run, index: int, step: int) -> bool:
    """Whether the tasks of stage ``index``, which ended at ``step``, have nothing left to do."""
    if not run.evaluate or not run.stages[index].tasks:
        return True
    path = run.folder / "metrics.jsonl"
    rows = metrics.read(path) if path.is_file() else []
    return any(k.startswith("eval/") for row in rows if row["step"] >= step for k in row)


def evaluate(
    run: Run,
    index: int,
    stop: Stop,
    weights: Mapping[str, Tensor] | None = None,
    vocabulary: Vocabulary | None = None,
    tokenizers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of the tasks of stage ``index``, by ``eval/<task>/<figure>``.

    A signal leaves it at once with none: a resumed run does it again.

    Args:
        weights: what the stage left, with the run's vocabulary and tokenizers; default the model
            that the run saved.
    """
    from mm.decoders.generate import Generator

    out: dict[str, Any] = {}
    try:
        with stop.at_once():
            if weights is None or vocabulary is None:
                generator = Generator.from_pretrained(run.folder / "model")
            else:
                module = make_module(run.model, vocabulary, run.seed, torch.device("cpu"))
                load_weights(module, weights, f"stage {index}")
                generator = Generator(module.eval(), vocabulary, tokenizers or {})
            for name, config in by_name(run.stages[index].tasks).items():
                figures = config.build().evaluate(generator, seed=run.seed)
                out |= {f"eval/{name}/{k}": v for k, v in figures.items()}
    except Interrupted:
        log.warning("stopped by a signal in the evaluation; run the same command to do it")
        return {}
    return out
