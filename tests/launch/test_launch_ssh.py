"""`mm launch ssh` over two machines: network namespaces with a real sshd each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from machines import Hosts, background, mm, need, steps_done, toy_run, wait_for

pytestmark = pytest.mark.slow


def words(hosts: Hosts, config: Path, *more: str, slots: int = 1) -> list[str]:
    return [
        "launch",
        "ssh",
        str(config),
        f"cluster.hostfile={hosts.hostfile(slots)}",
        f"cluster.options={hosts.options}",
        *more,
    ]


def test_two_hosts_train_as_one_world(hosts: Hosts, tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    code, said = mm(*words(hosts, config), cwd=tmp_path, WANDB_API_KEY="k" * 40)
    assert code == 0, said
    assert "preflight" in said and "2 processes; 6 steps" in said
    assert f"[{hosts.addresses[0]} rank 0]" in said
    beats = [json.loads(f.read_text()) for f in sorted((tmp_path / "run/health").glob("*.json"))]
    assert [beat["rank"] for beat in beats] == [0, 1] and steps_done(tmp_path / "run") == 6
    for file in (tmp_path / "run" / "launch").rglob("*"):
        if file.is_file():
            assert "k" * 40 not in file.read_text(errors="replace"), f"{file} holds a secret"


def test_two_hosts_are_verified_as_one_world(hosts: Hosts, tmp_path: Path) -> None:
    config = toy_run(tmp_path, stage=3)
    code, said = mm(*words(hosts, config, "--verify", "--no-preflight"), cwd=tmp_path)
    assert code == 0, said
    assert "2 processes, ZeRO stage 3" in said and "DIFFERS" not in said and "agrees" in said
    assert (tmp_path / "run-verify" / "launch").is_dir()
    assert not (tmp_path / "run").exists() and not [*tmp_path.rglob("mm-verify-*")]


def test_deepspeeds_launcher_over_pdsh(hosts: Hosts, tmp_path: Path) -> None:
    need("pdsh")
    config = toy_run(tmp_path)
    given = words(hosts, config, "cluster.through=deepspeed")
    code, said = mm(*given, cwd=tmp_path, timeout_s=400, PATH=hosts.ssh_for_all())
    assert code == 0, said
    assert "2 processes; 6 steps" in said and steps_done(tmp_path / "run") == 6


def test_a_host_that_is_not_there_is_named(hosts: Hosts, tmp_path: Path) -> None:
    config = toy_run(tmp_path)
    given = words(hosts, config, "--no-preflight", "cluster.restarts=0")
    gone = f"10.{hosts.net}.0.9"
    (hosts.folder / "hostfile").write_text(f"{hosts.addresses[0]} slots=1\n{gone} slots=1\n")
    begun = time.monotonic()
    code, said = mm(*given, cwd=tmp_path)
    assert code != 0 and gone in said.splitlines()[-1], said
    assert f"ssh {gone} true" in said and time.monotonic() - begun < 60
    code, said = mm("launch", "status", str(tmp_path / "run"), cwd=tmp_path)
    assert code == 0 and "ended" in said and gone in said


def test_a_node_that_dies_ends_the_job_and_is_named(hosts: Hosts, tmp_path: Path) -> None:
    config = toy_run(tmp_path, steps=100_000, checkpoints={"every": 20})
    folder = tmp_path / "run"
    given = words(hosts, config, "--no-preflight", "cluster.restarts=0")
    with background(*given, cwd=tmp_path) as child:
        wait_for(lambda: steps_done(folder) > 5 or child.poll() is not None, 300, "the first steps")
        assert child.poll() is None, child.communicate()[0]
        hosts.kill(hosts.names[1])
        died = time.monotonic()
        said, _ = child.communicate(timeout=180)
    assert time.monotonic() - died <= 60 and child.returncode == 1, said
    assert f"mm: {hosts.addresses[1]}: " in said.splitlines()[-1], said
    assert said.count("Traceback") <= 1


def test_stop_saves_a_checkpoint_and_the_same_command_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    config = toy_run(tmp_path, steps=100_000, checkpoints={"every": 0})
    folder = tmp_path / "run"
    with background(*words(hosts, config, "--no-preflight"), cwd=tmp_path) as child:
        wait_for(lambda: steps_done(folder) > 2 or child.poll() is not None, 300, "the first steps")
        code, told = mm("launch", "stop", str(folder), cwd=tmp_path)
        said, _ = child.communicate(timeout=180)
    assert code == 0 and "stopped with a checkpoint" in told, told + said
    assert child.returncode == 75, said
    assert list((folder / "checkpoints").glob("step_*"))
