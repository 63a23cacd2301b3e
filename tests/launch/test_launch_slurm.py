"""`mm launch slurm` on a real Slurm of two nodes: limits, preemption, chains, errors, consoles."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from machines import background, steps_done, toy_run, wait_for
from slurm_cluster import Slurm

from mm.launch import restarts
from mm.trainer.log import metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 200


def submit(slurm: Slurm, folder: Path, *more: str, steps: int = STEPS, **env: str) -> str:
    """Hand a toy run of two nodes to Slurm; the number of its job."""
    config = toy_run(folder, steps=steps, checkpoints={"every": 0})
    own = ("cluster.request_gpus=false", "cluster.limit_min=30", "cluster.partition=main")
    given = ("launch", "slurm", str(config), "--nodes", "2", *own, *more)
    code, said = slurm.mm(*given, cwd=folder, **env)
    assert code == 0 and "submitted: " in said, said
    return json.loads((folder / "run/launch/launch.json").read_text())["jobs"][0]


def history(folder: Path) -> str:
    file = folder / "run/launch/attempts.log"
    return file.read_text() if file.exists() else ""


def said_by_job(folder: Path) -> str:
    return "".join(f.read_text() for f in sorted((folder / "run/launch").glob("slurm-*.out")))


def wait_until_trained(folder: Path, steps: int = 20) -> None:
    have = lambda: steps_done(folder / "run") > steps or "ended: " in history(folder)
    wait_for(have, 300, f"{steps} steps")
    assert "ended: " not in history(folder), said_by_job(folder)


def wait_until(folder: Path, text: str, timeout_s: float = 100) -> None:
    wait_for(lambda: text in history(folder), timeout_s, f"'{text}'; {said_by_job(folder)[-3000:]}")


def losses(folder: Path) -> dict[int, float]:
    rows = metrics.read(folder / "run" / "metrics.jsonl")
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


@pytest.fixture(scope="module")
def unbroken(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    submit(slurm, folder, WANDB_API_KEY="k" * 40)
    wait_until(folder, "ended: all steps are done", 200)
    return folder


def test_two_nodes_train_as_one_world(slurm: Slurm, unbroken: Path) -> None:
    assert "preflight of 2 hosts" in said_by_job(unbroken)
    assert "2 processes" in said_by_job(unbroken) and len(losses(unbroken)) == STEPS
    code, said = slurm.mm("launch", "status", "run", cwd=unbroken)
    assert code == 0 and "all steps are done" in said, said
    code, said = slurm.mm("launch", "logs", "run", "--rank", "0", cwd=unbroken)
    assert code == 0 and f"run {STEPS}/{STEPS}" in said
    for file in (unbroken / "run" / "launch").rglob("*"):
        if file.is_file():
            assert "k" * 40 not in file.read_text(errors="replace"), f"{file} holds a secret"


def test_two_nodes_are_verified_as_one_world(slurm: Slurm, tmp_path: Path) -> None:
    config = toy_run(tmp_path, stage=2)
    own = ("cluster.request_gpus=false", "cluster.limit_min=30", "cluster.partition=main")
    given = ("launch", "slurm", str(config), "--nodes", "2", "--verify", "--no-preflight", *own)
    code, said = slurm.mm(*given, cwd=tmp_path)
    assert code == 0, said
    home = tmp_path / "run-verify" / "launch"
    attempts = home / "attempts.log"
    wait_for(lambda: attempts.exists() and "ended: " in attempts.read_text(), 300, "its end")
    said = "".join(f.read_text() for f in home.glob("slurm-*.out"))
    assert "2 processes, ZeRO stage 2" in said and "save and resume" in said, said
    assert "ended: all steps are done" in attempts.read_text() and "DIFFERS" not in said
    assert not (tmp_path / "run").exists() and not [*tmp_path.rglob("mm-verify-*")]


def test_nodes_that_do_not_fit_are_refused_before_a_step(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "cluster.env.GLOO_SOCKET_IFNAME=ib9")
    wait_until(tmp_path, "ended: ")
    assert "ended: refused by the preflight: 2 to mend" in history(tmp_path), said_by_job(tmp_path)
    said = said_by_job(tmp_path)
    assert "FIX: interface, n1: cluster.env.GLOO_SOCKET_IFNAME=" in said and "n2" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()
    wait_for(lambda: slurm.state(job) == "FAILED", 60, "the end of a job that is not tried again")


@pytest.mark.parametrize("after_limit", ["requeue", "chain", "array"])
def test_a_run_cut_by_the_limit_goes_on_with_the_losses_of_an_unbroken_one(
    slurm: Slurm, unbroken: Path, tmp_path: Path, after_limit: str
) -> None:
    more = () if after_limit == "requeue" else ("cluster.attempts=3",)
    job = submit(slurm, tmp_path, f"cluster.after_limit={after_limit}", *more)
    wait_until_trained(tmp_path)
    # what `--signal=B:USR1@180` sends
    slurm.ask("scancel", "--batch", "--signal=USR1", job + "_1" * (after_limit == "array"))
    wait_until(tmp_path, "ended: saved")
    assert list((tmp_path / "run/checkpoints").glob("step_*"))
    wait_until(tmp_path, "ended: all steps are done", 150)
    assert losses(tmp_path) == losses(unbroken)
    wait_for(lambda: not slurm.ask("squeue", "--noheader"), 90, "an empty queue")
    assert history(tmp_path).count("ended: saved") == 1
    first, second = restarts.read_history(tmp_path / "run")[:2]  # a chain's third does nothing
    assert first["step_to"] == second["step_from"] > 0 and second["step_to"] == STEPS
    assert first["nodes"] == ["n1", "n2"] and first["code"] != 0 and second["code"] == 0


def test_the_limit_itself_is_heard_in_time(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(
        slurm, tmp_path, "cluster.limit_min=2", "cluster.save_before_s=60", steps=1_000_000
    )
    wait_until(tmp_path, "ended: saved", 130)
    assert list((tmp_path / "run/checkpoints").glob("step_*"))
    wait_until(tmp_path, "restart 1: starts")
    code, said = slurm.mm("launch", "stop", "run", "--now", cwd=tmp_path)
    assert code == 0, said
    wait_for(lambda: slurm.state(job) == "CANCELLED", 30, "the job to be cancelled")


def test_a_preempted_job_saves_goes_on_and_stops_when_told(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, steps=1_000_000)
    wait_until_trained(tmp_path)
    slurm.ask(
        "sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null",
        "--wrap=true",
    )  # fmt: skip
    wait_until(tmp_path, "ended: saved")
    saved = steps_done(tmp_path / "run")
    wait_for(lambda: steps_done(tmp_path / "run") > saved, 100, "steps after the preemption")
    code, said = slurm.mm("launch", "slurm", str(tmp_path / "toy.yaml"), cwd=tmp_path)
    assert code == 2 and f"its job {job} is with the scheduler still" in said, said
    code, said = slurm.mm("launch", "stop", "run", cwd=tmp_path)
    assert code == 0, said
    wait_until(tmp_path, "ended: stopped with a checkpoint by mm launch stop")
    wait_for(lambda: not slurm.ask("squeue", "--noheader"), 30, "an empty queue")
    assert slurm.state(job) == "FAILED"  # its exit code: not all steps are done
    assert "resumed" in said_by_job(tmp_path) or "goes on" in said_by_job(tmp_path)


def test_an_error_is_tried_twice_and_not_a_third_time(slurm: Slurm, tmp_path: Path) -> None:
    held = ("cluster.options=[--hold]", "cluster.preflight=false")
    job = submit(slurm, tmp_path, *held)
    (tmp_path / "vocabulary.json").unlink()
    slurm.ask("scontrol", "release", job)
    wait_until(tmp_path, "restart 0: ended: failed with exit code 1")
    wait_until(tmp_path, "restart 1: ended: failed with exit code 1")
    wait_for(lambda: slurm.state(job) == "FAILED", 30, "the end of the job")
    assert "vocabulary.json" in said_by_job(tmp_path)


def test_on_the_console_ctrl_c_saves_and_the_same_command_goes_on(
    slurm: Slurm, tmp_path: Path
) -> None:
    config = toy_run(tmp_path, steps=1_000_000, checkpoints={"every": 0})
    words = (
        "launch", "slurm", str(config), "--nodes", "2", "cluster.request_gpus=false",
        "cluster.limit_min=30", "cluster.interactive=true",
    )  # fmt: skip
    folder = tmp_path / "run"
    with background(*words, cwd=tmp_path, **slurm.environ) as child:
        wait_for(lambda: steps_done(folder) > 5 or child.poll() is not None, 100, "first steps")
        assert child.poll() is None, child.communicate()[0]
        os.kill(child.pid, signal.SIGINT)
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 75 and "the same command goes on" in said, said
    assert "[rank 0] run: " in said and list((folder / "checkpoints").glob("step_*"))
    wait_for(lambda: not slurm.ask("squeue", "--noheader"), 30, "an empty queue")
