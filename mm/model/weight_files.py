"""Weights of a model as one file, or as shards with an index, as Hugging Face lays them out.

    model.safetensors                           of at most `MOST` bytes
    model-00001-of-00003.safetensors, ...       of more
    model.safetensors.index.json                which of them has a tensor

Written tensor by tensor: one is in memory at a time, whatever a file holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mm.errors import UserError
from mm.hashes import ALGORITHM, digest
from mm.model.tensor_file import Planned, write_file
from mm.reading import parse_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST = 5 * 10**9  # bytes of a file
ALIASES = "aliases"  # of a file's metadata as JSON, of an index: {name: name of the tensor it is}


class Weights(NamedTuple):
    """Open files.

    Attributes:
        files: of each tensor by its name.
        aliases: other names of tensors, each with the one it is stored under.
    """

    files: dict[str, Any]
    aliases: dict[str, str]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, in one file or in several."""
    return (folder / ONE).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files with tensors of a folder. Raises UserError on an index that is none."""
    places, _ = _index(folder)
    return [folder / name for name in dict.fromkeys(places.values())] or [folder / ONE]


def digest_weights(folder: Path) -> str:
    """SHA-256 of the file of weights, or of those of several files in their order."""
    files = weight_files(folder)
    if len(files) == 1:
        return digest(files[0])
    lines = "".join(f"{digest(file)}  {file.name}\n" for file in files)
    return hashlib.new(ALGORITHM, lines.encode()).hexdigest()


def open_weights(folder: Path, enter: Callable[[Any], Any] = lambda file: file) -> Weights:
    """Open the files of a folder; no tensor is read.

    Args:
        enter: is handed every file, and gives it back: who closes it.
    Raises:
        UserError: a file is missing or damaged, or the index lies, naming the file and the tensor.
    """
    places, aliases = _index(folder)
    held: dict[str, Any] = {}
    where: dict[str, Path] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise UserError(f"{file}: is missing, {INDEX} names it; copy the folder again")
        handle = open_file(file, enter)
        for name in handle.keys():  # noqa: SIM118
            if name in held:
                raise UserError(f"{file}: holds '{name}', as {where[name].name} does; copy both")
            held[name], where[name] = handle, file
        aliases = aliases if places else aliases_of(handle, file)
    for tensor, name in places.items():
        if tensor not in held or where[tensor].name != name:
            raise UserError(f"{folder / name}: holds no '{tensor}', {INDEX} says so; copy it again")
    if places and (extra := sorted(held.keys() - places.keys())):
        raise UserError(f"{folder / INDEX}: does not name {few_names(extra)}; copy it again")
    if wrong := [n for n, to in aliases.items() if n in held or to not in held]:
        raise UserError(
            f"{folder / INDEX}: '{wrong[0]}' is stored, or is another name of what is not; "
            "copy it again"
        )
    return Weights(held, aliases)


def open_file(file: Path, enter: Callable[[Any], Any] = lambda file: file) -> Any:
    """Open a safetensors file. Raises UserError where it is none."""
    try:
        return enter(safe_open(file, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file}: damaged or no safetensors ({str(error)[:160]}); copy it again"
        ) from None


def aliases_of(handle: Any, file: Path) -> dict[str, str]:
    """Other names of the tensors of an open file. Raises UserError where they name none of it."""
    try:
        found = parse_json((handle.metadata() or {}).get(ALIASES, "{}"))
        return _require_aliases(found, {*handle.keys()})
    except ValueError as error:
        raise UserError(f"{file}: damaged ({str(error)[:160]}); copy or save it again") from error


def few_names(names: Sequence[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_weights(
    folder: Path,
    plan: Sequence[Planned],
    most: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write files of at most ``most`` bytes, but one tensor at least, and their index.

    Args:
        plan: tensors in the order in which they are written.
        most: default `MOST`.
        aliases: other names of tensors; None: of a folder that is not to be read by mm.
    """
    most = MOST if most is None else most
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.n_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    if len(shards) == 1:
        more = {} if aliases is None else {ALIASES: json.dumps(aliases)}
        write_file(folder / ONE, plan, {**more, "format": "pt"})
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, {"format": "pt"})
        places |= {tensor.name: name for tensor in shard}
    facts: dict[str, Any] = {"total_size": sum(tensor.n_bytes for tensor in plan)}
    facts |= {ALIASES: dict(aliases)} if aliases else {}
    index = {"metadata": facts, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _index(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """File of each tensor, and aliases, of an index; {} of both where there is one file."""
    if (folder / ONE).is_file():
        return {}, {}
    try:
        found = parse_json((folder / INDEX).read_bytes())
        places = found["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("weight_map is no mapping")
        for name in places.values():
            if not isinstance(name, str) or not _is_plain(name):
                raise ValueError(f"{str(name)[:80]!r} is no file of this folder")
        facts = found.get("metadata")
        aliases = facts.get(ALIASES, {}) if isinstance(facts, dict) else {}
        return places, _require_aliases(aliases, {*places})
    except FileNotFoundError:
        raise UserError(f"no weights at {folder / ONE}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / INDEX}: damaged ({str(error)[:160]}); copy it again") from None


def _is_plain(name: str) -> bool:
    plain = Path(name).name == name and not name.startswith(".") and "\0" not in name
    return plain and name.endswith(".safetensors")


def _require_aliases(found: Any, stored: set[str]) -> dict[str, str]:
    if not isinstance(found, dict) or not all(
        isinstance(to, str) and to in stored and name not in stored for name, to in found.items()
    ):
        raise ValueError("its aliases name no tensors of it")
    return found
