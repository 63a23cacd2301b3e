"""Whether a checkpoint folder is one: its mark, its files, its state, before anything is built.

A folder that is damaged is passed over for the one before it. One whose hashes are right and whose
state is not (somebody edited and signed it) is refused by key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mm.errors import UserError
from mm.hashes import digest
from mm.reading import parse_json

SCHEMA = 1
STATE, MARK = "state.json", "COMPLETE"
NAME = re.compile(r"step_([0-9]{1,15})")

Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]


class _Part(BaseModel):
    """A part of state.json; keys that only some runs have are let through."""

    model_config = ConfigDict(extra="allow")


class GuardPart(_Part):
    """History of the guard."""

    skipped: Count
    rollbacks: Count
    bad: list[Count]
    losses: list[float]
    spikes: Count


class DataPart(_Part):
    """Where a stream goes on."""

    cursor: dict[str, Count] | None = None
    plan: dict[str, Any] | None = None


class State(_Part):
    """state.json."""

    step: Count
    stage: Count
    world: Annotated[int, Field(ge=1, strict=True)]
    vocabulary: str | None
    config: dict[str, Any]
    data: DataPart
    optimizers: dict[str, dict[str, float]]
    bytes_per_token: dict[str, list[float]]
    # absent in the oldest checkpoints, but never null
    guard: GuardPart = Field(default=None)  # type: ignore[assignment]


def folders(root: Path) -> Iterator[Path]:
    """Folders ``step_<digits>`` of a run's checkpoints, newest first; others are nobody's."""
    found = [p for p in root.glob("step_*") if NAME.fullmatch(p.name)] if root.is_dir() else []
    yield from sorted((p for p in found if p.is_dir()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def fault_of(folder: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint; None when they are as they were saved."""
    mark = folder / MARK
    if not mark.is_file():
        return "its save did not finish"
    hashes = json_object(mark)
    if hashes is None or not all(isinstance(value, str) for value in hashes.values()):
        return f"{MARK} is not readable"
    here = {path.name for path in folder.iterdir()} - {MARK}
    missing = sorted({STATE, *hashes} - here)
    if missing:
        return f"{missing[0]} is missing"
    for name in sorted(here):
        if name not in hashes:
            return f"{name} is not vouched for by {MARK}"
        if digest(folder / name) != hashes[name]:
            return f"{name} does not match its SHA-256"
    state = json_object(folder / STATE)
    if state is None:
        return f"{STATE} is not readable"
    if state.get("schema") != SCHEMA:
        return f"{STATE} has schema {str(state.get('schema'))[:20]}, this program reads {SCHEMA}"
    if state.get("step") != step_of(folder):
        return f"{STATE} is of step {str(state.get('step'))[:20]}"
    trained = state.get("optimizers")
    for name in trained if isinstance(trained, dict) else ():
        if f"{name}.safetensors" not in here:
            return f"{name[:40]}.safetensors is missing"
    return next((f for name in sorted(here) if (f := _header_fault(folder / name))), None)


def require_state(state: Mapping[str, Any], origin: str, n_stages: int) -> None:
    """Check the types and bounds of a state.

    Raises UserError naming the first key that is wrong.
    """
    try:
        checked = State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(
            f"{origin}/{STATE}: not the state of a run ({why}); remove this folder to go on from "
            "the checkpoint before it"
        ) from error
    if checked.stage >= n_stages:
        raise UserError(
            f"{origin}: was saved in stage {checked.stage}, this run has {n_stages}; give it its "
            "stages back, or use another run name: name=..."
        )


def json_object(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None when it holds anything else."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _header_fault(path: Path) -> str | None:
    """Say whether the table of a file of tensors covers the file; the tensors are not read."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path.name} is no file of tensors ({error})"
