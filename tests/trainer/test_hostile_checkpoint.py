"""Checkpoints that are damaged or edited: passed over by name, or refused in one line by key."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.run import Run
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import train

JSON = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps, saved at 2 and 4."""
    run = make_run(tmp_path_factory.mktemp("hostile"), steps=4, checkpoints={"every": 2})
    train(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    shutil.copytree(trained.folder, tmp_path / trained.name)
    return make_run(tmp_path, trained.name, steps=6, checkpoints={"every": 2})


def last(run: Run) -> Path:
    return run.folder / "checkpoints" / "step_000004"


def sign(folder: Path) -> None:
    files = [f for f in folder.iterdir() if f.name != "COMPLETE"]
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (folder / "COMPLETE").write_text(json.dumps(hashes))


def header(path: Path, table: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(table)) + table + b"\0" * 64)


def indexed(folder: Path, **change: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    entry = index["files"]["model"]["up.weight"]
    index["files"]["model"]["up.weight"] = {"shape": entry["shape"], "dtype": "F32"} | change
    (folder / "index.json").write_text(json.dumps(index))


PASSED_OVER: dict[str, Callable[[Path], Any]] = {
    "mark a list": lambda f: (f / "COMPLETE").write_text("[]"),
    "mark null": lambda f: (f / "COMPLETE").write_text("null"),
    "mark of numbers": lambda f: (f / "COMPLETE").write_text('{"state.json": 1}'),
    "mark binary": lambda f: (f / "COMPLETE").write_bytes(b"\xff\xfe"),
    "mark nested": lambda f: (f / "COMPLETE").write_text("[" * 100_000),
    "mark that vouches for nothing": lambda f: (f / "COMPLETE").write_text("{}"),
    "mark gone": lambda f: (f / "COMPLETE").unlink(),
    "one more file": lambda f: (f / "more.safetensors").write_bytes(b""),
    "a byte of the state": lambda f: (f / "state.json").write_text("{}"),
}
STATES: dict[str, Callable[[Path], Any]] = {
    "state a list": lambda f: (f / "state.json").write_text("[]"),
    "state empty": lambda f: (f / "state.json").write_text(""),
    "state binary": lambda f: (f / "state.json").write_bytes(b"\xff\xfe"),
    "state nested": lambda f: (f / "state.json").write_text("[" * 100_000),
    "index a list": lambda f: (f / "index.json").write_text("[]"),
    "index gone": lambda f: (f / "index.json").unlink(),
    "index of other shapes": lambda f: indexed(f, shape=[9, 9, 9]),
    "index of half a number of processes": lambda f: indexed(f, rank=0.5),
    "index of a process that is not there": lambda f: indexed(f, rank=1),
    "index of shards that do not hold it": lambda f: indexed(f, rank=None, first=0, size=1),
    "index of more than there is": lambda f: indexed(f, shape=[2**40, 2**40]),
    "index of no dtype": lambda f: indexed(f, dtype="X1"),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
}
TENSORS: dict[str, Callable[[Path], Any]] = {
    "of 100 GB": lambda p: p.write_bytes(struct.pack("<Q", 10**11) + b"{}"),
    "beyond the file": lambda p: header(
        p, b'{"w":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'
    ),
    "a pickle": lambda p: torch.save({"w": torch.ones(2)}, p),
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-8]),
    "of shapes that overflow": lambda p: header(
        p,
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,64]}}',
    ),
}
FILES = {"weights": "model.safetensors", "optimizer": "model.optimizer.safetensors"}
SIGNED = STATES | {
    f"{what} {case}": (lambda f, case=case, name=name: TENSORS[case](f / name))
    for case in TENSORS
    for what, name in FILES.items()
}


@pytest.mark.parametrize("case", [*PASSED_OVER, *SIGNED])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    run: Run, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    (PASSED_OVER | SIGNED)[case](last(run))
    if case in SIGNED:
        sign(last(run))
    found = checkpoint.newest(run.folder / "checkpoints")
    assert found is not None and found.state["step"] == 2
    assert "checkpoint step_000004 is not used" in caplog.text


def edit(folder: Path, change: Callable[[JSON], Any]) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)


EDITS: dict[str, Callable[[JSON], Any]] = {
    "stage": lambda s: s.update(stage=9),
    "world": lambda s: s.update(world=0),
    "data": lambda s: s.update(data=None),
    "data ": lambda s: s.update(data=[]),
    "data.cursor.step": lambda s: s.update(data={"cursor": {"step": -1}}),
    "data.cursor.block": lambda s: s.update(data={"cursor": {"block": 10**18}}),
    "guard": lambda s: s.update(guard=None),
    "guard.bad": lambda s: s["guard"].update(bad="x"),
    "bytes_per_token": lambda s: s.update(bytes_per_token=[]),
    "optimizers": lambda s: s.update(optimizers=None),
    "config": lambda s: s.update(config="x"),
    "vocabulary": lambda s: s.pop("vocabulary"),
    "optimizer state": lambda s: s.update(optimizers={}),
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_state_is_refused_by_key(run: Run, key: str) -> None:
    edit(last(run), EDITS[key])
    with pytest.raises(UserError, match=key.strip()):
        train(run)


@pytest.mark.parametrize(
    "change", [{"schema": 99}, {"step": -1}, {"step": "4"}, {"step": None}, {"step": 3}]
)
def test_a_state_of_another_program_or_step_is_passed_over(run: Run, change: JSON) -> None:
    edit(last(run), lambda s: s.update(change))
    if change == {"schema": 99}:
        assert train(run)["resumed_from"] == 2
    else:
        assert checkpoint.newest(run.folder / "checkpoints").state["step"] == 2  # type: ignore[union-attr]


def test_folders_that_are_no_checkpoints_are_left_alone(run: Run) -> None:
    for name in ("step_²", "step_", "step_-1", "step_1e9"):
        (run.folder / "checkpoints" / name).mkdir()
    (run.folder / "checkpoints" / "step_000009").write_text("a file")
    assert train(run)["resumed_from"] == 4
    assert [check.step_of(f) for f in check.folders(run.folder / "checkpoints")] == [6, 4]


def test_weights_without_a_name_that_the_model_has_are_refused(run: Run) -> None:
    path = last(run) / "model.safetensors"
    tensors = load_file(str(path))
    tensors.pop("up.weight")
    save_file(tensors, str(path))
    index = json.loads((last(run) / "index.json").read_text())
    index["files"]["model"].pop("up.weight")
    (last(run) / "index.json").write_text(json.dumps(index))
    sign(last(run))
    with pytest.raises(UserError, match="has no 'up.weight'"):
        train(run)


def test_a_good_one_has_no_fault(trained: Run) -> None:
    assert check.fault_of(last(trained)) is None
    assert checkpoint.newest(trained.folder / "checkpoints") is not None


def test_690_weights_that_are_not_finite_save_no_model(run: Run) -> None:
    path = last(run) / "model.safetensors"
    save_file({n: torch.full_like(w, float("nan")) for n, w in load_file(path).items()}, path)
    sign(last(run))
    with pytest.raises(UserError, match=r"was not applied|were not finite|not finite"):
        train(run)
    assert (run.folder / "model.step").read_text() == "4"  # that of the run before


def test_693_a_file_in_the_place_of_the_checkpoints_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    run.folder.mkdir()
    (run.folder / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints"):
        train(run)
