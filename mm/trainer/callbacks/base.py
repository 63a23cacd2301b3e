"""Callback: what happens around the loop. The loop itself knows none by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.trainer.loop import Trainer


class Callback:
    """Plug point; every hook optional.

    Hooks run on ALL ranks, in step: ask ``trainer.is_main`` before writing.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process (a resumed one too)."""

    def on_step(self, trainer: Trainer, step: int, metrics: dict[str, Any]) -> None:
        """After optimizer step ``step`` (from 1); ``metrics`` are on the host."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also when the run was stopped or failed."""
