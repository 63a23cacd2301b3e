"""A few steps of the trainer as rank 0 of many, over a fake process group: one process of its own.

``python -m mm.plan.rehearsal CONFIG FILE PROCESSES [KEY=VALUE ...]``. The trainer, the engine and
the data are those of the run. Collectives of torch's fake backend move nothing: a sum keeps this
rank's part, a gather repeats it. So shapes, memory and the rank's own work are those of the run,
and losses are not.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.batch import Batch
from mm.config import places_from
from mm.errors import UserError
from mm.plan.tally import Measure
from mm.run import Run
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.engine.deepspeed import Engine
from mm.trainer.loop import Trainer

COUNTED = 2  # the first step makes the optimizer's states, the second is counted
STEPS = 5  # the others are timed


class Rehearsed(Exception):
    """All steps of the rehearsal are done."""


class Checks(Callback):
    """What another callback checks before the first step, and nothing else of it."""

    def __init__(self, of: Callback):
        self.check = of.check


class ReadsHeldOut(Checks):
    """Also reads the held-out split, as the run does."""

    def __init__(self, of: Callback):
        super().__init__(of)
        self.on_stage_start = of.on_stage_start


class Watch(Callback):
    """Measures the steps, and ends them.

    Attributes:
        found: figures of the rehearsal, once it is over.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._measure = Measure()
        self._counting = ExitStack()
        self._seconds: list[float] = []
        self._waited: list[float] = []
        self._tokens: list[int] = []
        self._shapes: list[dict[str, list[int]]] = []
        self._skipped = 0

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        self._tokens.append(sum(int((b.layout.fields.document > 0).sum()) for b in batches))
        self._shapes = [shapes(b) for b in batches]
        if trainer.step + 1 == COUNTED:
            self._counting.enter_context(self._measure)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        self._counting.close()
        norms = [v for k, v in metrics.items() if k.endswith("/grad_norm")]
        self._skipped += any(v == float("inf") for v in norms)
        if step > COUNTED:
            self._seconds.append(metrics["perf/step_seconds"])
            self._waited.append(metrics["data/wait_seconds"])
        if step == STEPS:
            self.found = self._figures(trainer)
            raise Rehearsed

    def on_end(self, trainer: Training) -> None:
        self._counting.close()

    def _figures(self, trainer: Training) -> dict[str, Any]:
        stage, world = trainer.stage, dist.get_world_size()
        groups = world // trainer.run.engine.sequence  # that have rows of their own
        data, mine = stage.config.data, statistics.fmean(self._tokens)
        rows = getattr(data, "batch_size", None)
        out = {
            "processes": world,
            "device": str(trainer.device),
            "precision": stage.env.precision,
            "threads": torch.get_num_threads(),
            "zero_stage": trainer.run.engine.effective_zero_stage,
            "parameters": stage.parameters,
            "shapes": self._shapes,
            "rows": rows and rows // groups,
            "rows_of_all": rows,
            "tokens": mine,
            "tokens_of_all": mine * groups,  # as if all ranks had as many
            "step_seconds": statistics.median(self._seconds),
            "data_seconds": statistics.median(self._waited),
            "peak_tensor_bytes": self._measure.live.peak,
            "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "collectives": dict(self._measure.collectives),
            "cut": bytes_held(stage.engines.values()),
            "steps": STEPS,
            "steps_not_applied": self._skipped,
            "stages": len(trainer.run.stages),
        }
        if trainer.device.type == "cuda":
            out["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
            out["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(trainer.device)
        return out


def shapes(batch: Batch) -> dict[str, list[int]]:
    """``ids`` (B, T, S) and the values of each modality (G, L, ...)."""
    found = {"ids": list(batch.ids.shape)}
    return found | {name: list(v.data.shape) for name, v in batch.values.items()}


def bytes_held(engines: Iterable[Engine]) -> dict[str, dict[str, int]]:
    """Bytes that this rank holds between two steps, and that one process alone would hold.

    Weights, and the optimizer with its masters and averages.
    """
    size = lambda x: x.numel() * x.element_size()
    out = {part: {"rank": 0, "whole": 0} for part in ("weights", "optimizer")}
    for engine in engines:
        trained = [p for _, p in engine.trainable()]
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        for p in engine.raw.parameters():
            part = getattr(p, "ds_tensor", None)  # of ZeRO stage 3; a small parameter stays whole
            out["weights"]["rank"] += size(p) + (size(part) if part is not None else 0)
            out["weights"]["whole"] += getattr(p, "ds_numel", p.numel()) * p.element_size()
        masters = list(engine.shards.spans)
        here = sum(size(x) for x in masters if engine.zero_stage)
        for x in masters:
            states = (v for v in engine.states(x).values() if isinstance(v, torch.Tensor))
            here += sum(map(size, states))
        out["optimizer"]["rank"] += here
        out["optimizer"]["whole"] += here * elements // max(1, sum(x.numel() for x in masters))
    return out


def rehearse(run: Run, origin: str, processes: int, out: Path) -> dict[str, Any]:
    """Build and step the first stage of a run as rank 0; what it writes goes below ``out``.

    Raises UserError as the run would.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for sink in run.tracking.sinks:
        sink.check()
    first = run.stages[0]
    steps = max(first.budget.steps, STEPS + 1)  # its end would save
    first = first.model_copy(update={"budget": first.budget.model_copy(update={"steps": steps})})
    run = run.model_copy(
        update={
            "out": out,
            "stages": (first, *run.stages[1:]),
            "tracking": run.tracking.model_copy(update={"sinks": ()}),
            "checkpoints": run.checkpoints.model_copy(update={"every": 0}),
        }
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    watch = Watch()
    with places_from(run, origin):
        trainer = Trainer(run)
        held_out = trainer.held_out
        quiet = (ReadsHeldOut(c) if c is held_out else Checks(c) for c in trainer.callbacks)
        trainer.callbacks = [*quiet, watch]
        try:
            trainer.fit()
        except Rehearsed:
            pass
    return watch.found


def main(config: str, file: str, processes: int, changes: Sequence[str]) -> None:
    """Write the figures to ``file``; {"error": line} of the input, {"crash": line} of a fault."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        found = rehearse(Run.load(config, changes), config, processes, Path(file).parent)
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:
        if os.environ.get("MM_DEBUG"):
            raise
        text = " ".join(str(error).split())
        found = {"crash": f"{type(error).__name__}: {text}; its traceback: MM_DEBUG=1"}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    Path(file).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
