"""A module that runs several times in a step: right gradients at every stage and precision.

DeepSpeed #8224: wrong ones at stage 2 in bf16 with several processes, without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import differences, make_run, verify_child
from trainer_toys import toys_registered  # noqa: F401

from mm.verify import verify as judge

OVERLAP = {"communication": {"overlap_comm": True, "bucket_size": 300}}
SETTINGS = [
    (stage, precision, name, engine)
    for stage in range(4)
    for precision in ("fp32", "autocast_bf16", "bf16")
    for name, engine in (("plain", {}), ("overlap", OVERLAP))
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gradients_of_a_module_that_runs_three_times(tmp_path: Path) -> None:
    """Two micro-batches in each of two processes, two steps; messages of some parameters, too."""
    roots = []
    for stage, precision, name, engine in SETTINGS:
        root = tmp_path / f"{stage}-{precision}-{name}"
        (root / "tensors").mkdir(parents=True)
        change = {"engine": {"precision": precision, **engine}, "data": {"micro": 2}}
        run = make_run(root, "setting", steps=2, stage=stage, **change)
        values: dict[str, Any] = run.model_dump(mode="json") | {
            "imports": ["trainer_toys", "verify_faults"]
        }
        values["model"]["kind"] = "twice_lm"
        (root / "setting.yaml").write_text(json.dumps(values))
        plain = judge.as_reference(run).model_dump(mode="json")["engine"]
        (root / "reference.yaml").write_text(
            json.dumps(values | {"engine": plain, "name": "reference"})
        )
        (root / "job.json").write_text(json.dumps({"steps": 2, "config": root.name}))
        roots.append(root)
    verify_child("setting", roots, 2)
    verify_child("reference", roots, 1)
    assert not {root.name: found for root in roots if (found := differences(root, updates=False))}
