"""`mm launch mpi` with a real mpirun, and the ranks that MPI starters set."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from machines import Hosts, background, mm, need, steps_done, toy_run, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_mpirun_starts_two_ranks_that_save_and_go_on(tmp_path: Path) -> None:
    need("mpirun")
    config = toy_run(tmp_path, steps=1_000_000, checkpoints={"every": 0})
    words, folder = ("launch", "mpi", str(config), "--gpus-per-node", "2"), tmp_path / "run"
    with background(*words, cwd=tmp_path, WANDB_API_KEY="k" * 40) as child:
        wait_for(lambda: steps_done(folder) > 5 or child.poll() is not None, 300, "first steps")
        assert child.poll() is None, child.communicate()[0]
        command = Path(f"/proc/{child.pid}/cmdline").read_bytes()
        os.kill(child.pid, signal.SIGTERM)
        said, _ = child.communicate(timeout=300)
    assert child.returncode == 75 and "the same command goes on" in said, said
    assert "[rank 0] run: " in said and "2 processes" in said and b"k" * 40 not in command
    last = max(int(f.name.split("_")[1]) for f in (folder / "checkpoints").glob("step_*"))
    code, said = mm(*words, f"stages.0.budget.steps={last + 4}", cwd=tmp_path, timeout_s=400)
    assert code == 0 and f"run {last + 4}/{last + 4}" in said, said
    for file in (folder / "launch").rglob("*"):
        assert "k" * 40 not in file.read_text(errors="replace") if file.is_file() else True


def test_the_error_of_a_rank_is_told(tmp_path: Path) -> None:
    need("mpirun")
    config = toy_run(tmp_path)
    (tmp_path / "vocabulary.json").write_text("{}")
    code, said = mm(
        "launch", "mpi", str(config), "--gpus-per-node", "2", cwd=tmp_path, timeout_s=400
    )
    assert code == 2 and "vocabulary.json" in said.splitlines()[-1], said


def test_two_hosts_are_checked_by_mpirun_before_they_train(hosts: Hosts, tmp_path: Path) -> None:
    need("mpirun")
    config = toy_run(tmp_path)
    given = ("launch", "mpi", str(config), "--nodes", "2", f"cluster.hostfile={hosts.hostfile()}")
    options = f"cluster.options=--mca btl_tcp_if_include 10.{hosts.net}.0.0/24"
    code, said = mm(*given, options, cwd=tmp_path, timeout_s=400, PATH=hosts.ssh_for_all())
    assert code == 0, said
    assert "preflight of 2 hosts" in said and "2 processes" in said and "run 6/6" in said
