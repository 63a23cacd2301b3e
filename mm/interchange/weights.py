"""Safetensors in shards, read and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm.errors import UserError
from mm.model.tensor_file import DTYPES, Planned, write_file
from mm.reading import parse_json
from mm.specs import NONE

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5")
NAMES = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


class Checkpoint:
    """Tensors by name, in any number of files, of which one is in memory at a time."""

    def __init__(self, files: Mapping[str, Any], origin: Path, stored: Mapping[str, str] = NONE):
        self.files, self.origin = files, origin
        self.stored = stored  # name in the file, where it is another one

    def by_names(self, rename: Callable[[str], str]) -> Checkpoint:
        """The same tensors by other names."""
        names = {rename(name): name for name in self.files}
        if len(names) < len(self.files):
            raise UserError(f"{self.origin}: holds tensors twice, by an old name and a new one")
        return Checkpoint({new: self.files[old] for new, old in names.items()}, self.origin, names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(self._stored(name)).get_shape())

    def _stored(self, name: str) -> str:
        return self.stored.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError on a tensor of whole numbers or of eight bits."""
        word = self.files[name].get_slice(self._stored(name)).get_dtype()
        if word not in NAMES:
            raise UserError(
                f"{self.origin}: {name} holds {word}, quantised weights; take the model before it "
                "was quantised"
            )
        return NAMES[word]

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(self._stored(name))


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """The tensors of a folder in Hugging Face's layout.

    Raises UserError naming the file: none is there, pickles alone, an index that lies, a header
    that does.
    """
    places = _places(folder)
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for name in dict.fromkeys(places.values()) if places else (ONE,):
            file = folder / name
            if not file.is_file():
                raise UserError(f"{file}: is missing, {INDEX} names it; copy the folder again")
            try:
                handles[name] = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(
                    f"{file}: damaged or no safetensors ({str(error)[:160]}); copy it again"
                ) from None
        held = {n: handle for handle in handles.values() for n in handle.keys()}  # noqa: SIM118
        if places:
            for tensor, name in places.items():
                if tensor not in handles[name].keys():  # noqa: SIM118
                    raise UserError(
                        f"{folder / name}: holds no '{tensor}', {INDEX} says so; copy it again"
                    )
            if extra := sorted(held.keys() - places.keys()):
                raise UserError(
                    f"{folder / INDEX}: does not name {few_names(extra)}; copy it again"
                )
        yield Checkpoint(held, folder)


def _places(folder: Path) -> dict[str, str]:
    """File of each tensor, of an index; {} where there is one file."""
    if (folder / ONE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        found = [name for name in PICKLES if (folder / name).exists()]
        if found:
            raise UserError(
                f"{folder / found[0]}: a pickle can run code and is not opened; write it as "
                'safetensors with: python -c "from transformers import AutoModelForCausalLM as A; '
                f"A.from_pretrained('{folder}').save_pretrained('OUT')\""
            )
        raise UserError(f"{folder}: holds no weights ({ONE} or {INDEX}); copy the folder again")
    try:
        places = parse_json((folder / INDEX).read_bytes())["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("weight_map is no mapping")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise ValueError(f"{str(name)[:80]!r} is no file of this folder")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / INDEX}: damaged ({str(error)[:160]}); copy it again") from None
    return places


def few_names(names: Sequence[str], most: int = 5) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def write_shards(folder: Path, plan: Sequence[Planned], most: int) -> None:
    """Write files of at most ``most`` bytes, but one tensor at least, and their index."""
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.n_bytes for t in shards[-1]) + tensor.n_bytes > most:
            shards.append([])
        shards[-1].append(tensor)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_file(folder / ONE, plan, metadata)
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, metadata)
        places |= {tensor.name: name for tensor in shard}
    total = sum(tensor.n_bytes for tensor in plan)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
