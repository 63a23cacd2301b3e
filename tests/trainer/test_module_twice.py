"""A module that runs several times in a step: right gradients at every stage and precision.

DeepSpeed #8224: wrong ones at stage 2 in bf16 with several processes, without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import HERE, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.launch import environment
from mm.verify import verify as judge

SETTINGS = [(s, p) for s in range(4) for p in ("fp32", "autocast_bf16", "bf16")]


def start(role: str, roots: list[Path], processes: int) -> None:
    torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
    torchrun += [f"--master_port={environment.free_port()}", "-m"]
    words = [sys.executable, "-m", *(torchrun if processes > 1 else [])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    done = subprocess.run(
        [*words, "mm.verify.child", role, *map(str, roots)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gradients_of_a_module_that_runs_three_times(tmp_path: Path) -> None:
    """Two micro-batches in each of two processes, two steps."""
    roots = []
    for stage, precision in SETTINGS:
        root = tmp_path / f"{stage}-{precision}"
        (root / "tensors").mkdir(parents=True)
        change = {"engine": {"precision": precision}, "data": {"micro": 2}}
        run = make_run(root, "setting", steps=2, stage=stage, **change)
        values: dict[str, Any] = run.model_dump(mode="json") | {
            "imports": ["trainer_toys", "verify_faults"]
        }
        values["model"]["kind"] = "twice_lm"
        (root / "setting.yaml").write_text(json.dumps(values))
        plain = run.model_dump(mode="json")["engine"] | {"zero_stage": 0, "precision": "fp32"}
        (root / "reference.yaml").write_text(
            json.dumps(values | {"engine": plain, "name": "reference"})
        )
        (root / "job.json").write_text(json.dumps({"steps": 2, "config": root.name}))
        roots.append(root)
    start("setting", roots, 2)
    start("reference", roots, 1)
    wrong = {}
    for root in roots:
        told = [
            json.loads((root / f"{r}.json").read_text())["steps"] for r in ("setting", "reference")
        ]
        pairs = [(n, told[0][n], told[1][n]) for n in told[0]]
        for check in (judge._data(pairs), judge._losses(pairs), judge._worst("gradients", pairs)):
            if not check.agrees:
                wrong.setdefault(root.name, []).append(check)
    assert not wrong
