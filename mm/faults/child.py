"""A training process with a fault in it: what the forked children of `mm faults` run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError

USER_ERROR = 2  # exit code of the command line for a UserError


def run(spec: Mapping[str, Any], rank: int) -> None:
    """Train ``spec["run"]`` as one of ``spec["world"]`` processes, with ``spec["faults"]``.

    The exit code is the command line's: 0, 2 (UserError, its text in ``spec["said"]``), 75, 76.
    """
    sys.stdout = sys.stderr = open(f"{spec['said']}.{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    world = spec["world"]
    os.environ |= spec["env"]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(spec["port"]),
    }
    import logging

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    from mm.faults.inject import INJECT
    from mm.run import Run
    from mm.trainer.loop import Trainer

    faults = [
        INJECT[name](options)
        for name, options in spec["faults"].items()
        if options.get("rank", rank) == rank
    ]
    try:
        Trainer(Run.model_validate(spec["run"]), faults).fit()
    except UserError as error:
        sys.stderr.write(f"UserError: {error}\n")
        sys.exit(USER_ERROR)


def call(spec: Mapping[str, Any], name: str, *args: Any) -> None:
    """Run one function of this module with its prints in ``spec["said"]``."""
    sys.stdout = sys.stderr = open(f"{spec['said']}.0", "w", buffering=1)  # noqa: SIM115
    os.environ |= spec["env"]
    globals()[name](spec, *args)


# ---- a disk of its own ------------------------------------------------------

_NEW_NS, _NEW_USER, _RDONLY, _REMOUNT, _BIND, _PRIVATE = 0x20000, 0x10000000, 1, 32, 4096, 1 << 18
NO_MOUNT = 77  # this machine lets nobody mount


def _mount(what: str, at: Path, kind: str, flags: int, data: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(what.encode(), str(at).encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {at}")


def _own_mounts() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_NS if os.geteuid() == 0 else _NEW_NS | _NEW_USER
    try:
        if libc.unshare(flags):
            raise OSError(ctypes.get_errno(), "unshare")
        _mount("none", Path("/"), "", 0x4000 | _PRIVATE, "")
    except OSError:
        sys.exit(NO_MOUNT)


def disk(spec: Mapping[str, Any], fault: str, whole: str) -> None:
    """Train on a small disk that fills up (``full``) or turns read-only, mend it, train on.

    Exits with 0 when the first part ended in a UserError that names the disk, the checkpoint before
    was intact, and the second part ended as the unbroken run in the folder ``whole``.
    """
    from mm.faults.compare import differences
    from mm.faults.inject import AtPhase
    from mm.run import Run
    from mm.trainer.checkpoint import format as checkpoint
    from mm.trainer.loop import Trainer

    _own_mounts()
    run = Run.model_validate(spec["run"])
    run.out.mkdir(parents=True, exist_ok=True)
    root, filler = run.folder / "checkpoints", run.out / "filler"
    try:
        _mount("none", run.out, "tmpfs", 0, "size=24m")
    except OSError:
        sys.exit(NO_MOUNT)

    def break_it() -> None:
        if fault == "full":
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        else:
            _mount(str(root), root, "", _BIND, "")
            _mount(str(root), root, "", _BIND | _REMOUNT | _RDONLY, "")

    try:
        Trainer(run, [AtPhase({"phase": "save", "step": 4}, break_it)]).fit()
    except UserError as error:
        sys.stderr.write(f"UserError: {error}\n")
        if str(root) not in str(error):
            sys.exit(3)
    else:
        sys.exit(4)
    saved = checkpoint.newest(root)
    if saved is None or saved.state["step"] != 2:
        sys.exit(5)
    if fault == "full":
        filler.unlink()
    else:
        import ctypes

        ctypes.CDLL(None).umount2(str(root).encode(), 2)
    Trainer(run).fit()
    found = differences(Path(whole), run.folder)
    sys.stderr.write(f"{found}\n")
    sys.exit(6 if found else 0)
