"""The callbacks of a run: those that it names, and those that are always on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.registry import CALLBACKS
from mm.trainer.begun import Begun
from mm.trainer.callbacks.base import Callback

ALWAYS = ("progress", "machine", "modalities", "alerts")


def of_run(named: Sequence[Any]) -> tuple[list[Callback], list[Callback]]:
    """Build the callbacks that the configs ``named`` make, and what they do not replace.

    Those that add to the metrics, and the others.
    """
    kinds = {config.kind for config in named}
    rest = [CALLBACKS.parse(kind) for kind in ALWAYS if kind not in kinds]
    built = [*(config.build() for config in (*named, *rest)), Begun()]
    return [c for c in built if c.adds_metrics], [c for c in built if not c.adds_metrics]
