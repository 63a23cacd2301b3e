"""Everything that changes while a run trains, as one value."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.batch import Batch
from mm.launch import environment
from mm.trainer.callbacks.seen import Seen
from mm.trainer.checkpoint import resume_check
from mm.trainer.checkpoint.collect import collect
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.checkpoint.held import spread, whole
from mm.trainer.checkpoint.save import Moment
from mm.trainer.health.anomaly import Guard
from mm.trainer.held_out import HeldOut
from mm.trainer.log.metrics import BytesPerToken
from mm.trainer.ranks import of_all_rows
from mm.trainer.stage import StageState


@dataclass
class TrainState:
    """State of a run; a `Moment` is this as JSON and tensors.

    No generator is part of it: each is seeded by (seed, step, rank).
    """

    guard: Guard
    bytes_per_token: BytesPerToken
    held_out: HeldOut
    step: int = 0  # optimizer steps done, over all stages
    seen: Seen = field(default_factory=Seen)
    stage: StageState | None = None  # None before the first one is built

    def count(self, facts: Mapping[str, Any]) -> None:
        """Count a step that was made, and what it read."""
        self.step += 1
        self.seen.count(facts)

    def save(self, facts: Mapping[str, Any], batch: Batch) -> Moment:
        """What this process saves of it. Call on all ranks.

        Its tensors are those that train: they are written, or copied, before the next step.

        Args:
            facts: JSON-able values that a resume compares: world, vocabulary, config, tracker.
            batch: micro-batch on the host whose losses are kept beside it.
        """
        stage = self.stage
        assert stage is not None
        files, scalars = collect(stage)
        me = environment.ranks()
        kept, tensors = resume_check.keep(stage, self.step, batch)
        files[resume_check.FILE] = {n: whole(t, 0, me.rank) for n, t in tensors.items()}
        state = {
            "step": self.step,
            "stage": stage.index,
            "skipped": self.guard.skipped,
            "guard": self.guard.state_dict(),
            "data": stage.stream.state_dict(),
            "optimizers": scalars,
            "given": stage.from_folders,
            "bytes_per_token": self.bytes_per_token.totals,
            "held_out": self.held_out.state_dict(),
            "seen": self.seen.state_dict(),
            "rng": {
                "seed": stage.env.seed,
                "rule": "every generator is seeded by (seed, step, rank)",
            },
            resume_check.FILE: kept,
            **facts,
        }
        share = stage.env.sequence.size if stage.env.sequence else 1
        merge = lambda states: of_all_rows(states, share)
        return Moment(copy.deepcopy(state), spread(files, me.rank, me.world), merge)

    def load(self, snapshot: Snapshot) -> None:
        """Take step, guard and counts; the networks and data are of `enter_stage`."""
        self.step = snapshot.state["step"]
        if "guard" in snapshot.state:
            self.guard.load_state_dict(snapshot.state["guard"])
        self.bytes_per_token.load(snapshot.state["bytes_per_token"])
        self.held_out.load_state_dict(snapshot.state.get("held_out", {}))
        self.seen.load_state_dict(snapshot.state.get("seen", {}))
