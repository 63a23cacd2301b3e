"""After the last step: the saved model, its tasks, and whether a run is done."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.run import Run
from mm.trainer import metrics, networks
from mm.trainer.signals import Interrupted, Stop

if TYPE_CHECKING:
    from mm.trainer.trainer import Trainer

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


def export(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """Save the model from its full fp32 weights as ``<run folder>/model``; the main rank does."""
    if not trainer.is_main:
        return
    run, folder = trainer.run, trainer.folder
    module = networks.make_module(run.model, trainer.vocabulary, run.seed, torch.device("cpu"))
    networks.load_weights(module, weights, "the trained model")
    part = folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    saving: Any = module.eval()
    saving.save_pretrained(part, vocabulary=trainer.vocabulary, tokenizers=dict(run.tokenizers))
    shutil.rmtree(folder / "model", ignore_errors=True)
    part.rename(folder / "model")
    (folder / "model.step").write_text(str(trainer.step))


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
