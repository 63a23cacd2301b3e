"""`mm env`: what a report of a bug needs, without secrets."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mm import __version__
from mm.cli.common import console, flatten, number, plain, table
from mm.launch import allocation, environment, forward, source
from mm.launch.preflight.machine import read_gpus

app = typer.Typer()
PREFIXES = (
    *forward.PREFIXES,
    *("DS_", "GOMP_", "KINETO_", "LD_", "MALLOC_", "MASTER_", "MKL_", "NVIDIA_", "OMPI_", "PET_"),
    *("PYTHON", "PYTORCH_", "RANK", "LOCAL_", "SKYPILOT_", "SLURM_", "TRITON_", "WORLD_SIZE"),
)
_PASSWORD = re.compile(r"(\w+://)[^/@\s]+@")


@app.command(help="Print what a bug report needs: versions, machine, GPUs, git, variables.")
def env(
    json: Annotated[bool, typer.Option("--json", help="As JSON, on standard output.")] = False,
) -> None:
    found = describe()
    if json:
        import json as library

        console().print(library.dumps(plain(found), indent=1), markup=False, soft_wrap=True)
        return
    for part, values in found.items():
        rows = [(name, number(value)) for name, value in flatten(values).items()]
        table(part, ("", ""), rows or [("none", "")], left=2)


def describe() -> dict[str, dict[str, Any]]:
    """Versions, machine, devices, git and variables; of secrets only that they are set."""
    from mm.launch.preflight.software import package_versions  # reads the types of a run

    status = source.git("status", "--porcelain", "-uno")
    return {
        "versions": {
            "mm": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            **package_versions(),
            "c++": _first_line(shutil.which(os.environ.get("CXX", "c++")), "--version"),
        },
        "machine": {
            "platform": platform.platform(),
            "libc": " ".join(platform.libc_ver()),
            "cpu": _cpu(),
            "cores": environment.cores(),
            "memory_gib": round(environment.memory_bytes() / 2**30, 1),
            "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
            "started_by": _starter(),
        },
        "gpus": _gpus(),
        "git": {
            "root": str(source.PACKAGE.parent),
            "commit": source.commit(),
            "branch": source.git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": status.splitlines()[:20] if status else [],
        },
        "variables": variables(),
    }


def variables() -> dict[str, str]:
    """Variables that change what a run does, secrets and passwords in addresses masked."""
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)}
    masked = forward.mask_secrets(found)
    return {name: _PASSWORD.sub(r"\1***@", value) for name, value in masked.items()}


def _gpus() -> dict[str, Any]:
    from mm.launch.preflight.check import Asked

    found = read_gpus(Asked(0, 1, "", 0, 0, None, (), "", ""), {})
    if found["why"]:
        return {"nvidia-smi": found["why"]}
    return {f"gpu{gpu.pop('index')}": ", ".join(gpu.values()) for gpu in found["gpus"]}


def _starter() -> str | None:
    """The scheduler that started this process."""
    node = allocation.node()
    return node.source if node is not None else os.environ.get("SLURM_JOB_ID") and "Slurm"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def _first_line(program: str | None, *words: str) -> str | None:
    if program is None:
        return None
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=20)
    return done.stdout.splitlines()[0] if done.stdout else None
