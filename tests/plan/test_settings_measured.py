"""Peak of live bytes and bytes of messages of real steps, under what the engine can be told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mm.plan.gpus import find
from mm.plan.measured import measure_settings
from mm.plan.plan import Cluster, make_plan, open_stage
from mm.plan.trace import fake_mode
from mm.run import Run
from mm.trainer.checkpoint.cost import cost, files_of

ROOT = Path(__file__).parents[2]
STAGE, WIRE, HOST = "engine.zero_stage=", "engine.communication.", "engine.offload."
OVERLAP = WIRE + "overlap_comm=true"
SMALL = WIRE + "bucket_size=1500000"
MICRO = "stages.0.data.micro_batch_size=1"
SAVE = "checkpoints.background=true"
SETTINGS: dict[str, list[str]] = {
    **{f"overlap-{s}": [f"{STAGE}{s}", OVERLAP] for s in range(4)},
    **{f"host-{s}": [f"{STAGE}{s}", HOST + "optimizer=cpu", SAVE] for s in (1, 2, 3)},
    "both-3": [STAGE + "3", HOST + "optimizer=cpu", HOST + "parameters=cpu", OVERLAP],
    "near-3": [STAGE + "3", WIRE + "hpz_partition_size=2", MICRO],
    **{f"wire-{s}": [f"{STAGE}{s}", WIRE + "dtype=bf16", SAVE] for s in range(4)},
    **{f"buckets-{s}": [f"{STAGE}{s}", SMALL, OVERLAP, MICRO] for s in range(4)},
    "narrow-3": [STAGE + "3", WIRE + "dtype=bf16", "engine.precision=autocast_bf16"],
    **{f"still-{s}": [f"{STAGE}{s}", "stages.0.freeze=[backbone.*]"] for s in (1, 3)},
    "bf16-2": [STAGE + "2", "engine.precision=bf16", HOST + "optimizer=cpu", MICRO],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine million parameters."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan as benchmark
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    asked = SimpleNamespace(d_model=384, depth=5, tokens=128, rows=4, precision="fp32")
    prepare: Any = vars(benchmark)["prepare"]
    return prepare(tmp_path_factory.mktemp("measured"), asked, "dense")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_steps_and_saves_are_those_planned(config: Path) -> None:
    """Two processes: peak within 10 %, messages within 1 %; device and host are one memory here.

    A save in the foreground makes no second copy, one in the background that of `Cost`, and
    neither sends anything.
    """
    assert os.environ.get("OMP_NUM_THREADS")
    file = config.with_name("found.json")
    # A launch each: what an engine leaves in its process counts in the peaks of the next ones.
    measured = [
        measure_settings(config, [each], file, 2, os.environ)[0] for each in SETTINGS.values()
    ]
    cluster, wrong = Cluster(find("cpu"), 1, 2), {}
    for (name, changes), saw in zip(SETTINGS.items(), measured, strict=True):
        run = Run.load(config, changes)
        planned = make_plan(run, cluster, longest=False, variants=False)
        held, host = planned["memory"], planned["memory"]["host_by_part"]
        copies = host.get("copies of a save", 0)
        peak = held["total_bytes"] + held["host_bytes"] - copies
        sent, counted = sum(planned["collectives"].values()), sum(saw["collectives"].values())
        errors = {
            "peak": peak / saw["peak_bytes"] - 1,
            "sent": (sent / counted - 1) * 10,  # a tenth of the tolerance
        }
        if SAVE in changes:
            subject = open_stage(run, cluster, 0, None)
            with fake_mode():
                shapes = {
                    n: tuple(p.shape) for n, p in subject.networks()[0]["model"].named_parameters()
                }
            files = files_of(shapes, run.engine.effective_zero_stage, 2, ("exp_avg", "exp_avg_sq"))
            errors["copies"] = copies / saw["background_save"] - 1
            errors["cost"] = (cost(files, 2).most / saw["save_writes"] - 1) * 10
            errors["second copy"] = saw["save"] / saw["save_writes"]
            assert saw["save_collectives"] == 0
        print(name, {k: f"{v:+.2%}" for k, v in errors.items()})
        if any(abs(error) >= 0.1 for error in errors.values()):
            wrong[name] = errors
    assert not wrong
