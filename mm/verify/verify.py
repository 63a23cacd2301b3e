"""`mm verify`: a few steps of a run as the user sets it, against one process in fp32.

Three runs, each in processes of its own, in a temporary folder that is removed: the setting, which
saves half-way; the setting again from that save; and the reference.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.config import dump
from mm.errors import UserError
from mm.launch import environment
from mm.processes import unwind_on_sigterm
from mm.reading import parse_json
from mm.run import EngineConfig, Run
from mm.verify.group import ALONE, Group
from mm.verify.tolerance import UPDATE

FROM_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
POLL_S = 0.1
GRACE_S = 10.0


class Check(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    allowed: str
    agrees: bool


def verify(
    run: Run,
    processes: int,
    steps: int = 4,
    say: Callable[[str], None] = lambda text: None,
    origin: str = "",
    group: Group | None = None,
) -> dict[str, Any]:
    """Compare the first ``steps`` of a run in ``processes`` processes with the reference.

    Nothing is written to the run's folder.

    Args:
        group: ranks of a launcher, which train; this one is rank 0. None: processes of this
            machine are started.
        say: told what is being done, now and then.
        origin: file of the config, for messages.
    Returns:
        JSON-able: "agrees", "checks" (rows of the table) and the setting.
    Raises:
        UserError: what the runs need is not there, or one of them failed.
    """
    steps = min(steps, run.stages[0].budget.steps)
    if steps < 2:
        raise UserError(f"--steps {steps}: a save and a resume need two; stages.0.budget.steps too")
    if group is None:
        _require_devices(processes)
    with unwind_on_sigterm(), _own_folder(run.out if group else None) as root:
        (root / "tensors").mkdir()
        half = steps // 2
        job = {"steps": steps, "config": origin or run.name}
        (root / "job.json").write_text(json.dumps(job))
        setting = _short(run, root, half, noise=processes == 1)
        _start(setting, root, "setting", processes, say, group)
        saved = root / "setting" / "checkpoints"
        _copy(saved / f"step_{half:06d}", root / "resumed" / "checkpoints")
        _start(setting, root, "resumed", processes, say, group)
        _start(as_reference(setting), root, "reference", 1, say)
        told = {
            role: parse_json((root / f"{role}.json").read_text())
            for role in ("setting", "resumed", "reference")
        }
    if processes > 1 and told["setting"].get("noise"):
        raise UserError(
            f"{origin or run.name}: a layer draws noise, other noise in every process, so that "
            "several cannot be compared with one; verify it alone: --processes 1"
        )
    return _judge(run, processes, steps, told)


def _require_devices(processes: int) -> None:
    from mm.trainer.engine.process_group import processes_here  # torch: only where it runs

    possible = processes_here(processes, processes)
    if possible < processes:
        raise UserError(
            f"--processes {processes}: one needs a GPU, and this machine has {possible}: "
            f"--processes {possible}, or CUDA_VISIBLE_DEVICES= for the CPU; on several machines "
            "start it by a launcher: srun mm verify CONFIG, mm launch KIND CONFIG --verify"
        )


@contextlib.contextmanager
def _own_folder(shared: Path | None) -> Iterator[Path]:
    """A temporary folder that is removed, whatever happens inside.

    Args:
        shared: on a disk of all machines, in which it is made; made itself where it is missing.
    """
    new = shared is not None and not shared.exists()
    if shared is not None:
        shared.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="mm-verify-", dir=shared)).absolute()
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if new and shared is not None:
            with contextlib.suppress(OSError):  # others use it by now
                shared.rmdir()


def as_reference(run: Run) -> Run:
    """The run in fp32 at ZeRO stage 0, neither compiled nor recomputed."""
    plain = {"zero_stage": 0, "precision": "fp32", "compile": False}
    kept = {"grad_clip": run.engine.grad_clip, "max_skips": run.engine.max_skips}
    values = run.to_dict() | {"engine": EngineConfig.model_validate(plain | kept).to_dict()}
    values["model"] = _replaced(values["model"], {"recompute": "none"})
    return Run.model_validate(values)


def _short(run: Run, root: Path, half: int, noise: bool) -> Run:
    """The run without all that is no part of a step, in a folder of its own."""
    values = run.to_dict()
    if not noise:  # it is other noise in every process
        values["model"] = _replaced(values["model"], {"dropout": 0.0})
    for stage in values["stages"]:
        stage |= {"tasks": [], "eval_every": 0, "early_stop": None}
    values |= {"name": "setting", "out": str(root), "callbacks": [], "evaluate": False}
    values["export"] = "last"
    values["tracking"] = values["tracking"] | {"sinks": []}
    values["guard"] = values["guard"] | {"spike": "off"}
    values["engine"] = values["engine"] | {"max_skips": 10**9}
    keep = {"every": half, "keep_last": 10**9, "keep_best": False, "background": False}
    values["checkpoints"] = values["checkpoints"] | keep
    return Run.model_validate(values)


def _replaced(values: Any, new: Mapping[str, Any]) -> Any:
    """A tree of a config with other values of some keys, wherever they are."""
    if isinstance(values, Mapping):
        return {k: new[k] if k in new else _replaced(v, new) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [_replaced(v, new) for v in values]
    return values


def _copy(checkpoint: Path, to: Path) -> None:
    to.mkdir(parents=True)
    shutil.copytree(checkpoint, to / checkpoint.name)


def _start(
    run: Run,
    root: Path,
    role: str,
    processes: int,
    say: Callable[[str], None],
    group: Group | None = None,
) -> None:
    """Run one role to its end. Raises UserError with what its processes said."""
    run = run.model_copy(update={"name": role})
    (root / f"{role}.yaml").write_text(dump(run))
    (root / "progress").unlink(missing_ok=True)
    what = {"setting": "as set", "resumed": "resumed", "reference": "reference"}[role]

    def poll() -> bool:
        with contextlib.suppress(OSError):
            say(f"{what}, {processes} x {(root / 'progress').read_text()}")
        return False

    if group is not None and processes > 1:
        why = group.run(role, root, poll)
    else:
        why = _train_here(role, root, processes, poll)
    if why:
        raise UserError(why)


def _train_here(role: str, root: Path, processes: int, poll: Callable[[], bool]) -> str:
    """Train in processes of this machine. Returns why it failed, or ''."""
    environ = {k: v for k, v in os.environ.items() if k not in FROM_LAUNCHER}
    words = ["-m", "mm.verify.child", role, str(root)]
    if processes > 1:
        environ.setdefault("OMP_NUM_THREADS", str(max(1, environment.cores() // processes)))
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        start += ["--master_addr=127.0.0.1", f"--master_port={environment.free_port()}"]
        words = start + words
    else:
        environ |= ALONE  # a scheduler's variables would be taken for ranks
    return _train(words, role, root, environ, poll)


def train_rank(role: str, root: Path, environ: Mapping[str, str], poll: Callable[[], bool]) -> str:
    """Train as one rank of a launcher's job. Returns why it failed, or ''."""
    return _train(["-m", "mm.verify.child", role, str(root)], role, root, environ, poll)


def _train(
    words: Sequence[str],
    role: str,
    root: Path,
    environ: Mapping[str, str],
    poll: Callable[[], bool],
) -> str:
    """Run this interpreter with ``words`` to its end, or until ``poll`` says so."""
    rank = environment.ranks().rank
    environ = dict(environ)
    environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # plug-ins of the caller
    log = root / f"{role}.{rank}.log"
    with (
        log.open("wb") as out,
        _ended(
            subprocess.Popen(
                [sys.executable, *words],
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ) as child,
    ):
        while child.poll() is None and not poll():
            time.sleep(POLL_S)
    return _why(root, role, log, child.returncode) if child.returncode else ""


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Whatever happens inside, no process of the child is left."""
    try:
        yield child
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_S)


def _why(root: Path, role: str, log: Path, code: int) -> str:
    """One line on a run that failed: what the user can mend, else the last that it said."""
    said = [f.read_text() for f in sorted(root.glob(f"{role}.error_*"))]
    if said:
        return said[0].replace("mm train CONFIG", "mm verify CONFIG")
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error: " in line and "ChildFailed" not in line]
    last = (errors or [line for line in lines if line.strip()] or ["it said nothing"])[-1].strip()
    world = environment.ranks().world
    where = f"rank {environment.ranks().rank} on {socket.gethostname()}: " if world > 1 else ""
    return (
        f"{where}the run '{role}' ended with code {code}: {last}; the whole of it: start mm train "
        "CONFIG in as many processes"
    )


def _judge(
    run: Run, processes: int, steps: int, told: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    setting, reference, resumed = told["setting"], told["reference"], told["resumed"]
    numbers = [str(step) for step in range(1, steps + 1)]
    pairs = [(n, setting["steps"][n], reference["steps"][n]) for n in numbers]
    checks = [
        _data(pairs),
        _losses(pairs),
        _worst("gradients", pairs),
        _worst("updates", pairs),
        _resume(resumed, setting, steps // 2, steps),
    ]
    return {
        "agrees": all(check.agrees for check in checks),
        "checks": [check._asdict() for check in checks],
        "processes": processes,
        "steps": steps,
        "zero_stage": run.engine.effective_zero_stage,
        "precision": setting["precision"],
        "device": setting["device"],
    }


Pairs = Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]


def _data(pairs: Pairs) -> Check:
    """The rows of every step, over all processes, each as often as one process reads it."""
    rows = sum(len(b["rows"]) for _, _, b in pairs)
    allowed = "the same rows"
    for step, a, b in pairs:
        more, less = Counter(a["rows"]), Counter(b["rows"])
        if more == less:
            continue
        twice = sum(n - 1 for n in more.values() if n > 1) - sum(
            n - 1 for n in less.values() if n > 1
        )
        found = f"step {step}: {sum((less - more).values())} of {len(b['rows'])} rows missing"
        found += f", {twice} read twice" if twice > 0 else ""
        return Check("rows of data", found, allowed, False)
    return Check("rows of data", f"{rows} rows", allowed, True)


def _losses(pairs: Pairs) -> Check:
    worst, name, first = 0.0, "", ""
    allowed = max(max(b["allowed"].values()) for _, _, b in pairs)
    for step, a, b in pairs:
        for key in sorted(a["losses"].keys() | b["losses"].keys()):
            x, y = a["losses"].get(key), b["losses"].get(key)
            change = math.inf
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                change = abs(x - y) / max(abs(y), 1e-3)
            if change > allowed and not first:
                first = f"{key} at step {step}"
            if change > worst:
                worst, name = change, f"{key} at step {step}"
    return Check("losses", _said(worst, name, first), f"{allowed:.1e}", not first)


def _worst(what: str, pairs: Pairs) -> Check:
    """The first parameter that differs, in the network's order, and the greatest difference."""
    worst, name, first, bound = 0.0, "", "", UPDATE
    for step, _, b in pairs:
        for key, change, allowed in b[what]:
            bound = allowed if what == "gradients" else UPDATE
            if not change <= allowed and not first:
                first = f"{key} at step {step}"
            if not change <= worst:
                worst, name = change, f"{key} at step {step}"
    label = {"gradients": "gradient of every parameter", "updates": "update by the optimizer"}
    return Check(label[what], _said(worst, name, first), f"{bound:.1e}", not first)


def _said(worst: float, name: str, first: str) -> str:
    out = f"at most {worst:.1e}" + (f" ({name})" if name else "")
    return f"first: {first}; {out}" if first else out


def _resume(
    resumed: Mapping[str, Any], setting: Mapping[str, Any], saved: int, steps: int
) -> Check:
    label, allowed, begun = "save and resume", "the same bits", resumed["from_step"]
    if begun != saved:  # a save that is not taken begins anew, which repeats the same bits
        return Check(label, f"began at step {begun}, not from the save of {saved}", allowed, False)
    other = resumed["first"]
    for step in range(begun + 1, steps + 1):
        mine, was = resumed["steps"][str(step)], setting["steps"][str(step)]
        if other is None and mine["rows"] != was["rows"]:
            return Check(label, f"other rows at step {step}", allowed, False)
        other = other or mine["other"]
        if other is None and mine["losses"] != was["losses"]:
            return Check(label, f"another loss at step {step}", allowed, False)
    if other is not None:
        said = f"{other['what']} of {other['name']} at step {other['step']}"
        return Check(label, f"{said}: {other['difference']:.1e}", allowed, False)
    return Check(label, f"steps {begun + 1} to {steps} from step {begun}", allowed, True)
