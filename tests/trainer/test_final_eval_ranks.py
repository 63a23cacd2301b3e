"""The evaluation at the end of a run, shared by its ranks: figures of one process, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import start_toys

from mm.launch.environment import free_port
from mm.run import Run
from mm.trainer.loop import train

PROGRAM = """
import json, os, sys
from types import SimpleNamespace

import torch.distributed as dist

from mm.errors import UserError
from mm.launch import environment
from mm.run import Run
from mm.tasks.bits_per_byte import BitsPerByte
from mm.trainer import final_eval
from mm.trainer.engine.process_group import join
from mm.trainer.health.signals import Stop
from mm.vocabulary import Vocabulary

run = Run.load(sys.argv[1])
device = join(1)
me = environment.ranks()
done = []
real = BitsPerByte.evaluate

def evaluate(self, generator, *, seed=0):
    done.append(self.full_name)
    if self.full_name == os.environ.get("BREAK"):
        raise UserError("this task is broken")
    return real(self, generator, seed=seed)

BitsPerByte.evaluate = evaluate
trainer = SimpleNamespace(
    run=run, folder=run.folder, device=device, is_main=me.is_main, step=2, tokenizers={},
    vocabulary=Vocabulary.load(run.vocabulary),
)
with Stop() as stop:
    try:
        found = final_eval.of_stage(trainer, 0, stop, None)
    except UserError as error:
        found = str(error)
json.dump({"found": found, "done": done}, open(f"{sys.argv[2]}_{me.rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with three tasks, evaluated by one process."""
    root = start_toys.packed(tmp_path_factory.mktemp("eval"), n=8)
    task = {"kind": "bits_per_byte", "data": str(root / "data"), "split": "val"}
    tasks = [
        task | {"modalities": ["text"]},
        task | {"modalities": ["image"]},
        task | {"name": "both", "given": {"image": "text"}},
    ]
    run = start_toys.make_run(root, root / "runs", stage={"tasks": tasks}, evaluate=True)
    (root / "alone.json").write_text(json.dumps(train(run)))
    return run


def by_two(run: Run, name: str, **variables: str) -> list[dict]:
    """What each of two processes found and did."""
    folder = run.out
    (folder / "program.py").write_text(PROGRAM)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "program.py", str(run.folder / "config.yaml"), name]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"} for r in range(2)]
    started = [
        subprocess.Popen(command, cwd=folder, env=os.environ | where | rank | variables)
        for rank in ranks
    ]
    assert [process.wait(240) for process in started] == [0, 0]
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_ranks_share_the_tasks_and_find_what_one_finds(trained: Run) -> None:
    alone = json.loads((trained.out.parent / "alone.json").read_text())
    main, other = by_two(trained, "shared")
    expected = {k: v for k, v in alone.items() if k.startswith("eval/")}
    assert len(expected) >= 12
    assert main["found"] == expected  # bit by bit: JSON keeps every float64
    assert other["found"] == {}
    assert len(main["done"]) + len(other["done"]) == 3


@pytest.mark.slow
def test_a_task_that_fails_on_one_rank_ends_all(trained: Run) -> None:
    main, other = by_two(trained, "broken", BREAK="both")
    assert "this task is broken" in main["found"]
    assert isinstance(other["found"], str)
