"""Start a job again after a failure: with whom, from where, and when that makes no sense.

Every attempt is a line of ``launch/history.jsonl`` in the run folder.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mm.errors import UserError
from mm.launch import supervise
from mm.launch.batch import batch_arithmetic, keep_micro_batches
from mm.launch.launcher import Job, Launcher, Plan
from mm.launch.supervise import STOPPED, Outcome, Signals
from mm.reading import parse_json
from mm.run import Run

HISTORY = "history.jsonl"
COMPILES = 15  # times as long until nothing moving is a hang
FAILURES = 2  # of a node, after which it is left out


class Failure(NamedTuple):
    """What is known about an attempt that failed."""

    step: int  # done when it failed
    why: str
    node: str

    @property
    def kind(self) -> tuple[int, str]:
        """Equal for two failures that are the same: its step, and its words without numbers.

        An exception may come from any node, as what it trains on; a death is its node's own.
        """
        last = self.why.strip().splitlines()[-1] if self.why.strip() else ""
        words = re.sub(r"\d+", "", last.replace(self.node, ""))
        return self.step, words if "Traceback" in self.why else f"{self.node} {words}"


def run(
    launcher: Launcher,
    run_: Run,
    job: Job,
    plan: Plan,
    write: Callable[[str], None],
    on_plan: Callable[[Job, Plan], None],
) -> Outcome:
    """Run a job to its end, again after every failure that another start may help.

    ``on_plan`` is told what is started in place of the first plan. The rows of a step and their
    order stay; how many a process takes at a time changes with the number of processes.
    """
    history = _History(job.home / HISTORY)
    failures: list[Failure] = []
    out: set[str] = set()  # hosts that are left out
    world, first_job = plan.world, job
    with Signals() as signals:
        while True:
            begun, saved = time.time(), newest_step(job.folder)
            # torch.compile may take minutes in the middle of a run, at a new length of rows
            hang_s = launcher.hang_s * (COMPILES if run_.engine.compile else 1)
            outcome = _attempt(job, plan, write, signals, saved, history, begun, hang_s)
            ended = time.monotonic()
            if outcome.code in (0, 2, STOPPED) or signals.count:
                return outcome
            if not launcher.restarts:
                return outcome
            failures.append(Failure(max(outcome.step, saved), outcome.why, outcome.node))
            write(f"attempt {history.number}: {outcome.why}")
            refusal = _refusal(launcher, failures)
            if refusal:
                return outcome._replace(why=f"{outcome.why}; {refusal}")
            lost = {outcome.node} - {""}
            lost = {name for name in lost if not launcher.is_there(name)}
            tired = {n for n, k in Counter(f.node for f in failures).items() if n and k >= FAILURES}
            out |= lost | tired
            try:
                launcher, plan = _plan_again(launcher, run_, first_job, out, world, write)
            except UserError as error:
                return outcome._replace(why=f"{outcome.why}; no restart: {error}")
            overrides = keep_micro_batches(run_, world, plan.world)
            job = first_job._replace(overrides=(*first_job.overrides, *overrides))
            if overrides:
                plan = launcher.plan(job)
            if lost:
                _wait(launcher.lease_s - (time.monotonic() - ended) - outcome.silent_s, signals)
            if signals.count:
                return outcome
            names = ", ".join(node.name for node in plan.nodes)
            where = f"from step {newest_step(job.folder)}"
            write(f"starting again {where} on {names}, {plan.world} processes")
            on_plan(job, plan)


def _attempt(
    job: Job,
    plan: Plan,
    write: Callable[[str], None],
    signals: Signals,
    saved: int,
    history: _History,
    begun: float,
    hang_s: float,
) -> Outcome:
    """One attempt, and its line of the history."""
    trains_after: list[float] = []

    def on_step(step: int) -> None:
        if step > saved and not trains_after:
            trains_after.append(round(time.time() - begun, 1))

    outcome = supervise.run(job, plan.nodes, write, signals, hang_s, on_step)
    left = newest_step(job.folder)
    history.add(
        started=begun,
        ended=time.time(),
        nodes=[node.name for node in plan.nodes],
        world=plan.world,
        step_from=saved,
        step_to=max(outcome.step, saved, left),
        steps_lost=max(0, outcome.step - left) if outcome.code else 0,
        trains_after_s=trains_after[0] if trains_after else None,
        code=outcome.code,
        node=outcome.node,
        why=outcome.why[:2000],
    )
    return outcome


def _refusal(launcher: Launcher, failures: list[Failure]) -> str:
    """Why there is no restart; '' where there is one."""
    if len(failures) > launcher.restarts:
        return f"no restart: {launcher.restarts} were allowed (cluster.restarts)"
    if len(failures) > 1 and failures[-1].kind == failures[-2].kind:
        return f"no restart: the same happened at step {failures[-1].step} before"
    return ""


def _plan_again(
    launcher: Launcher,
    run_: Run,
    job: Job,
    out: set[str],
    world: int,
    write: Callable[[str], None],
) -> tuple[Launcher, Plan]:
    """The launcher and plan without some hosts, over as many processes as the rows divide by."""
    refused: list[int] = []
    launcher = launcher.without(out)
    for processes in range(min(world, launcher.slots()), 0, -1):
        try:
            batch_arithmetic(run_, processes)
        except UserError:
            refused.append(processes)
            continue
        if refused:
            rows = [getattr(stage.data, "batch_size", None) for stage in run_.stages]
            said = ", ".join(map(str, refused))
            write(f"{said} processes do not divide the {rows[0]} rows of a step: {processes} do")
        chosen = launcher.of_size(processes)
        return chosen, chosen.plan(job)
    raise UserError("no host is left")


def _wait(seconds: float, signals: Signals) -> None:
    """Until what runs on a host that was lost has ended itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not signals.count:
        time.sleep(0.1)


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint: a folder has its name when it is complete."""
    names = [path.name for path in (folder / "checkpoints").glob("step_*") if path.is_dir()]
    steps = [int(n[5:]) for n in names if n[5:].isdigit()]
    return max(steps, default=0)


class _History:
    """Lines of JSON, one an attempt; those of earlier launches into the folder stay."""

    def __init__(self, file: Path):
        self._file = file
        self.number = len(read_history(file.parent.parent))

    def add(self, **values: Any) -> None:
        """Write an attempt down."""
        self.number += 1
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"attempt": self.number, **values}) + "\n")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The attempts of a run folder; a line that is none is left out."""
    found = []
    try:
        lines = (folder / "launch" / HISTORY).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("attempt"), int):
            found.append(row)
    return found
