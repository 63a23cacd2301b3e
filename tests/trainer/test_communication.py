"""Overlap, messages' sizes and dtype, hierarchical partitioning and offload against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import differences, make_run, verify_child
from trainer_toys import toys_registered  # noqa: F401

from mm.verify import verify as judge

OVERLAP = {"communication": {"overlap_comm": True}}
HOST = {"offload": {"optimizer": "cpu"}}
BF16_WIRE = {"communication": {"overlap_comm": True, "dtype": "bf16", "bucket_size": 300}}
SETTINGS: list[tuple[str, int, dict[str, Any]]] = [
    *((f"overlap-{s}", s, OVERLAP) for s in range(4)),
    *((f"host-{s}", s, HOST) for s in (1, 2, 3)),
    ("both-3", 3, {"offload": {"optimizer": "cpu", "parameters": "cpu"}}),
    *((f"wire-{s}", s, BF16_WIRE) for s in range(4)),
    ("near-3", 3, {"communication": {"hpz_partition_size": 2}}),
]


def settings(root: Path, precision: str) -> list[Path]:
    """Folders as `mm.verify.child` wants them: two micro-batches a process, three steps."""
    roots = []
    for name, stage, engine in SETTINGS:
        here = root / name
        (here / "tensors").mkdir(parents=True)
        change = {"engine": {"precision": precision, **engine}, "data": {"micro": 2}}
        run = make_run(here, "setting", steps=3, stage=stage, **change)
        values = run.model_dump(mode="json") | {"imports": ["trainer_toys", "verify_faults"]}
        reference = judge.as_reference(run).model_dump(mode="json")["engine"]
        (here / "setting.yaml").write_text(json.dumps(values))
        plain = values | {"engine": reference, "name": "reference"}
        (here / "reference.yaml").write_text(json.dumps(plain))
        (here / "job.json").write_text(json.dumps({"steps": 3, "config": name}))
        roots.append(here)
    return roots


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("processes", "precision"), [(2, "fp32"), (2, "autocast_bf16"), (2, "bf16"), (4, "fp32")]
)
def test_gradients_and_updates_are_those_of_one_process(
    tmp_path: Path, processes: int, precision: str
) -> None:
    """DeepSpeed #4851 and #5059: hierarchical partitioning that does not converge."""
    roots = settings(tmp_path, precision)
    verify_child("setting", roots, processes)
    verify_child("reference", roots, 1)
    assert not {root.name: found for root in roots if (found := differences(root))}
