"""Which device a process takes, how many processes there may be, and ranks that do not fit."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from mm.decoders.device import choose_device, why_no_gpu
from mm.errors import UserError
from mm.launch.environment import Ranks, free_port
from mm.quickstart.steps import Steps
from mm.trainer.engine.process_group import (
    local_device,
    processes_here,
    require_one_kind,
    require_own_devices,
    tell_all,
)
from mm.verify.verify import verify

JOINS = """
import os, sys
from mm.trainer.engine import process_group
if os.environ["RANK"] == "0":
    process_group.describe = lambda device: "first GPU-1"
process_group.join(1)
"""

DIES_ONCE = """
import os, sys
import torch, torch.distributed as dist
from mm.trainer.engine import process_group
process_group.join(1)
x = torch.ones(1)
dist.all_reduce(x)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    sys.exit(3)
print("sum", x.item(), flush=True)
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one GPU, as PyTorch tells of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine whose NVIDIA driver PyTorch cannot use."""
    (tmp_path / "nvidia-smi").write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("nvidia-smi")
    return monkeypatch


# ---- the device of a process ----


def test_the_best_device_is_this_process_s_gpu(gpus: pytest.MonkeyPatch) -> None:
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"--device cuda:1: torch sees 1 GPUs; see: mm doctor"):
        choose_device("cuda:1")
    for word in ("tpu", "meta", "mps", ""):
        with pytest.raises(UserError, match=rf"--device {word}: auto, cpu, cuda or cuda:N"):
            choose_device(word)
    gpus.setenv("LOCAL_RANK", "3")
    assert choose_device() == torch.device("cuda", 0)  # the launcher shows each its own
    gpus.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device() == torch.device("cuda", 3)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_that_cannot_be_used_is_told(
    no_gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("driver too old (found version 12010)\nmore")

    no_gpu.setattr(torch.version, "cuda", "13.0")
    no_gpu.setattr(torch.cuda, "init", fails)
    why = "PyTorch was built for CUDA 13.0 and says: driver too old (found version 12010)"
    assert why_no_gpu() == why
    with caplog.at_level(logging.WARNING, "mm"):
        assert choose_device() == torch.device("cpu")
    assert [r.getMessage() for r in caplog.records] == [
        f"this machine has an NVIDIA driver, but PyTorch sees no GPU ({why}): running on the CPU; "
        "for more: mm doctor"
    ]
    with pytest.raises(UserError, match="--device cuda: PyTorch was built for CUDA 13.0"):
        choose_device("cuda")
    no_gpu.setattr(torch.version, "cuda", None)
    assert why_no_gpu() == "this PyTorch is a CPU build"
    no_gpu.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_gpu() is None


# ---- how many processes ----


def test_as_many_processes_as_gpus_else_as_cores(gpus: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the project starts itself on one GPU is one process, whatever the cores."""
    assert processes_here(2, 16) == 1
    steps, said = Steps(tmp_path, "quickstart"), []
    gpus.setattr(steps, "run", lambda *words: said.append(words))
    steps.launch(2, "train", "CONFIG")
    assert said == [("train", "CONFIG")]
    run: Any = SimpleNamespace(stages=[SimpleNamespace(budget=SimpleNamespace(steps=4))])
    with pytest.raises(UserError, match="--processes 2: .* this machine has 1: --processes 1"):
        verify(run, 2)
    gpus.setattr(torch.cuda, "device_count", lambda: 8)
    assert processes_here(2, 1) == 2
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    assert [processes_here(2, cores) for cores in (1, 2, 16)] == [1, 2, 2]


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local_device(Ranks(5, 8, 1, 4), 4) == 1
    with pytest.raises(UserError, match="sees 2 GPUs.*--nproc-per-node 2"):
        local_device(Ranks(2, 4, 2, 4), 2)
    with pytest.raises(UserError, match="sees 1 GPUs"):
        local_device(Ranks(1, 2, 1, 2), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # the launcher shows each process its own
    assert local_device(Ranks(3, 4, 3, 4), 1) == 0


# ---- ranks that do not fit together ----


def test_ranks_that_do_not_fit_are_named() -> None:
    cpus = ["a no GPU: PyTorch sees none"] * 2
    require_own_devices(cpus)
    require_one_kind(cpus)
    require_one_kind(["a 1", "b 1"])
    require_own_devices(["a 1", "a 2", "b 1"])
    with pytest.raises(UserError, match="ranks 0 and 2 share the GPU a 1"):
        require_own_devices(["a 1", "a 2", "a 1"])
    with pytest.raises(UserError, match=r"rank 1 on b has no GPU \(old driver\), and 2 of 3 ranks"):
        require_one_kind(["a 1", "b no GPU: old driver", "c 1"])


def test_every_rank_hears_of_all() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        told = [pool.submit(tell_all, store, rank, 3, f"host {rank}") for rank in range(3)]
    assert [one.result() for one in told] == [["host 0", "host 1", "host 2"]] * 3


@pytest.mark.slow
def test_a_rank_without_its_gpu_ends_all_at_once() -> None:
    """Two processes, one of which says that it has a GPU: neither waits for the other's backend."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            env=os.environ | where | {"RANK": str(r), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for process in started:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "mm.errors.UserError: rank 1 on " in said and "has no GPU (" in said


@pytest.mark.slow
def test_torchrun_starts_again_what_died(tmp_path: Path) -> None:
    """The second time in the same store, which holds the addresses of the first."""
    (tmp_path / "program.py").write_text(DIES_ONCE)
    words = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", "program.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("sum 2.0") >= 2
