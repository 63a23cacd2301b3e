"""Runs of the toys for the trainer's tests: made, trained in processes, read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from torch import Tensor

from mm import config as configs
from mm.launch import environment
from mm.run import Run
from mm.trainer.callbacks.base import Callback
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.log import metrics
from mm.trainer.loop import INTERRUPTED, Trainer, train
from mm.verify import verify as judge

toys.forget()  # at collection: other files parametrize over the registries
HERE = Path(__file__).parent


def make_run(out: Path, name: str = "run", *, steps: int = 6, stage: int = 1, **change: Any) -> Run:
    """A run of the toy model.

    ``change`` merges into data, model, objective, engine, checkpoints or (stage_keys) the stage.
    """
    toys.vocabulary().save(out / "vocabulary.json")
    part = {"kind": "toy"} | change.get("data", {})
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": out / "vocabulary.json",
            "model": {"kind": "toy_lm"} | change.get("model", {}),
            "stages": [
                {
                    "data": part,
                    "objective": change.get("objective", "next_token"),
                    "budget": {"steps": steps},
                    "schedule": {"warmup": 2},
                    "optimizer": {"kind": "adamw", "lr": 1e-2},
                    "eval_every": 0,
                }
                | change.get("stage_keys", {})
            ],
            "engine": {"zero_stage": stage, "precision": "fp32"} | change.get("engine", {}),
            "checkpoints": {"every": 3} | change.get("checkpoints", {}),
        }
    )


class Calls(Callback):
    """Calls a function with the trainer at one of its hooks."""

    def __init__(self, hook: str, function: Callable[[Any], Any]):
        setattr(self, hook, lambda trainer, *args: function(trainer))


def rows(run: Run) -> list[dict[str, Any]]:
    return metrics.read(run.folder / "metrics.jsonl")


def losses(run: Run, name: str = "loss/total") -> list[float]:
    return [row[name] for row in rows(run) if name in row]


def stop_at(run: Run, step: int) -> None:
    """Train until a SIGTERM after step ``step`` - 1 stops the run, its checkpoint saved."""
    ask = lambda trainer: trainer.step == step - 1 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        Trainer(run, [Calls("post_step", ask)]).fit()
    assert stopped.value.code == INTERRUPTED


def resume_bitwise(
    whole: Run, halves: Run, step: int = 3, files: Sequence[str] = ("model",)
) -> list[dict[str, Tensor]]:
    """Train a run, and its like that is stopped and resumes: losses and last tensors are equal.

    Returns the tensors of ``files`` of the last checkpoint.
    """
    train(whole)
    stop_at(halves, step)
    assert train(halves)["resumed_from"] == step
    assert losses(halves) == losses(whole) and len(losses(whole)) > step
    a, b = (checkpoint.newest(run.folder / "checkpoints") for run in (whole, halves))
    assert a is not None and b is not None and a.state["step"] == b.state["step"]
    found = [(a.tensors(file), b.tensors(file)) for file in files]
    for one, other in found:
        assert one and one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    return [dict(one) for one, _ in found]


def torchrun(
    n: int,
    runs: list[Run],
    timeout_s: float = 120,
    child: str = "trainer_child.py",
    beside: Callable[[Run], list[str]] = lambda run: [],
) -> str:
    """Train runs one after the other in ``n`` processes; what they wrote to standard error.

    ``beside``: arguments of the ``child`` after the YAML of each run.
    """
    paths = []
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.out / f"{run.name}_{n}.yaml"
        path.write_text(
            configs.dump(run.model_copy(update={"imports": ("trainer_toys", *run.imports)}))
        )
        paths += [str(path), *beside(run)]
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{env.get('PYTHONPATH', '')}"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        "--master_addr=127.0.0.1",
        f"--master_port={environment.free_port()}",
        str(HERE / child),
        *paths,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def verify_child(role: str, roots: list[Path], processes: int) -> None:
    """Train ``<role>.yaml`` of every folder as `mm verify` does, in ONE launch."""
    launch = ["torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
    launch += [f"--master_port={environment.free_port()}", "-m"]
    words = [sys.executable, "-m", *(launch if processes > 1 else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [*words, "mm.verify.child", role, *map(str, roots)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def differences(root: Path, updates: bool = True) -> list[judge.Check]:
    """What differs between the setting and the reference of a folder, see `verify_child`."""
    setting, reference = (
        json.loads((root / f"{role}.json").read_text())["steps"]
        for role in ("setting", "reference")
    )
    pairs = [(step, setting[step], reference[step]) for step in setting]
    checks = [judge._data(pairs), judge._losses(pairs), judge._worst("gradients", pairs)]
    checks += [judge._worst("updates", pairs)] if updates else []
    return [check for check in checks if not check.agrees]
