"""A model as a folder: config, weights and their hashes, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.disk import tell_if_full
from mm.errors import UserError
from mm.hashes import check_hashes, write_hashes
from mm.model.size import require_room
from mm.model.slices import KINDS, Lazy
from mm.model.tensor_file import Planned, write_file
from mm.model.weight_files import ALIASES, aliases_of, open_file, open_weights, write_weights
from mm.reading import parse_json
from mm.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@contextmanager
def whole(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends.

    The hashes of its files are written then. It lies beside ``folder``, and is removed after an
    error; a full disk is a UserError.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with tell_if_full(folder, "; what was there before is as it was"):
            temporary.mkdir()
            yield temporary
            write_hashes(temporary)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
) -> None:
    """Write one file of safetensors, one tensor in memory at a time.

    A tensor under several names is stored once, the other names become aliases.

    Args:
        tensors: to write; each is asked for once, when its turn has come.
        like: shapes, dtypes and ties of those, perhaps on the meta device; default: they say them.
    """
    plan, aliases = plan_of(tensors, like)
    write_file(path, plan, {ALIASES: json.dumps(aliases), "format": "pt"})


def plan_of(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
) -> tuple[list[Planned], dict[str, str]]:
    """What `save_tensors` writes, and the aliases; of `Lazy` ones nothing is read for it."""
    if like is None:
        like = tensors.like if isinstance(tensors, Lazy) and tensors.like else tensors
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    plan: list[Planned] = []
    for name, t in like.items():
        key: Any = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,)
        if (where := first.setdefault(id(t) if t.is_meta else key, name)) != name:
            aliases[name] = where
        else:
            make = lambda name=name: tensors[name].detach()
            plan.append(Planned(name, tuple(t.shape), t.dtype, make))
    plan.sort(key=lambda t: (-t.dtype.itemsize, t.name))  # no value at an odd place
    return plan, aliases


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, aliases included.

    Raises UserError on a missing or damaged file.
    """
    return dict(open_tensors(path))


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `config.json`."""
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a saved model, after every file of it was compared with its hash.

    Raises UserError when a file is missing or damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"no saved model at {folder} (it has no config.json); a run keeps its own in "
            "<run folder>/model"
        )
    run = Path(folder).parent
    again = f"remove {folder} and run: mm train {run}" if (run / "checkpoints").is_dir() else ""
    mend = f"copy it again{', or ' if again else ''}{again}"
    if not check_hashes(folder, mend):
        log.warning(
            "%s: saved without hashes, so that damage goes unseen; write them: "
            "python -c \"from mm.hashes import write_hashes; write_hashes('%s')\"",
            folder,
            folder,
        )
    try:
        values = parse_json(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
        return values
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {mend}") from error


def open_tensors(path: str | Path) -> Lazy:
    """What `save_tensors` or `save_model` wrote; each tensor is read when it is asked for.

    Args:
        path: a file, or the folder of a model.
    Raises:
        UserError: a file is missing or damaged, or an index lies.
    """
    path = Path(path)
    files: dict[str, Any]
    if path.is_dir():
        files, aliases = open_weights(path)
    elif path.is_file():
        file = open_file(path)
        files, aliases = dict.fromkeys(file.keys(), file), aliases_of(file, path)
    else:
        raise UserError(f"no weights at {path}")
    parts = {name: file.get_slice(name) for name, file in files.items()}
    like = {
        name: torch.empty(part.get_shape(), dtype=KINDS[part.get_dtype()], device="meta")
        for name, part in parts.items()
    }
    like |= {alias: like[name] for alias, name in aliases.items()}

    def read(name: str) -> Tensor:
        stored = aliases.get(name, name)
        return files[stored].get_tensor(stored)

    return Lazy({name: tuple(t.shape) for name, t in like.items()}, read, like)


def load_into(
    build: Callable[[], nn.Module], path: str | Path, tensors: Lazy | None = None
) -> nn.Module:
    """Build on the meta device, then give every tensor its saved value, one after the other.

    Args:
        build: makes the module.
        path: the folder of a model; with ``tensors``, where they are, for messages.
        tensors: default those of the folder.
    Raises:
        UserError: naming what does not fit.
    """
    require_room(build, 1, torch.device("cpu"), str(path))
    tensors = open_tensors(path) if tensors is None else tensors
    shapes = tensors.shapes
    with torch.device("meta"):
        module = build()
    have = module.state_dict()
    wrong = [n for n in have if n in shapes and shapes[n] != tuple(have[n].shape)]
    missing, extra = sorted(have.keys() - shapes.keys()), sorted(shapes.keys() - have.keys())
    if missing or extra or wrong:
        faults = [
            f"{what} {names[0]} and {len(names) - 1} more"
            if len(names) > 1
            else f"{what} {names[0]}"
            for what, names in (("missing", missing), ("unknown", extra), ("other shape of", wrong))
            if names
        ]
        raise UserError(f"{path}: not the weights of this config.json: {'; '.join(faults)}")
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, own in module.state_dict().items():
            own.copy_(tensors[name])
    return module


def model_folder(folder: Path) -> Path:
    """A saved model's folder: ``folder``, or ``model`` in it where that is a run's."""
    inner = folder / "model"
    is_run = not (folder / "config.json").is_file() and (inner / "config.json").is_file()
    return inner if is_run else folder


def save_model(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    tokenizers: Mapping[str, str | Path],
    like: Mapping[str, Tensor] | None = None,
    most: int | None = None,
) -> None:
    """Write config, weights, vocabulary and copies of tokenizers (modality -> folder) as one.

    Args:
        tensors, like: of `save_tensors`.
        most: bytes of a file of weights; default `mm.model.weight_files.MOST`.
    """
    with whole(folder) as temporary:
        write_config(temporary, config)
        plan, aliases = plan_of(tensors, like)
        write_weights(temporary, plan, most, aliases)
        vocabulary.save(temporary / "vocabulary.json")
        for modality, source in tokenizers.items():
            shutil.copytree(source, temporary / "tokenizers" / modality)
