"""The run folder: one process at a time, the resolved config, what it ran on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from mm import config as configs
from mm.errors import UserError
from mm.launch import environment
from mm.run import Run

LOCK = ".lock"
PACKAGES = (
    "mm-stack",
    "torch",
    "deepspeed",
    "numpy",
    "wandb",
    "webdataset",
    "tokenizers",
    "safetensors",
)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this job; a refused start leaves no folder that it made.

    Raises UserError when another one trains there; a killed one holds nothing.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); write elsewhere: out=FOLDER"
        ) from error
    with _locked(folder) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder that is not empty, or gone already
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()


def _locked(folder: Path) -> IO[str]:
    """The folder's lock file, held. Raises UserError when another process holds it."""
    while True:
        try:
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:  # a refused start has just removed the folder
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            with file:
                raise UserError(
                    f"{folder}: process {file.read().strip() or '?'} trains here already; wait for "
                    "it, or give this run another name: name=..."
                ) from error
        # Its last holder may have removed the file between opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                return file
        file.close()


def describe(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """What a run was made with: versions, machine, command, commit, and the trainer's ``facts``."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": environment.cores(),
        "packages": packages,
        "commit": _commit(),
        **facts,
    }


def write(folder: Path, run: Run, environment_: dict[str, Any]) -> None:
    """Write config.yaml (resolved) and environment.json."""
    for name, text in (
        ("config.yaml", configs.dump(run)),
        ("environment.json", json.dumps(environment_, indent=1)),
    ):
        temporary = folder / f"{name}.part"
        temporary.write_text(text)
        temporary.replace(folder / name)


def _commit() -> str | None:
    """Git commit of the source tree of mm, with + when it has changes; None outside one."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *args],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return f"{commit}+" if commit and git("status", "--porcelain", "-uno") else commit
