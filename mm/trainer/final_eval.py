"""Tasks on what a stage leaves, and whether a run is done."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mm.errors import UserError
from mm.run import Run
from mm.tasks.base import by_name
from mm.tasks.run import give_up, measure, wait_for_all
from mm.trainer.begin_weights import load_weights
from mm.trainer.callbacks.base import Training
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.export import mark
from mm.trainer.health.signals import Interrupted, Stop
from mm.trainer.log import metrics
from mm.trainer.ranks import on_any
from mm.trainer.stage import make_module
from mm.trainer.stage_model import model_of

if TYPE_CHECKING:
    from mm.decoders.generate import Generator

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
    """Figures of the tasks of stage ``index``, by ``eval/<task>/<figure>``. Call on all ranks.

    Of the model that the run saved; or of what the stage ``left``, if they are not in metrics.jsonl
    yet. The ranks take tasks from one list, each on its device; what a task finds does not depend
    on who does it. Nobody waits in a collective. The main rank gets the figures, the others none. A
    signal leaves it at once with none: a resumed run does it again.

    Raises UserError on all ranks where a task fails on one.
    """
    run = trainer.run
    if not run.evaluate or not run.stages[index].tasks:
        return {}
    if left is not None:
        done = trainer.is_main and was_evaluated(run, index, trainer.step)
        if on_any(done, trainer.device):
            return {}
    named = by_name(run.stages[index].tasks)
    out: dict[str, Any] = {}
    problem: UserError | None = None
    interrupted = False
    try:
        with stop.at_once():
            generator = _generator(trainer, index, left)
            each = lambda task: task.build().evaluate(generator, seed=run.seed)
            for n, found in measure(list(named.values()), each):
                figures = found["figures"]
                out |= {f"eval/{list(named)[n]}/{k}": v for k, v in figures.items()}
    except Interrupted:
        interrupted = True
        give_up()
    except UserError as error:
        problem = error
    wait_for_all()
    if on_any(problem is not None, trainer.device):
        raise problem or UserError(
            f"{trainer.folder}: a task failed on another process, which says why"
        )
    if on_any(interrupted, trainer.device):
        log.warning("stopped by a signal in the evaluation; run the same command to do it")
        return {}
    return out


def _generator(trainer: Training, index: int, left: Snapshot | None) -> Generator:
    """The model to evaluate, on this rank's device."""
    from mm.decoders.generate import Generator

    run = trainer.run
    if left is None or trainer.vocabulary is None:
        return Generator.from_pretrained(run.folder / "model", trainer.device)
    module = make_module(model_of(run, index), trainer.vocabulary, run.seed, trainer.device)
    load_weights(module, left.tensors("model"), f"stage {index}")
    return Generator(module.eval(), trainer.vocabulary, trainer.tokenizers)
