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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mm.disk import tell_if_full
from mm.errors import UserError
from mm.hashes import check_hashes, write_hashes
from mm.model.size import require_room
from mm.model.slices import Lazy
from mm.model.tensor_file import Planned, write_file
from mm.reading import parse_json
from mm.vocabulary import Vocabulary

log = logging.getLogger(__name__)

ALIASES = "aliases"  # metadata key: JSON of {name: name of the tensor that it is}


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
    """Write safetensors, one tensor in memory at a time.

    A tensor under several names is stored once, the other names become aliases.

    Args:
        tensors: to write; each is asked for once, when its turn has come.
        like: shapes, dtypes and ties of those, perhaps on the meta device; default: they say them.
    """
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    plan: list[Planned] = []
    for name, t in (tensors if like is None else like).items():
        key: Any = (t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() else (name,)
        if (where := first.setdefault(id(t) if t.is_meta else key, name)) != name:
            aliases[name] = where
        else:
            make = lambda name=name: tensors[name].detach()
            plan.append(Planned(name, tuple(t.shape), t.dtype, make))
    plan.sort(key=lambda t: (-t.dtype.itemsize, t.name))  # no value at an odd place
    write_file(path, plan, {ALIASES: json.dumps(aliases), "format": "pt"})


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
    """What `save_tensors` wrote, aliases included; each tensor is read when it is asked for.

    Raises UserError on a missing or damaged file.
    """
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}")
    try:
        file = safe_open(path, framework="pt")
        shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        aliases = parse_json((file.metadata() or {}).get(ALIASES, "{}"))
        if not isinstance(aliases, dict) or not all(
            isinstance(name, str) and name in shapes for name in aliases.values()
        ):
            raise ValueError("its aliases name no tensors of it")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); copy or save it again") from error
    named = shapes | {alias: shapes[name] for alias, name in aliases.items()}
    return Lazy(named, lambda name: file.get_tensor(aliases.get(name, name)))


def load_into(
    build: Callable[[], nn.Module], path: str | Path, tensors: Lazy | None = None
) -> nn.Module:
    """Build on the meta device, then give every tensor its saved value, one after the other.

    Args:
        build: makes the module.
        path: the file of tensors; with ``tensors``, where they are, for messages.
        tensors: default those of the file.
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
) -> None:
    """Write config, weights, vocabulary and copies of tokenizers (modality -> folder) as one.

    ``tensors`` and ``like``: of `save_tensors`.
    """
    with whole(folder) as temporary:
        write_config(temporary, config)
        save_tensors(temporary / "model.safetensors", tensors, like)
        vocabulary.save(temporary / "vocabulary.json")
        for modality, source in tokenizers.items():
            shutil.copytree(source, temporary / "tokenizers" / modality)
