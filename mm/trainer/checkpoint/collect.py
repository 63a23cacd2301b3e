"""What a checkpoint of a trainer holds, and how it goes on from one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor

from mm.trainer import stateful as lanes
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import resume_check as probe
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.log.metrics import BytesPerToken

if TYPE_CHECKING:
    from mm.trainer.loop import Trainer


def collect(trainer: Trainer) -> Snapshot:
    """State as JSON, and full tensors on the CPU, by file: weights and optimizer states.

    Nothing in it changes when training goes on. Call on all ranks.
    """
    files: dict[str, dict[str, Tensor]] = {}
    scalars = {}
    for name, engine in trainer.engines.items():
        files[name] = engine.weights()
        files[f"{name}.optimizer"], scalars[name] = engine.optimizer_state()
    for name, module in trainer.frozen.items():
        files[name] = {k: v.to("cpu", copy=True) for k, v in module.state_dict().items()}
    if trainer.nets.lanes is not None:
        files[lanes.FILE] = trainer.nets.lanes.saved()
    kept, files[probe.FILE] = probe.keep(trainer)
    state = {
        "step": trainer.step,
        "stage": trainer.index,
        "skipped": trainer.guard.skipped,
        "guard": trainer.guard.state_dict(),
        "data": trainer.stream.state_dict(),
        "optimizers": scalars,
        "world": trainer.world,
        "vocabulary": trainer.vocabulary.fingerprint if trainer.vocabulary is not None else None,
        "config": trainer.run.to_dict(),
        "tracker": trainer.tracker.id,
        "bytes_per_token": trainer.bytes_per_token.totals,
        "rng": {
            "seed": trainer.run.seed,
            "rule": "every generator is seeded by (seed, step, rank)",
        },
        probe.FILE: kept,
    }
    return Snapshot(copy.deepcopy(state), files)


def resume(trainer: Trainer) -> checkpoint.Saved | None:
    """The newest good checkpoint, checked against the run; step, guard and counts are set to it.

    Raises UserError when the run cannot go on from it.
    """
    saved = checkpoint.newest(trainer.folder / "checkpoints")
    if saved is None:
        return None
    mine = trainer.vocabulary.fingerprint if trainer.vocabulary is not None else None
    saved.require(trainer.run.to_dict(), mine)
    trainer.step = saved.state["step"]
    if "guard" in saved.state:
        trainer.guard.load_state_dict(saved.state["guard"])
    trainer.bytes_per_token = BytesPerToken(saved.state["bytes_per_token"])
    return saved
