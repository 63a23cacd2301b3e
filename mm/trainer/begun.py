"""What networks began with: a line each at the start, all names in ``init_from.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.reading import parse_json
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.fit_weights import some

FILE = "init_from.json"


class Begun(Callback):
    """Writes ``init_from.json`` when a stage starts whose networks began from a folder."""

    def on_stage_start(self, trainer: Training) -> None:
        if trainer.is_main:
            write(trainer.folder, trainer.stage.begun)


def lines(begun: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each network: what was taken, what is new, what was left."""
    for name, told in begun.items():
        of = "" if name == "model" else f" of '{name}'"
        step = f", step {told['step']}" if told["step"] is not None else ""
        parts = [f"{len(told['taken'])} tensors{of} from {told['folder']}{step}"]
        parts += [f"{each} of '{table}'" for table, each in told["partial"].items()]
        parts += [f"{len(told[k])} {k}: {some(told[k])}" for k in ("new", "left") if told[k]]
        yield "; ".join(parts)


def show(begun: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the lines on standard error."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    for line in lines(begun):
        console.print(f"init_from: {line}")


def write(folder: Path, begun: Mapping[str, Any]) -> None:
    """Add to ``init_from.json`` of a run's folder; nothing where no network began from one."""
    if not begun:
        return
    path = folder / FILE
    before = parse_json(path.read_bytes()) if path.is_file() else {}
    part = path.with_name(f"{FILE}.part")
    part.write_text(json.dumps({**before, **begun}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
