"""Checkpoints of any ZeRO stage and world size: safetensors by parameter and one JSON.

    checkpoints/step_000100/
        state.json                       step, data state, config, fingerprints
        <network>.safetensors            fp32 parameters and buffers, by `state_dict` name
        <network>.optimizer.safetensors  elementwise states, as "<state>/<parameter>"
        COMPLETE                         SHA-256 of every file; written last
    checkpoints/latest                   name of the newest complete one
    checkpoints/best                     that of the best held-out loss, with keep_best

A save is made in a temporary folder, synced, marked and renamed: a kill at any moment leaves the
previous one good.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from mm.disk import disk_error, is_full
from mm.errors import UserError
from mm.hashes import digest
from mm.launch import environment
from mm.run import Run
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint.check import MARK, SCHEMA, STATE

log = logging.getLogger("mm.trainer")

LATEST, BEST = "latest", "best"
PART = ".part_"
RETRY_S = (0.2, 1.0, 5.0)  # pauses before another try, when the folder cannot be written


class Snapshot:
    """One moment of a run: what is JSON, and full CPU tensors by file name.

    A stage begins from one of these, whether it is in memory (an unbroken run) or in a folder.

    Args:
        state: JSON-able values, with "step" and "stage".
        files: file name -> tensors: "<network>", "<network>.optimizer" and others.
    """

    origin = "the stage before"  # for messages
    mend = "it was made by another model config: use another run name"  # what does not fit
    new_modalities: Sequence[str] = ()  # whose ids it has no rows for

    def __init__(self, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]):
        self.state = state
        self.files = files

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Tensors of a file; {} when there is none of that name."""
        return dict(self.files.get(file, {}))

    def has(self, network: str) -> bool:
        """Whether a network was part of the run."""
        return network in self.files

    def fit(self, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights as ``module`` takes them."""
        return dict(weights)

    def optimizer(self, network: str) -> dict[str, Tensor]:
        """Elementwise optimizer states of a network, ``state/parameter``."""
        return self.tensors(f"{network}.optimizer")


class Saved(Snapshot):
    """A checkpoint folder that passed its hashes; tensors are read when they are asked for."""

    def __init__(self, folder: Path, state: Mapping[str, Any]):
        super().__init__(state, {})
        self.folder = folder
        self.origin = str(folder)

    def tensors(self, file: str) -> dict[str, Tensor]:
        return _load(self.folder / f"{file}.safetensors")

    def has(self, network: str) -> bool:
        return (self.folder / f"{network}.safetensors").is_file()

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


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path)) if path.is_file() else {}


def save(
    root: Path,
    snapshot: Snapshot,
    keep_last: int,
    keep_every: int = 0,
    on_file: Callable[[Path], Any] = lambda path: None,
    best: int | None = None,
) -> Path:
    """Write ``root/step_NNNNNN`` and move ``latest`` to it; then remove what need not be kept.

    A folder that cannot be written (a network disk that went away) is tried again, then given up.

    Args:
        root: the run's ``checkpoints`` folder.
        snapshot: what to write.
        keep_last: complete checkpoints to keep.
        keep_every: those of steps that it divides stay for good; 0 = none.
        on_file: called with every file of tensors once it is written, then with the folder.
        best: step whose checkpoint stays, too; ``root/best`` names it.
    Raises:
        UserError: the disk is full or cannot be written; the checkpoints before are intact.
    """
    step = snapshot.state["step"]
    need = sum(t.numel() * t.element_size() for f in snapshot.files.values() for t in f.values())
    for pause in (*RETRY_S, None):
        try:
            root.mkdir(parents=True, exist_ok=True)
            require_space(root, need)
            final = _write(root, snapshot, on_file)
            break
        except Exception as error:
            reason = disk_error(error)
            if reason is None:
                raise
            if pause is None or is_full(reason):
                raise UserError(
                    f"{root}: step {step} could not be saved ({need / 2**20:.0f} MiB): {reason}; "
                    "the checkpoints before it are intact. Mend the disk and run again"
                ) from error
            log.warning("%s: %s; trying again in %.1f s", root, reason, pause)
            time.sleep(pause)
    if best == step:
        _point(root, BEST, final.name)
    _retain(root, keep_last, keep_every, best)
    return final


def _write(root: Path, snapshot: Snapshot, on_file: Callable[[Path], Any]) -> Path:
    step = snapshot.state["step"]
    final = root / f"step_{step:06d}"
    part = root / f"{PART}step_{step:06d}_{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        for name, tensors in snapshot.files.items():
            if tensors:
                _write_tensors(part / f"{name}.safetensors", tensors)
                on_file(part / f"{name}.safetensors")
        (part / STATE).write_text(json.dumps({"schema": SCHEMA, **snapshot.state}, indent=1))
        hashes = {file.name: digest(file) for file in sorted(part.iterdir())}
        for file in part.iterdir():
            _sync(file)
        (part / MARK).write_text(json.dumps(hashes, indent=1))
        _sync(part / MARK)
        _sync(part)
        shutil.rmtree(
            final, ignore_errors=True
        )  # a damaged one of the same step: it was passed over at the start
        part.rename(final)
        on_file(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _point(root, LATEST, final.name)
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: t.contiguous() for k, t in tensors.items()}, str(path))


def _point(root: Path, pointer: str, name: str) -> None:
    """Move ``latest`` or ``best``; only people read it: a resume looks at the folders."""
    part = root / f".{pointer}.part"
    part.write_text(name)
    _sync(part)
    part.replace(root / pointer)
    _sync(root)


def _retain(root: Path, keep_last: int, keep_every: int, best: int | None) -> None:
    complete = [folder for folder in check.folders(root) if (folder / MARK).is_file()]
    for folder in complete[keep_last:]:
        step = check.step_of(folder)
        if step != best and (not keep_every or step % keep_every):
            shutil.rmtree(folder, ignore_errors=True)


def clean(root: Path) -> list[str]:
    """Remove what saves that were killed left behind; their names. Call with the run locked."""
    left = sorted(root.glob(f"{PART}*")) if root.is_dir() else []
    for folder in left:
        log.warning("%s: a save that was killed is removed", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in left]


def rehearse(root: Path, n_bytes: int) -> None:
    """Check before the first step that there is room for a save and that one can be made.

    A small file goes the whole way: written, synced, renamed, read back, removed.

    Raises:
        UserError: it cannot be saved here; better now than after a day.
    """
    import torch

    try:
        root.mkdir(parents=True, exist_ok=True)
        require_space(root, n_bytes)
        part, final = root / f"{PART}rehearsal", root / f"{PART}rehearsed"
        for folder in (part, final):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir()
        wrote = torch.arange(1024)
        _write_tensors(part / "x.safetensors", {"x": wrote})
        _sync(part / "x.safetensors")
        part.rename(final)
        same = torch.equal(_load(final / "x.safetensors")["x"], wrote)
        shutil.rmtree(final)
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise UserError(
            f"{root}: nothing can be saved here: {reason}; mend the folder or set out: elsewhere"
        ) from error
    if not same:
        raise UserError(f"{root}: a file read back differs from what was written; use another disk")


def require_space(root: Path, n_bytes: int) -> None:
    """Raise UserError when the disk of ``root`` has no room for ``n_bytes`` and a little."""
    free = shutil.disk_usage(root).free
    if free < 1.05 * n_bytes:
        raise UserError(
            f"{root}: a checkpoint needs {n_bytes / 2**20:.0f} MiB, "
            f"the disk has {free / 2**20:.0f} MiB free; "
            "make room or set out: to another disk"
        )


def newest(root: Path) -> Saved | None:
    """The newest checkpoint whose files match their hashes; a damaged one is passed over."""
    steps = map(check.step_of, check.folders(root))
    return next((saved for step in steps if (saved := load(root, step)) is not None), None)


def load(root: Path, step: int) -> Saved | None:
    """The checkpoint of one step; None, and a warning, where it is not there or is damaged."""
    folder = root / f"step_{step:06d}"
    fault = check.fault_of(folder)
    if fault is None:
        return Saved(folder, json.loads((folder / STATE).read_text()))
    log.warning("checkpoint %s is not used: %s", folder.name, fault)
    return None


def newest_state(root: Path) -> dict[str, Any]:
    """What is JSON of the newest checkpoint; {} without one, or where its state is damaged."""
    for folder in check.folders(root):
        if (folder / MARK).is_file():
            return check.json_object(folder / STATE) or {}
    return {}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
