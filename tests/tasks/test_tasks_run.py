"""Tasks that several processes share: every figure once, on the first process; errors reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mm.launch.environment import free_port

PROGRAM = """
import json, os, sys, time
from mm.errors import UserError
from mm.tasks.run import measure

rank = int(os.environ.get("RANK", 0))

def evaluate(task):
    time.sleep(0.1 * (len(task) % 3))  # unequal work
    if task == "bad":
        raise UserError("bad failed")
    return {"length": len(task), "by": rank}

said = []
for tasks in (["a", "bb", "ccc", "dddd", "eeeee", "ffffff"], ["a", "bad", "bb", "dddd"]):
    try:
        said.append([(n, found["figures"]) for n, found in measure(tasks, evaluate)])
    except UserError as error:
        said.append(str(error))
open(f"{rank}.json", "w").write(json.dumps(said))
"""


def test_alone(tmp_path: Path) -> None:
    _check(_run(tmp_path, 1))


def test_two_processes_take_from_one_list(tmp_path: Path) -> None:
    first, second = _run(tmp_path, 2)
    _check([first])
    assert {figures["by"] for _, figures in first[0]} == {0, 1}
    assert second[0] == []


def _check(said: list) -> None:
    done, failed = said[0]
    assert [n for n, _ in sorted(done)] == list(range(6))
    assert [figures["length"] for _, figures in sorted(done)] == [1, 2, 3, 4, 5, 6]
    assert failed == "bad failed"


def _run(folder: Path, size: int) -> list:
    (folder / "program.py").write_text(PROGRAM)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(
            [sys.executable, "program.py"], cwd=folder, env=os.environ | where | {"RANK": str(rank)}
        )
        for rank in range(size)
    ]
    assert [process.wait(120) for process in started] == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
