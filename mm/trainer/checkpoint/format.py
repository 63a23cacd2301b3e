"""Checkpoints of any ZeRO stage and world size: safetensors by parameter and one JSON.

    checkpoints/step_000100/
        state.json                       step, data state, config, fingerprints
        index.json                       which file has which elements (`mm.model.slices`)
        <network>.safetensors            fp32 parameters and buffers, by `state_dict` name
        <network>.optimizer.safetensors  elementwise states, as "<state>/<parameter>"
        COMPLETE                         SHA-256 of every file; written last

Of several processes each has files of its own, ``<network>-00001-of-00004.safetensors``, with the
slices that it holds. A save is made in a temporary folder, synced, marked and renamed: a kill at
any moment leaves the previous one good.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from mm.errors import UserError
from mm.launch import environment
from mm.model.slices import Lazy, Slices
from mm.run import Run
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint.check import MARK, STATE

log = logging.getLogger("mm.trainer")

Agree = Callable[[str | None], str | None]


class Snapshot:
    """One moment of a run: what is JSON, and whole CPU tensors by file name.

    A network begins from one of these.

    Args:
        state: JSON-able values, with "step" and "stage".
        files: file name -> tensors, in memory or read when they are asked for.
    """

    origin = "the stage before"  # for messages
    mend = "it was made by another model config: use another run name"  # what does not fit
    new_modalities: Sequence[str] = ()  # whose ids it has no rows for

    def __init__(self, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]):
        self.state = state
        self.files = files

    def tensors(self, file: str) -> Lazy:
        """Tensors of a file; none when there is no file of that name."""
        table = self.files.get(file, {})
        if isinstance(table, Lazy):
            return table
        return Lazy({n: tuple(t.shape) for n, t in table.items()}, table.__getitem__)

    def read(self, file: str, name: str, start: int, n: int) -> Tensor:
        """Elements ``start : start + n`` of a flattened tensor, `(n,)`. Raises KeyError."""
        return self.tensors(file)[name].reshape(-1)[start : start + n]

    def has(self, network: str) -> bool:
        """Whether a network was part of the run."""
        return network in self.files

    def fit(self, module: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The weights as ``module`` takes them."""
        return weights

    def optimizer(self, network: str) -> Lazy:
        """Elementwise optimizer states of a network, ``state/parameter``."""
        return self.tensors(f"{network}.optimizer")


class Saved(Snapshot):
    """A checkpoint folder; of its tensors only what is asked for is read."""

    def __init__(self, folder: Path, state: Mapping[str, Any]):
        super().__init__(state, {})
        self.folder = folder
        self.origin = str(folder)
        self.slices = Slices(folder)

    def tensors(self, file: str) -> Lazy:
        return self.slices.tensors(file)

    def read(self, file: str, name: str, start: int, n: int) -> Tensor:
        if name not in self.slices.files.get(file, {}):
            raise KeyError(name)
        return self.slices.read(file, name, start, n)

    def has(self, network: str) -> bool:
        return network in self.slices.files

    def sha256(self, network: str) -> str:
        """Hash of the weights of a network, from those of its files."""
        hashes = check.json_object(self.folder / MARK) or {}
        found = [str(hashes.get(path)) for path in self.slices.paths(network)]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def require(self, config: Mapping[str, Any], vocabulary: str | None) -> None:
        """Check that a run of this config and vocabulary fingerprint can go on from here.

        Safe differences are logged, those of stages as warnings. Raises UserError on a state that
        is none, another vocabulary, model or seed.
        """
        check.require_state(self.state, self.origin, len(config["stages"]))
        if self.state["vocabulary"] != vocabulary:
            raise UserError(
                f"{self.folder}: was trained with vocabulary {str(self.state['vocabulary'])[:12]}, "
                f"this run has {str(vocabulary)[:12]}; use that one, or another run name: name=..."
            )
        saved = self.state["config"]
        # A key that was added to the program since then has its default on both sides.
        with contextlib.suppress(ValidationError):
            saved = Run.model_validate(saved).to_dict()
        for key, (old, new) in differences(saved, config).items():
            # how activations are kept changes no number: free to change after an out-of-memory
            if key.split(".")[0] in ("model", "seed") and not key.endswith(".recompute"):
                raise UserError(
                    f"{self.folder}: '{key}' was {old} and is {new} now; it cannot change: "
                    "set it back, or use another run name: name=..."
                )
            if environment.ranks().is_main:
                level = logging.WARNING if key.startswith("stages.") else logging.INFO
                say = "config changed since step %d: %s: %s -> %s"
                log.log(level, say, self.state["step"], key, old, new)


def newest(root: Path) -> Saved | None:
    """The newest checkpoint whose files match their hashes; a damaged one is passed over."""
    steps = map(check.step_of, check.folders(root))
    return next((saved for step in steps if (saved := load(root, step)) is not None), None)


def load(
    root: Path, step: int, share: tuple[int, int] = (0, 1), agree: Agree = lambda fault: fault
) -> Saved | None:
    """The checkpoint of one step; None, and a warning, where it is not there or is damaged.

    Args:
        share: of ``(rank, world)``: this process looks into every ``world``-th file of tensors.
        agree: the fault that any process found, from that of this one; the same on all.
    Raises:
        UserError: an older version of this program made it.
    """
    folder = root / f"step_{step:06d}"
    fault = agree(check.fault_of(folder, share))
    if fault is not None:
        log.warning("checkpoint %s is not used: %s", folder.name, fault)
        return None
    return at(root, step)


def at(root: Path, step: int) -> Saved:
    """The checkpoint of one step, which is known to be good."""
    folder = root / f"step_{step:06d}"
    return Saved(folder, json.loads((folder / STATE).read_text()))


def newest_state(root: Path) -> dict[str, Any]:
    """What is JSON of the newest checkpoint; {} without one, or where its state is damaged."""
    for folder in check.folders(root):
        if (folder / MARK).is_file():
            return check.json_object(folder / STATE) or {}
    return {}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that differ between two nested configs, with both values (None = absent)."""
    a, b = dict(_flat(old)), dict(_flat(new))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None:
        yield prefix, value
        return
    for key, item in items:
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
