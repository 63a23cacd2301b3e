"""Memory a GPU before a run, from a child `mm plan`: this package itself imports no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from mm.launch.launcher import Job, Launcher, Plan
from mm.reading import parse_json

NO_CARD = "say which card the machines have: cluster.gpu=h100, or gpu: in the cluster YAML"


def shape(launcher: Launcher, plan: Plan) -> tuple[int, int]:
    """Machines, and processes of each; machines of one process where they are not alike."""
    each = {node.processes for node in plan.nodes}
    processes = launcher.gpus_per_node or min(each, default=1)
    if len(each) > 1 or plan.world % processes:
        return plan.world, 1
    return plan.world // processes, processes


def command(job: Job, launcher: Launcher, plan: Plan, stage: int) -> list[str]:
    """The `mm plan` of one stage of the run."""
    nodes, processes = shape(launcher, plan)
    options = ["--gpu", str(launcher.gpu), "--nodes", str(nodes), "--gpus-per-node", str(processes)]
    options += ["--stage", str(stage), "--no-longest", "--launches", "no", "--json", "-"]
    return [sys.executable, "-m", "mm", "plan", job.config, *job.overrides, *options]


def memory(job: Job, launcher: Launcher, plan: Plan, stages: int) -> list[dict[str, Any]]:
    """What `mm plan` says of each stage, its flat keys; {"why": one line} where it cannot say."""
    if launcher.gpu is None:
        return [{"why": NO_CARD}]
    return [_ask(command(job, launcher, plan, stage)) for stage in range(stages)]


def _ask(words: list[str]) -> dict[str, Any]:
    """Run a plan. A dry run goes on without it, whatever is wrong."""
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        found = parse_json(done.stdout)
    except ValueError:
        found = None
    if done.returncode == 0 and isinstance(found, dict):
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("mm: ") for line in lines if line.startswith("mm: ")] or lines[-1:]
    return {"why": said[0] if said else f"mm plan ended with exit code {done.returncode}"}
