"""What a checkpoint of a trainer holds, and how it goes on from one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm.trainer import stateful as lanes
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import resume_check as probe
from mm.trainer.log.metrics import BytesPerToken

if TYPE_CHECKING:
    from mm.trainer.loop import Trainer

Networks = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]


def collect(trainer: Trainer) -> tuple[dict[str, Any], Networks]:
    """State as JSON, and full tensors on the CPU, by file: weights and optimizer states.

    Nothing in them changes when training goes on. Call on all ranks.
    """
    full: Networks = {}
    scalars = {}
    for name, engine in trainer.engines.items():
        moments, scalars[name] = engine.optimizer_state()
        full[name] = (engine.weights(), moments)
    full |= trainer.averages.saved()
    full |= lanes.kept(trainer.nets.lanes)
    kept, tensors = probe.keep(trainer)
    full[probe.FILE] = (tensors, {})
    state = {
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
    return copy.deepcopy(state), full


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
