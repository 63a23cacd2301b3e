"""The source tree that this process runs: its commit, and a hash of every file of the package."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).absolute().parents[1]
if PACKAGE.name != "mm":  # imported by the real path of the folder, beside the package
    PACKAGE = PACKAGE / "mm"
SUFFIXES = {".py", ".yaml", ".cpp", ".cu", ".h", ".css", ".js", ".html"}


def hash_files() -> dict[str, str]:
    """Path below the package -> the first 16 digits of the file's SHA-256."""
    found = {}
    for here, folders, files in os.walk(PACKAGE, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(files):
            path = Path(here, name)
            if path.suffix in SUFFIXES:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[str(path.relative_to(PACKAGE))] = digest[:16]
    return found


def git(*words: str) -> str | None:
    """What git says about the source tree; None outside of one, or without git."""
    command = ["git", "-C", str(PACKAGE), "-c", f"safe.directory={PACKAGE.parent}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit, with + where tracked files differ from it; None outside of a checkout."""
    found = git("rev-parse", "HEAD")
    return f"{found}+" if found and git("status", "--porcelain", "-uno") else found
