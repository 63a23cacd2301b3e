"""`make gpu-wheels`: what `make gpu` needs as wheels, for a machine with a GPU and no network.

python benchmarks/gpu_wheels.py [--get build/wheels]

Without --get it prints the requirements, one a line, as pip reads them. With it, pip fetches or
builds a wheel of each and of what they require: on a machine with a network and the platform and
Python version of the other one. `make gpu` installs from that folder where it is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What kernels import and torch brings on Linux alone, from the index of its CUDA builds.
BESIDE = ("triton>=3.6; sys_platform == 'linux'",)


def requirements() -> list[str]:
    """The builder of this package, its dependencies and what comes with a CUDA build of torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*project["build-system"]["requires"], *project["project"]["dependencies"], *BESIDE]


def main(words: Sequence[str] | None = None) -> int:
    """Print the requirements, or get their wheels; pip's exit code."""
    parser = argparse.ArgumentParser(prog="make gpu-wheels", description=(__doc__ or "")[:80])
    parser.add_argument("--get", type=Path, metavar="DIR", help="put wheels of them there")
    asked = parser.parse_args(words)
    if asked.get is None:
        print("\n".join(requirements()))
        return 0
    # Not `pip download`: what has no wheel (DeepSpeed) would be built where nothing can be fetched.
    command = [sys.executable, "-m", "pip", "wheel", "--wheel-dir", str(asked.get)]
    return subprocess.run([*command, *requirements()]).returncode


if __name__ == "__main__":
    sys.exit(main())
