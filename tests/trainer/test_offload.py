"""Masters, optimizer states and weights outside the device: a save, a resume, another place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_runs import losses, make_run, resume_bitwise, stop_at
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.registry import OPTIMIZERS
from mm.run import Run
from mm.trainer.loop import train

BOTH = {"optimizer": "cpu", "parameters": "cpu"}


def run(tmp_path: Path, name: str, stage: int, offload: dict[str, Any], **change: Any) -> Run:
    return make_run(tmp_path, name, stage=stage, engine={"offload": offload}, **change)


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, {"optimizer": "cpu"}), (2, {"optimizer": "cpu"}), (3, BOTH)]
)
def test_a_resume_gives_the_same_bits(tmp_path: Path, stage: int, offload: dict[str, Any]) -> None:
    keys = {"stage_keys": {"ema": {"decay": 0.9}}}
    whole, halves = (run(tmp_path, name, stage, offload, **keys) for name in ("whole", "halves"))
    resume_bitwise(whole, halves, files=("model", "model.optimizer"))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a new environment builds DeepSpeed's operator for disks first
@pytest.mark.parametrize("parameters", ["device", "cpu", "nvme"])
def test_a_run_goes_on_from_the_disk_and_off_it(tmp_path: Path, parameters: str) -> None:
    """Of a model whose slices are large enough to leave memory: over a megabyte."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(False):
        pytest.skip("disks: libaio-dev is not installed")
    wide = {"model": {"d": 512}, "stage_keys": {"optimizer": {"kind": "adamw", "lr": 1e-4}}}
    disk = {"optimizer": "nvme", "parameters": parameters, "folder": str(tmp_path / "swap")}
    bf16 = {"precision": "bf16"}
    make = lambda name, offload=disk: make_run(
        tmp_path, name, stage=3, engine={"offload": offload, **bf16}, **wide
    )
    whole, halves = make("whole"), make("halves")
    resume_bitwise(whole, halves, files=("model", "model.optimizer"))
    assert any((tmp_path / "swap").rglob("*exp_avg_sq*.swp")), "the states were on the disk"
    found = [*(tmp_path / "swap").rglob("*_param.tensor.swp")]
    assert bool(found) == (parameters == "nvme")
    moved = make("moved")
    stop_at(moved, 3)
    train(make("moved", offload={}))  # the same checkpoint in the device's memory
    assert losses(moved) == losses(whole)


@pytest.mark.parametrize(
    ("stage", "engine", "said"),
    [
        (0, {"offload": {"optimizer": "cpu"}}, "offload.optimizer: needs zero_stage: 1"),
        (2, {"offload": {"parameters": "cpu"}}, "offload.parameters: needs zero_stage: 3"),
        (3, {"offload": {"optimizer": "nvme"}}, "offload.folder: nvme needs a folder"),
        (2, {"communication": {"hpz_partition_size": 2}}, "needs zero_stage: 3, and it is 2"),
    ],
)
def test_what_a_stage_cannot_is_refused_when_the_config_is_read(
    tmp_path: Path, stage: int, engine: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_run(tmp_path, stage=stage, engine=engine)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"communication": {"quantized_gradients": True}}, "read gradients as float16"),
        ({"communication": {"quantized_weights": True}}, "its kernels need a GPU"),
        ({"communication": {"hpz_partition_size": 2}}, "2 does not divide 1 processes"),
        ({"offload": {"parameters": "nvme", "folder": "swap"}}, "rounds weights in fp32"),
    ],
)
def test_what_cannot_work_here_is_refused_before_the_first_step(
    tmp_path: Path, engine: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(make_run(tmp_path, stage=3, engine=engine))


def test_an_average_of_what_is_on_the_disk_is_refused(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    disk = {"optimizer": "nvme", "folder": str(tmp_path / "swap")}
    said = "stages.N.ema" if AsyncIOBuilder().is_compatible(False) else "libaio-dev"
    with pytest.raises(UserError, match=said):
        train(run(tmp_path, "run", 3, disk, stage_keys={"ema": {"decay": 0.9}}))


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_every_optimizer_takes_the_same_steps_on_the_host(tmp_path: Path, kind: str) -> None:
    keys = {
        "optimizer": {"kind": kind, "lr": 1e-3},
        "schedule": {"shape": "constant", "warmup": 2},  # what schedule-free ones want
    }
    device, host = (
        run(tmp_path, name, 2, offload, steps=3, stage_keys=keys)
        for name, offload in (("device", {}), ("host", {"optimizer": "cpu"}))
    )
    train(device)
    train(host)
    assert losses(host) == pytest.approx(losses(device), rel=1e-6)
