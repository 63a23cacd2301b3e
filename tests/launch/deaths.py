"""Deaths of a machine in a run of two; `survive` holds a run through one to what it must do."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import start_toys
import yaml
from machines import Hosts, background, mm, steps_done, wait_for

from mm.launch import record, restarts

STEPS = 40


def config(root: Path, name: str = "run", **change: Any) -> Path:
    """A run on real token shards: rows of a step fall on two machines, or on one."""
    slow = {"imports": ["slow_rank"], "callbacks": [{"kind": "toy_slow"}]}  # 0.05 s a step
    data = {"batch_size": 4, "seq_len": 128}
    change = slow | {"checkpoints": {"every": 5}, "data": data} | change
    stage = {"eval_every": 0, "allow_left_out": 1.0}
    values = start_toys.values(root, root / "out", name, steps=STEPS, stage=stage, **change)
    (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return root / f"{name}.yaml"


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


def cut(hosts: Hosts) -> None:
    """The cable is out; its processes live on."""
    hosts.inside(hosts.names[1], "ip", "link", "set", "eth7", "down")


def stop(hosts: Hosts) -> None:
    """A rank of it does nothing any more, and does not end."""
    os.kill(_rank_1(hosts), signal.SIGSTOP)


def kill_rank(hosts: Hosts) -> None:
    """A rank of it is killed, as by the kernel when memory is out."""
    os.kill(_rank_1(hosts), signal.SIGKILL)


def _rank_1(hosts: Hosts) -> int:
    return next(b["pid"] for b in record.beats(hosts.folder / "run") if b["rank"] == 1)


DEATHS: dict[str, tuple[Callable[[Hosts], None], str, int]] = {
    "killed": (lambda hosts: hosts.kill(hosts.names[1]), "ssh exits with 255", 1),
    "cut": (cut, "ssh exits with 255", 1),
    "stopped": (stop, "is stopped (SIGSTOP)", 2),
    "rank killed": (kill_rank, "ended by SIGKILL", 2),
}


def run_unbroken(root: Path) -> dict[int, float]:
    """Pack token shards under ``root``, train on them, and give the losses by step."""
    start_toys.packed(root)
    code, said = mm("train", str(config(root, "whole")), cwd=root, timeout_s=600)
    assert code == 0, said
    return losses(root / "out" / "whole")


def survive(hosts: Hosts, root: Path, name: str, death: str, expected: dict[int, float]) -> float:
    """Seconds from ``death`` to training again, of a run under ``root`` called ``name``.

    Raises AssertionError where the run ends, names another machine or other reasons, loses more
    steps than a checkpoint is apart, or has other losses than ``expected``.
    """
    die, word, world = DEATHS[death]
    file, folder = config(root, name), root / "out" / name
    (hosts.folder / "run").symlink_to(folder)
    words = ["launch", "ssh", str(file), f"cluster.hostfile={hosts.hostfile()}", "--no-preflight"]
    words.append(f"cluster.options={hosts.options}")
    with background(*words, cwd=root) as child:
        wait_for(lambda: steps_done(folder) > 11 or child.poll() is not None, 300, "step 12")
        assert child.poll() is None, child.communicate()[0]
        old = {beat["pid"] for beat in record.beats(folder)}
        die(hosts)
        died = time.monotonic()
        trains = lambda: any(
            b["pid"] not in old and b["phase"] == "report" for b in record.beats(folder)
        )
        wait_for(lambda: trains() or child.poll() is not None, 300, "training again")
        seconds = time.monotonic() - died
        said, _ = child.communicate(timeout=500)
    assert child.returncode == 0, said
    first, last = restarts.read_history(folder)
    assert word in first["why"] and first["node"] == hosts.addresses[1], first
    assert (first["world"], last["world"], last["code"]) == (2, world, 0)
    assert first["steps_lost"] <= 8 and last["step_from"] > 0 and last["step_to"] == STEPS
    found = losses(folder)
    assert found.keys() == expected.keys()
    assert [found[s] for s in found] == pytest.approx([expected[s] for s in found], rel=2e-4)
    return seconds
