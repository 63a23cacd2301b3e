"""Held-out loss while a stage trains, and what follows: the best step, alarms, an early end.

It moves no bit of the training: other batches, networks in eval mode, generators that every step
seeds anew.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mm.errors import UserError
from mm.objectives.objective import AFTER_WARM_UP
from mm.run import BestBy, Run
from mm.trainer import forward_only
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.health.anomaly import append
from mm.trainer.held_out_batches import NO_SPLIT, HeldOutBatches, held_out_batches, held_out_data
from mm.trainer.log.metrics import LN2
from mm.trainer.stateful import CarriedStates

log = logging.getLogger("mm.trainer")

NEVER = "its eval_every is 0"
PATIENCE = 1 / 3  # share of a stage after which its held-out loss should be better than it is


class Best(NamedTuple):
    """The lowest held-out loss of a stage."""

    step: int
    loss: float


class HeldOut(Callback):
    """Adds ``val/...`` to the metrics of every `Stage.held_out_every`-th step and the last one.

    ``val/loss`` weighs the losses as ``loss/total`` does. ``val/<name>/loss`` are its parts: by
    modality in nats a token, beside ``loss_chance``, ``bits_per_byte`` and
    ``bits_per_byte_chance``, or a tokenizer's reconstruction losses. They are of the weights that
    train (an average that is exported is measured by the tasks).

    Its state is in the checkpoint: a resumed run, and one that goes back, decides as an unbroken
    one.

    Attributes:
        best: of the stage that trains.
        since: evaluations since then.
        ended: stage -> step at which it ended early.
        figures: of the newest evaluation.
    """

    def __init__(self, run: Run, is_main: bool):
        self.run, self.is_main = run, is_main
        self.stage = 0
        self.best: Best | None = None
        self.since = 0
        self.ended: dict[int, int] = {}
        self.figures: dict[str, float] = {}
        self.new_best = False  # in this step
        self._data: HeldOutBatches | None = None
        self._read = -1  # the stage that they are of
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "best": list(self.best) if self.best is not None else None,
            "since": self.since,
            "ended": {str(k): v for k, v in self.ended.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint; {} (one of an older version) begins anew."""
        best = state.get("best")
        self.stage, self.since = state.get("stage", 0), state.get("since", 0)
        self.best = Best(*best) if best else None
        self.ended = {int(k): v for k, v in state.get("ended", {}).items()}

    def ends(self) -> list[int]:
        """Steps of the run at which each stage ends: as planned, or sooner where it ended early."""
        out: list[int] = []
        for index, stage in enumerate(self.run.stages):
            early = self.ended.get(index)
            if index == self.stage and self.since < (stage.early_stop or math.inf):
                early = None  # it asks for more patience now
            out.append(early or (out[-1] if out else 0) + stage.budget.steps)
        return out

    def result(self) -> list[Any] | None:
        """Step and value of the last stage's best; with what it is, where that is no loss."""
        if self.best is None:
            return None
        by = self.run.stages[self.stage].best_by
        name, value = chosen_figure(by, self.best)
        return [self.best.step, value] if by is None else [self.best.step, value, name]

    def check(self, trainer: Training) -> None:
        for index in range(self.stage, len(self.run.stages)):
            stage = self.run.stages[index]
            if stage.best_by is not None:
                continue
            if not stage.held_out_every:
                self._refuse(index, NEVER)
            elif held_out_data(stage.data) is None:
                self._refuse(index, NO_SPLIT)

    def _refuse(self, index: int, why: str) -> None:
        """Raise UserError where a stage asks for what only held-out losses can say."""
        last = index == len(self.run.stages) - 1
        if self.run.stages[index].early_stop or (self.run.keeps_best and last):
            raise UserError(
                f"stages.{index}: early_stop, keep_best and export: best need held-out losses: "
                f"{why}"
            )

    def on_stage_start(self, trainer: Training) -> None:
        index = trainer.stage.index
        if index != self.stage:
            self.stage, self.best, self.since = index, None, 0
        if self._read == index:  # a return to a checkpoint
            return
        self._read, self._warned = index, set()
        config, found = self.run.stages[index], NEVER
        if config.held_out_every:
            found = held_out_batches(trainer.stage, trainer.vocabulary, lambda: trainer.tokenizers)
        self._data = None if isinstance(found, str) else found
        if not isinstance(found, str) or config.best_by is not None:
            return
        self._refuse(index, found)
        if config.held_out_every and self.is_main:
            log.info("stages.%d: no held-out loss while training: %s", index, found)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        stage, self.new_best = trainer.stage, False
        done, steps = step - stage.begin, stage.config.budget.steps
        if self._data is None or (done % stage.config.held_out_every and done != steps):
            return
        trainer.phase("held_out", step)
        self.figures = self._measure(trainer, self._data)
        metrics |= self.figures
        self._judge(step, done / steps)
        trainer.phase("report", step)

    def _measure(self, trainer: Training, data: HeldOutBatches) -> dict[str, float]:
        stage = trainer.stage
        env, objective = stage.env, stage.objective
        scheduled = objective.scheduled_held_out()
        env.begin(AFTER_WARM_UP, scheduled)
        carried = CarriedStates.of(data.carrying, stage.engines["model"], env.autocast())
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        with forward_only.in_eval_mode(stage, carried):
            for batches in data.steps:
                for into, new in zip(
                    (sums, counts), forward_only.losses(stage, batches, scheduled), strict=True
                ):
                    for name, value in new.items():
                        into[name] = into[name] + value if name in into else value
        n, means = _means(sums, counts)
        wanted = [k for k in objective.held_out(n) if k in means]
        own = objective.held_out(n)
        scales = objective.scales({k: v for k, v in n.items() if k in own})
        total = sum(float(scales[k]) * means[k] for k in wanted)
        out = {"val/loss": total}
        for name in wanted:
            out[f"val/{name}/loss"] = means[name]
            if name in data.chance:
                out[f"val/{name}/loss_chance"] = data.chance[name]
            if name in data.chance and name in data.bytes_per_token:
                size = LN2 * data.bytes_per_token[name]
                out[f"val/{name}/bits_per_byte"] = means[name] / size
                out[f"val/{name}/bits_per_byte_chance"] = data.chance[name] / size
        return out

    def _judge(self, step: int, share: float) -> None:
        """Move `best` and say once a stage what is wrong. The same on all ranks."""
        loss = self.figures["val/loss"]
        by_figure = self.run.stages[self.stage].best_by is not None
        if not by_figure:
            self.judge(step, loss, share)
        if share < PATIENCE:
            return
        for key, value in self.figures.items():
            name = key.removeprefix("val/").removesuffix("/loss")
            chance = self.figures.get(f"{key}_chance")
            if key.endswith("/loss") and chance is not None and value > chance:
                self._warn(
                    step,
                    f"{name} worse than chance",
                    f"held-out loss of {name} is {value:.4g} nats a token, worse than the "
                    f"{chance:.4g} of guessing: too few steps, or the training data are learnt by "
                    "heart",
                )
        steps = self.run.stages[self.stage].budget.steps
        if not by_figure and self.best is not None and step - self.best.step >= PATIENCE * steps:
            self._warn(
                step,
                "rising",
                f"held-out loss is {loss:.4g} and was best at step {self.best.step} "
                f"({self.best.loss:.4g}): since then the training data are learnt by heart",
            )

    def judge(self, step: int, loss: float, share: float) -> None:
        """Move `best`, and end the stage where it asks for that. The same on all ranks.

        Args:
            loss: what the best step has least of: the held-out loss, or a figure that counts so.
            share: of the stage's steps that are done.
        """
        if math.isfinite(loss) and (self.best is None or loss < self.best.loss):
            self.best, self.since, self.new_best = Best(step, loss), 0, True
        else:
            self.since += 1
        patience = self.run.stages[self.stage].early_stop
        if patience is not None and self.since >= patience and share < 1:
            self.ended[self.stage] = step
            if self.is_main:
                by = self.run.stages[self.stage].best_by
                value = chosen_figure(by, self.best)[1]
                best = f"since step {self.best.step} ({value:.4g})" if self.best else ""
                what = "held-out losses" if by is None else f"times {by.name}"
                log.info(
                    "stages.%d ends early at step %d: %d %s without a new best %s",
                    *(self.stage, step, self.since, what, best),
                )

    def _warn(self, step: int, what: str, text: str) -> None:
        if what in self._warned:
            return
        self._warned.add(what)
        if self.is_main:
            log.warning("step %d: %s", step, text)
            event = {"step": step, "event": f"held-out: {what}", "why": text}
            append(self.run.folder / "events.jsonl", event)


def chosen_figure(by: BestBy | None, best: Best | None) -> tuple[str, float]:
    """What the best step is chosen by, and its value; NaN without one."""
    loss = best.loss if best is not None else math.nan
    return ("held-out loss", loss) if by is None else (by.name, by.score(loss))


def _means(
    sums: Mapping[str, Tensor], counts: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Counts and means over all ranks, of what was counted. One collective."""
    names, counted = sorted(sums), sorted(counts)
    flat = torch.stack([*(sums[k] for k in names), *(counts[k] for k in counted)])
    if dist.get_world_size() > 1:
        dist.all_reduce(flat)
    n = dict(zip(counted, flat[len(names) :], strict=True))
    totals = dict(zip(names, flat.tolist(), strict=False))
    return n, {k: t / float(n[k]) for k, t in totals.items() if float(n[k]) > 0}
