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
from mm.model.slices import INDEX, Slices
from mm.reading import parse_json

SCHEMA = 2
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


def fault_of(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Say what is wrong with the files of a checkpoint; None when they are as they were saved.

    Args:
        share: ``(rank, world)``: of the files of tensors this looks into every ``world``-th.
    Raises:
        UserError: an older version of this program made it.
    """
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
    alone = next((name for name in sorted(here) if name not in hashes), None)
    if alone is not None:
        return f"{alone} is not vouched for by {MARK}"
    small = [name for name in (STATE, INDEX) if name in here]
    own = [*small, *sorted(here - {*small})[share[0] :: share[1]]]
    for name in own:
        if digest(folder / name) != hashes[name]:
            return f"{name} does not match its SHA-256"
    state = json_object(folder / STATE)
    if state is None:
        return f"{STATE} is not readable"
    _require_layout(folder, state.get("schema"))
    if state.get("schema") != SCHEMA:
        return f"{STATE} has schema {str(state.get('schema'))[:20]}, this program reads {SCHEMA}"
    if state.get("step") != step_of(folder):
        return f"{STATE} is of step {str(state.get('step'))[:20]}"
    return _tensors_fault(folder, here, own, state)


def _require_layout(folder: Path, schema: Any) -> None:
    if isinstance(schema, int) and not isinstance(schema, bool) and 0 < schema < SCHEMA:
        raise UserError(
            f"{folder}: was saved by an older version of this program (schema {schema}), this one "
            f"reads schema {SCHEMA}: end the run with that version, or begin another one: name=..."
        )


def _tensors_fault(
    folder: Path, here: set[str], own: list[str], state: Mapping[str, Any]
) -> str | None:
    """Say whether the files of tensors are those of the index; ``own`` ones are looked into."""
    if INDEX not in here:
        return f"{INDEX} is missing"
    try:
        slices = Slices(folder)
    except UserError:
        return f"{INDEX} is not readable"
    for file in slices.files:
        for path in slices.paths(file):
            if path not in here:
                return f"{path[:60]} is missing"
    trained = state.get("optimizers")
    for name in trained if isinstance(trained, dict) else ():
        if name not in slices.files:
            return f"{name[:40]}.safetensors is missing"
    faults = (_file_fault(folder / n, slices) for n in own if n.endswith(".safetensors"))
    return next((f for f in faults if f), None)


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


def _file_fault(path: Path, slices: Slices) -> str | None:
    """Say whether a file has the tensors that the index says; their values are not read."""
    from safetensors import SafetensorError, safe_open

    held = slices.must_hold(path.name)
    if held is None:
        return f"{path.name} is not in {INDEX}"
    try:
        with safe_open(str(path), "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {n: (tuple(p.get_shape()), p.get_dtype()) for n, p in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path.name} is no file of tensors ({error})"
    odd = next((n for n in sorted({*held, *found}) if held.get(n) != found.get(n)), None)
    return None if odd is None else f"{path.name} has another '{odd[:60]}' than {INDEX} says"
