"""What ranks do together: other data are refused, and nobody waits in a collective for the main."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import start_toys

from mm import config as configs
from mm.data.pack.job import pack
from mm.launch import environment
from mm.run import Run
from mm.trainer import same_data
from mm.trainer.loop import train
from mm.vocabulary import Vocabulary

pytestmark = pytest.mark.timeout(400)

REFUSED = """
import sys
from mm.errors import UserError
from mm.trainer.loop import train
try:
    train(sys.argv[1])
except UserError as error:
    print(error)
"""
DAMAGED = """
import logging, sys
from pathlib import Path

from mm.errors import UserError
from mm.trainer import ranks
from mm.trainer.engine.process_group import join
from mm.trainer.loop import train

logging.basicConfig(stream=sys.stdout, level="WARNING", format="%(message)s")
assert ranks.newest_checkpoint(Path(sys.argv[2]), join(1)) is None
try:
    train(sys.argv[1])
except UserError as error:
    print(error, flush=True)
"""
# The main rank goes on from each of its works only when the other is seen to wait for its turn.
TURNS = """
import datetime, os, sys, threading, time
from pathlib import Path

import torch.distributed as dist

from mm.trainer import export, loop, ranks, start
from mm.trainer.callbacks import samples
from mm.trainer.engine.process_group import join

me, seen = int(os.environ["RANK"]), Path(sys.argv[2])


def waits():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_code.co_name == "main_alone":
            return True
        frame = frame.f_back
    return False


def watch():
    while True:
        seen.touch() if waits() else seen.unlink(missing_ok=True)
        time.sleep(0.02)


def slow(owner, name):
    real = getattr(owner, name)

    def work(*args, **kw):
        end = time.monotonic() + 20
        while me == 0 and not seen.exists() and time.monotonic() < end:
            time.sleep(0.02)
        print(name, seen.exists(), flush=True)
        return real(*args, **kw)

    setattr(owner, name, work)


if me:
    threading.Thread(target=watch, daemon=True).start()
for owner, name in ((start, "check"), (start, "survey"), (loop, "rehearse"), (loop, "clean"),
                    (start, "describe"), (export, "export"), (samples.Samples, "_generate")):
    slow(owner, name)
loop.train(sys.argv[1])

group = dist.group.WORLD
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), group)
ranks.on_main(lambda: time.sleep(4), join())
print("through", flush=True)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_toys.packed(tmp_path_factory.mktemp("ranks"), n=8)


def other_data(root: Path, there: Path) -> Path:
    """The same places below ``there``, with one sample less in the shards."""
    shutil.copytree(root, there)
    for suffix in ("png", "txt"):
        (there / "raw" / "train" / f"003.{suffix}").unlink()
    for name in ("data", "tokens"):
        shutil.rmtree(there / name)
    pack(there / "raw", there / "data", progress=False)
    vocabulary = there / "tokens" / "vocabulary.json"
    pack(there / "data", there / "tokens", tokenizers=there / "tokenizers", progress=False)
    assert Vocabulary.load(vocabulary) is not None
    return there


def in_two(folder: Path, program: str, words: Sequence[Sequence[str]]) -> list[str]:
    """Standard output of ``program`` in two processes, each with its own words."""
    (folder / "program.py").write_text(program)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(environment.free_port())}
    started = []
    for rank, own in enumerate(words):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **where}
        command = [sys.executable, "program.py", *own]
        env = os.environ | {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"} | env
        with (folder / f"{rank}.txt").open("w") as file:
            started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=file))
    try:
        assert [process.wait(180) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)]


def saved(run: Run, path: Path) -> list[str]:
    path.write_text(configs.dump(run))
    return [str(path)]


def test_what_is_compared_are_the_data_not_their_places(root: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy", other_data(root, tmp_path / "other")
    shutil.copytree(root, copy)

    def found(where: Path) -> dict[str, Any]:
        run = start_toys.make_run(where, tmp_path / "runs")
        words = Vocabulary.load(where / "tokens" / "vocabulary.json")
        seen = same_data.found_here(run, words, 0)
        return {key: value.fingerprint for key, value in seen.items()}

    here = found(root)
    assert list(here) == ["vocabulary", "stages.0.data.sources.0"]
    assert found(copy) == here
    assert {k for k, v in found(other).items() if v != here[k]} == {"stages.0.data.sources.0"}
    shutil.rmtree(copy / "tokens")
    run = start_toys.make_run(copy, tmp_path / "runs")
    assert same_data.found_here(run, None, 0)["stages.0.data.sources.0"][0] == "no packed data"


@pytest.mark.slow
def test_two_machines_with_other_data_are_refused(root: Path, tmp_path: Path) -> None:
    """By all ranks and before anything is written or built."""
    other = other_data(root, tmp_path / "other")
    runs = [start_toys.make_run(where, tmp_path / "runs") for where in (root, other)]
    words = [saved(run, tmp_path / f"{n}.yaml") for n, run in enumerate(runs)]
    told = in_two(tmp_path, REFUSED, words)
    assert told[0] == told[1]
    assert told[0].startswith("stages.0.data.sources.0: the data are not the same")
    for rank, where in enumerate((root, other)):
        assert f"rank {rank} on " in told[0] and f"at {where / 'tokens'}" in told[0]
    assert not runs[0].folder.exists()


@pytest.mark.slow
def test_what_is_damaged_for_one_is_named_by_all(root: Path, tmp_path: Path) -> None:
    """A file of a checkpoint, and a shard on one machine: file and rank."""
    other = tmp_path / "other"
    shutil.copytree(root, other)
    shard = sorted((other / "tokens" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    alone = start_toys.make_run(root, tmp_path / "alone", steps=1, evaluate=False)
    train(alone)
    (folder,) = (alone.folder / "checkpoints").glob("step_*")
    tensors = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")[1]  # of rank 1
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    runs = [start_toys.make_run(where, tmp_path / "runs") for where in (root, other)]
    words = [saved(run, tmp_path / f"{n}.yaml") for n, run in enumerate(runs)]
    for told in in_two(tmp_path, DAMAGED, [[*own, str(folder.parent)] for own in words]):
        first, last = [line for line in told.splitlines() if "rank 1 on " in line]
        assert f"{folder.name} is not used" in first and f": {tensors.name} does not" in first
        assert last.startswith("rank 1 on ") and f": {shard}: has " in last


@pytest.mark.slow
def test_nobody_waits_in_a_collective_for_the_main_rank(root: Path, tmp_path: Path) -> None:
    """Check, survey, rehearsal, description, samples, export; and past a collective's limit."""
    samples = {"kind": "samples", "every": 1, "prompts": [{"text": "a", "to": "image"}]}
    run = start_toys.make_run(root, tmp_path / "runs", steps=1, callbacks=[samples])
    words = [*saved(run, tmp_path / "run.yaml"), str(tmp_path / "seen")]
    main, other = in_two(tmp_path, TURNS, [words, words])
    named = ["check", "survey", "rehearse", "clean", "describe", "_generate", "export"]
    assert main.splitlines() == [*(f"{name} True" for name in named), "through"]
    assert other.split() == ["through"]
    assert json.loads((run.folder / "model" / "config.json").read_text())
