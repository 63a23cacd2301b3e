"""A rehearsal of a job on this machine: a child steps it as rank 0 over a fake process group."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.launch.launcher import Job
from mm.processes import unwind_on_sigterm
from mm.reading import parse_json

NAME = ".mm-rehearsal-"


def rehearse(job: Job, processes: int, of_machine: int) -> dict[str, Any]:
    """Figures of `mm.plan.rehearsal`.

    What the run would write goes into a folder of its own on the disk of the run folders, which is
    removed, whatever happens.

    Args:
        of_machine: processes that share this machine's cores in the real job.
    Raises:
        UserError: the run would be refused.
        RuntimeError: it cannot be rehearsed.
    """
    out = job.folder.parent
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    try:
        home = Path(tempfile.mkdtemp(prefix=NAME, dir=place))
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written: {error.strerror}; set out: elsewhere"
        ) from error
    with unwind_on_sigterm():
        try:
            return _child(job, processes, of_machine, home)  # it is killed where this is left early
        finally:
            shutil.rmtree(home, ignore_errors=True)


def _child(job: Job, processes: int, of_machine: int, home: Path) -> dict[str, Any]:
    file = home / "figures.json"
    words = [sys.executable, "-m", "mm.plan.rehearsal", job.config, str(file), str(processes)]
    ranks = {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": of_machine}
    environ = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    environ |= {name: str(value) for name, value in ranks.items()}
    done = subprocess.run([*words, *job.overrides], env=environ, stdin=subprocess.DEVNULL)
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        code = done.returncode
        found = {"crash": "killed; is memory out?" if code == -9 else f"exit code {code}"}
    if "crash" in found:
        raise RuntimeError(f"{job.config} as rank 0 of {processes}: {found['crash']}")
    if "error" in found:
        raise UserError(found["error"].replace(str(home), str(job.folder.parent)))
    return found
