"""Runs of the toys for the trainer's tests: made, trained in processes, read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer_toys as toys

from mm import config as configs
from mm.launch import environment
from mm.run import Run
from mm.trainer.callbacks.base import Callback
from mm.trainer.log import metrics

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
