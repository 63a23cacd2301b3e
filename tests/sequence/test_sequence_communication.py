"""Rows shared by processes with overlap, small messages, hierarchical partitioning and offload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_sequence_training import run_of
from trainer_runs import differences, verify_child
from trainer_toys import toys_registered  # noqa: F401

from mm.verify import verify as judge

OVERLAP = {"overlap_comm": True, "bucket_size": 300}
SETTINGS: list[tuple[str, int, dict[str, Any]]] = [
    *((f"overlap-{stage}", stage, {"communication": OVERLAP}) for stage in range(4)),
    ("near-3", 3, {"communication": {**OVERLAP, "hpz_partition_size": 2}}),
    *((f"host-{stage}", stage, {"offload": {"optimizer": "cpu"}}) for stage in (1, 2, 3)),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [2, 4])
def test_they_train_as_one_process(tmp_path: Path, processes: int) -> None:
    """Rows, losses, gradients and updates of two steps; of four processes two share rows."""
    roots = []
    for name, stage, engine in SETTINGS:
        root = tmp_path / name
        (root / "tensors").mkdir(parents=True)
        run = run_of(root, "setting", steps=2, stage=stage, engine=engine)
        values = run.model_dump(mode="json") | {"imports": ["trainer_toys"]}
        plain = judge.as_reference(run).model_dump(mode="json")["engine"]
        (root / "setting.yaml").write_text(json.dumps(values))
        (root / "reference.yaml").write_text(
            json.dumps(values | {"engine": plain, "name": "reference"})
        )
        (root / "job.json").write_text(json.dumps({"steps": 2, "config": name}))
        roots.append(root)
    verify_child("setting", roots, processes)
    verify_child("reference", roots, 1)
    assert not {root.name: found for root in roots if (found := differences(root))}
