"""Started by others: SkyPilot, torchx and submitit, on two processes of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from machines import environment, steps_done, toy_run

from mm.launch import allocation, interface
from mm.launch.environment import free_port

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    ("source", "given"),
    [
        (
            "Open MPI",
            {f"OMPI_COMM_WORLD_{k}": "1" for k in ("RANK", "LOCAL_RANK")}
            | {f"OMPI_COMM_WORLD_{k}": "2" for k in ("SIZE", "LOCAL_SIZE")},
        ),
        (
            "MPICH",
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        ),
        (
            "submitit",
            {
                "SUBMITIT_LOCAL_JOB_ID": "31",
                "SUBMITIT_LOCAL_NTASKS": "2",
                "SUBMITIT_LOCAL_GLOBALID": "1",
                "SUBMITIT_LOCAL_LOCALID": "1",
            },
        ),
        (
            "Slurm",  # also what submitit's Slurm executor gives
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_STEP_NODELIST": "n1",
                "SLURM_JOB_ID": "31",
            },
        ),
    ],
)
def test_a_rank_of_another_starter_is_one_of_torchruns(source: str, given: dict[str, str]) -> None:
    environ = dict(given)
    assert allocation.adopt_ranks(environ) == source
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [environ[name] for name in names] == ["1", "2", "1", "2"]
    assert environ["MASTER_ADDR"] in ("127.0.0.1", "n1") and environ["MASTER_PORT"].isdigit()
    assert allocation.adopt_ranks(environ) is None  # torchrun's own win


def test_deepspeeds_ranks_know_how_many_are_on_their_node() -> None:
    environ = {"RANK": "2", "WORLD_SIZE": "4", "CROSS_RANK": "1", "LOCAL_SIZE": "2"}
    allocation.adopt_ranks(environ)
    assert environ["LOCAL_WORLD_SIZE"] == "2" and environ["RANK"] == "2"


@pytest.mark.parametrize(("here", "is_set"), [("1", True), ("2", False)])
def test_ranks_of_several_nodes_talk_over_the_interface_to_the_first(
    here: str, is_set: bool
) -> None:
    names = {a: n for n, a in interface.addresses().items() if not a.startswith("127.")}
    if not names:
        pytest.skip("this machine has a loopback alone")
    address = next(iter(names))
    environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": address}
    interface.set_interface(environ)
    expected = names[address] if is_set else None
    assert environ.get("GLOO_SOCKET_IFNAME") == environ.get("NCCL_SOCKET_IFNAME") == expected
    for own in ({"MASTER_ADDR": "127.0.1.1"}, {"GLOO_SOCKET_IFNAME": "mine"}):
        environ = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": address} | own
        interface.set_interface(environ)
        assert environ.get("GLOO_SOCKET_IFNAME") == own.get("GLOO_SOCKET_IFNAME")


def start(words: list[str], folder: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_every_node_of_a_skypilot_job_runs_mm_launch_local(tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    words = [sys.executable, "-m", "mm", "launch", "local", str(config)]
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
    words.append(f"cluster.port={free_port()}")
    both = [start(words, tmp_path, **sky, SKYPILOT_NODE_RANK=rank) for rank in "01"]
    said = [child.communicate(timeout=400)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert "2 processes; 6 steps" in said[0] and steps_done(tmp_path / "run") == 6


@pytest.mark.slow
def test_torchxs_dist_ddp_runs_mm_train(tmp_path: Path) -> None:
    """Its line and variables; torchx itself pins urllib3 1, which nothing here can be beside."""
    config = toy_run(tmp_path)
    words = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "localhost:0", "--rdzv_id", "mm-1", "--nnodes", "1",
        "--nproc_per_node", "2", "--tee", "3", "--role", "", "-m", "mm", "train", str(config),
    ]  # fmt: skip
    torchx = {"TORCHX_JOB_ID": "local_cwd://torchx/mm-1", "TORCHX_RANK0_HOST": "localhost"}
    child = start(words, tmp_path, **torchx)
    said, _ = child.communicate(timeout=200)
    assert child.returncode == 0 and "2 processes; 6 steps" in said, said
    assert steps_done(tmp_path / "run") == 6


@pytest.mark.slow
def test_submitits_local_executor_runs_mm_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="pip install submitit")
    config = toy_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    executor = submitit.LocalExecutor(folder=tmp_path / "submitit")
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    command = [sys.executable, "-m", "mm", "train", str(config)]
    job = executor.submit(submitit.helpers.CommandFunction(command))
    said = job.results()
    assert len(said) == 2 and steps_done(tmp_path / "run") == 6
    assert "2 processes; 6 steps" in said[0] + str(job.stderr())
