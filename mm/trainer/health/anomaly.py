"""When a run goes wrong: steps that are not finite, losses that jump, memory that runs out.

Decisions are pure functions of figures that are the same on all ranks, and their history is in the
checkpoint: all ranks decide alike, and a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.batch import Batch
from mm.errors import UserError
from mm.run import Run
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.log.metrics import skipped_networks
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")

MIN_HISTORY = 20  # losses seen before one may be called a spike


class RollBack(Exception):
    """Go back to the newest checkpoint; its text says why."""


class Guard(Callback):
    """Counts bad steps of a run and says when to go back or stop.

    Every decision is a line of ``skipped.jsonl`` (steps that were not applied, with their sample
    keys) or ``events.jsonl`` (spikes, returns to a checkpoint).
    """

    def __init__(self, run: Run, is_main: bool):
        self.config, self.max_skips = run.guard, run.engine.max_skips
        self.folder, self.is_main = run.folder, is_main
        self.skipped = 0  # of the whole run
        self.rollbacks = 0
        self._bad: list[int] = []  # steps not applied, inside the window
        self._losses: deque[float] = deque(maxlen=self.config.window)
        self.spikes = 0  # in a row
        self._why = ""

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "bad": list(self._bad),
            "losses": list(self._losses),
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.rollbacks = state["skipped"], state["rollbacks"]
        self._bad, self.spikes = list(state["bad"]), state["spikes"]
        self._losses = deque(state["losses"], maxlen=self.config.window)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        """Look at a step, and add the count of skipped ones to its metrics.

        Raises:
            RollBack: as `skip` and `loss` do.
        """
        for network in skipped_networks(metrics):
            self.skip(step - 1, network, metrics, trainer.batches)
        self.loss(step - 1, metrics["loss/total"], trainer.batches)
        metrics["skipped"] = self.skipped

    def skip(
        self, step: int, network: str, metrics: Mapping[str, float], batches: Sequence[Batch]
    ) -> None:
        """A step was not applied, because its loss or gradient is not finite.

        Raises:
            RollBack: the window holds more such steps than ``engine.max_skips``.
        """
        self.skipped += 1
        self._bad = [s for s in self._bad if s > step - self.config.window] + [step]
        losses = {k: str(v) for k, v in metrics.items() if k.startswith("loss/")}
        log.warning(
            "step %d: loss or gradient of '%s' is not finite; not applied (%s)",
            step,
            network,
            losses,
        )
        keys = [key for b in batches for key in b.keys]
        self._note("skipped", {"step": step, "network": network, "losses": losses, "keys": keys})
        if len(self._bad) > self.max_skips:
            raise RollBack(
                f"{len(self._bad)} of the last {self.config.window} steps were not finite "
                f"(up to step {step}); their samples are in skipped.jsonl"
            )

    def loss(self, step: int, value: float, batches: Sequence[Batch]) -> None:
        """Watch the loss for spikes: far over the median, in robust deviations of the window.

        Raises:
            RollBack: ``spike: rollback``, and ``spike_steps`` of them came in a row.
        """
        if self.config.spike == "off" or not math.isfinite(value):
            return
        if len(self._losses) < min(MIN_HISTORY, self.config.window) or not self._is_spike(value):
            self._losses.append(value)
            self.spikes = 0
            return
        self.spikes += 1  # a spike does not move the window that it is measured by
        if self.spikes == 1:
            median = statistics.median(self._losses)
            log.warning("step %d: loss %.4g, the median was %.4g: a spike", step, value, median)
            self._note(
                "events",
                {
                    "step": step,
                    "event": "spike",
                    "loss": value,
                    "median": median,
                    "keys": [key for b in batches for key in b.keys],
                },
            )
        if self.spikes >= self.config.window:  # it stays there: the new level
            self._losses.clear()
            self.spikes = 0
        elif self.config.spike == "rollback" and self.spikes >= self.config.spike_steps:
            raise RollBack(f"the loss was a spike for {self.spikes} steps (up to step {step})")

    def _is_spike(self, value: float) -> bool:
        median = statistics.median(self._losses)
        # 1.4826: a median deviation as a standard one; the floor is for a loss that stands still
        spread = 1.4826 * statistics.median(abs(x - median) for x in self._losses)
        return value > median + self.config.spike_sigma * max(spread, 0.01 * abs(median))

    def require_applied(self, step: int, stage: int) -> None:
        """Raise UserError where ``step``, the last one done, was not applied: nothing is saved."""
        if step - 1 in self._bad:
            raise UserError(
                f"{self.folder}: step {step}, the last one, was not applied, because its loss or "
                "gradient is not finite: no model is saved. Begin again with a lower "
                f"stages.{stage}.optimizer.lr and another name: name=..."
            )

    def roll_back(self, why: RollBack, step: int, to: int | None) -> None:
        """Count a return from ``step`` to the checkpoint of step ``to``.

        Raises:
            UserError: there is none, or there were too many.
        """
        if to is None or self.rollbacks >= self.config.max_rollbacks:
            tried = f" after {self.rollbacks} returns to a checkpoint" if self.rollbacks else ""
            raise UserError(
                f"{self.folder}: {why}{tried}. Lower stages.0.optimizer.lr and run again: it goes "
                "on from the last checkpoint"
            ) from why
        self.rollbacks += 1
        self._bad, self.spikes = [], 0
        log.warning("%s; back to step %d, past the batches since", why, to)
        self._note("events", {"step": step, "event": "rollback", "to": to, "why": str(why)})

    def _note(self, name: str, row: dict[str, Any]) -> None:
        if self.is_main:
            append(self.folder / f"{name}.jsonl", row)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def out_of_memory(
    error: BaseException, batches: Sequence[Batch], vocabulary: Vocabulary | None, step: int
) -> UserError | None:
    """What to tell when a step ran out of memory; None for any other error.

    Names rows, places, the longest span of each modality, and the key to lower.
    """
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "not enough memory" in text
    ):
        return None
    names = ("control", *(vocabulary.modalities if vocabulary is not None else ()))
    shapes, longest, items = set(), dict.fromkeys(names, 0), {}
    for b in batches:
        if b.ids is not None:
            shapes.add("x".join(map(str, b.ids.shape[:2])))
            for name, n in _spans(b).items():
                known = names[name] if name < len(names) else str(name)
                longest[known] = max(longest.get(known, 0), n)
        for name, values in b.values.items():
            items[name] = max(items.get(name, 0), int(values.length.max()))
    found = [f"{name} {n}" for name, n in (longest | items).items() if n]
    keys = [key for b in batches for key in b.keys][:8]
    first = text.strip().splitlines()[0][:160] if text.strip() else "no memory"
    return UserError(
        f"step {step} ran out of memory ({first}): {len(batches)} micro-batches of "
        f"{' and '.join(sorted(shapes)) or 'raw items'} places; longest: {', '.join(found)}; "
        f"samples {', '.join(keys)}. Lower micro_batch_size (the result is the same) or seq_len"
    )


def _spans(b: Batch) -> dict[int, int]:
    """Longest run of places of one modality in one document, by modality number."""
    fields = b.layout.fields
    document, modality = fields.document.cpu().numpy(), fields.modality.cpu().numpy()
    longest: dict[int, int] = {}
    for d, m in zip(document, modality, strict=True):
        n = 0
        for i in range(len(d)):
            n = n + 1 if i and d[i] == d[i - 1] and m[i] == m[i - 1] else 1
            if d[i]:
                longest[int(m[i])] = max(longest.get(int(m[i]), 0), n)
    return longest
