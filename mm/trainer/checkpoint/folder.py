"""The folder of a run's checkpoints: pointers, what is kept, whether it can be written.

checkpoints/latest      name of the newest complete one
checkpoints/best        that of the best held-out loss, with keep_best
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from mm.disk import disk_error
from mm.errors import UserError
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint.check import MARK

log = logging.getLogger("mm.trainer")

LATEST, BEST = "latest", "best"
PART = ".part_"


def point(root: Path, pointer: str, name: str) -> None:
    """Move ``latest`` or ``best``; only people read it: a resume looks at the folders."""
    part = root / f".{pointer}.part"
    part.write_text(name)
    sync(part)
    part.replace(root / pointer)
    sync(root)


def retain(root: Path, keep_last: int, keep_every: int, best: int | None) -> None:
    """Remove complete checkpoints beyond those to keep."""
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
    from safetensors.torch import load_file, save_file

    try:
        root.mkdir(parents=True, exist_ok=True)
        require_space(root, n_bytes)
        part, final = root / f"{PART}rehearsal", root / f"{PART}rehearsed"
        for folder in (part, final):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir()
        wrote = torch.arange(1024)
        save_file({"x": wrote}, str(part / "x.safetensors"))
        sync(part / "x.safetensors")
        part.rename(final)
        same = torch.equal(load_file(str(final / "x.safetensors"))["x"], wrote)
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


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
