"""Calls of `mm`, here or in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


MM = [sys.executable, "-m", "mm"]


def child(
    *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `mm WORDS` in a process of its own."""
    return subprocess.run(
        [*MM, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run `mm WORDS` here: (exit code, stdout, stderr)."""
    code = cli.run(list(words))
    out, err = capsys.readouterr()
    return code, out, err
