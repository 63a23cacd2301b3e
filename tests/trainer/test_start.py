"""What a run refuses before its first step, and that a refusal leaves its folder as it was."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from start_toys import files, image_tokenizer, make_run, packed, values

from mm.data.pack.job import pack
from mm.errors import UserError
from mm.registry import CALLBACKS, TASKS
from mm.run import Run
from mm.trainer import folder
from mm.trainer.loop import train
from mm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def done(root: Path) -> Path:
    """A folder of runs with one of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(make_run(root, root / "runs"))
    return root / "runs"


def refused(run: Run) -> str:
    with pytest.raises(UserError) as told:
        train(run)
    return str(told.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"batch_size": 4}}, "batch_size: 2 -> 4"),
        ({"data": {"seq_len": 256}}, "seq_len: 512 -> 256"),
        ({"seed": 1}, "'seed' was 0 and is 1"),
        ({"stage": {"tasks": [{"kind": "bits_per_byte", "data": "nowhere"}]}}, "nowhere"),
        ({"callbacks": [{"kind": "samples", "prompts": [{"txt": "a", "to": "image"}]}]}, "txt"),
    ],
)
def test_a_refused_resume_changes_no_file(
    root: Path, done: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    """Nor does it open a W&B segment, or a health file of another job."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = files(done / "run")
    assert named in refused(make_run(root, done, steps=4, **change))
    assert files(done / "run") == before


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file"])
def test_a_refused_start_leaves_nothing_new_behind(root: Path, tmp_path: Path, there: str) -> None:
    """Neither the folder that it made, nor those above, nor a lock in what was there."""
    out = tmp_path / "new" / "runs"
    if there != "nothing":
        (out / "run").mkdir(parents=True)
    if there == "a file":
        (out / "run" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    gone: dict[str, Any] = {"stage": {"tasks": [{"kind": "bits_per_byte", "data": "nowhere"}]}}
    assert "nowhere" in refused(make_run(root, out, **gone))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_that_was_removed_while_it_was_opened_is_made_anew(tmp_path: Path) -> None:
    """Else two processes would hold two files of one name."""
    real, opened = fcntl.flock, []

    def flock(file: Any, how: int) -> None:
        real(file, how)
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with folder.lock(tmp_path):
            assert len(opened) == 2
            with pytest.raises(UserError, match=f"process {os.getpid()} trains here already"):
                folder.lock(tmp_path).__enter__()


def test_a_run_with_nothing_left_to_do_changes_no_file(
    root: Path, done: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget below the steps done is said."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    before = files(done / "run")
    assert train(make_run(root, done))["new_steps"] == 0
    assert "budget" not in caplog.text
    assert train(make_run(root, done, steps=1))["new_steps"] == 0
    assert "2 steps are done and the budget is 1" in caplog.text
    assert files(done / "run") == before


def test_a_changed_rate_or_budget_is_one_line_each(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(make_run(root, tmp_path, steps=1, evaluate=False))
    optimizer = {"optimizer": {"kind": "adamw", "lr": 5e-3}, "budget": {"steps": 2}}
    train(make_run(root, tmp_path, stage=optimizer))
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum("stages.0.optimizer.lr: 0.01 -> 0.005" in line for line in told) == 1
    assert sum("stages.0.budget.steps: 1 -> 2" in line for line in told) == 1


def test_a_run_with_another_tokenizer_is_refused_before_it_trains(
    root: Path, tmp_path: Path
) -> None:
    """Of the same size and of another: by the key and both fingerprints, and what to set."""
    for seed, settings in ((1, {}), (0, {"quantizer": {"kind": "fsq", "levels": (5, 3)}})):
        other = image_tokenizer(tmp_path / f"image{seed}", seed, **quantizer_of(settings))
        run = values(root, tmp_path, f"other{seed}")
        run["tokenizers"]["image"] = str(other)
        told = refused(Run.model_validate(run))
        assert (
            told.startswith(f"tokenizers.image: {other} is tokenizer ") and "mm data pack" in told
        )
        assert not (tmp_path / f"other{seed}" / "config.yaml").exists()
    run["tokenizers"] = {"image": str(root / "tokenizers" / "text")}
    assert "is a tokenizer of 'text'" in refused(Run.model_validate(run))


def quantizer_of(settings: dict[str, Any]) -> dict[str, Any]:
    from mm.registry import QUANTIZERS

    return {k: QUANTIZERS.parse(v) for k, v in settings.items()}


def test_a_run_with_another_vocabulary_is_told_which_one_to_set(root: Path, tmp_path: Path) -> None:
    """That of the shards, also where it has the same modalities in another size."""
    tokenizers = {
        "text": root / "tokenizers" / "text",
        "image": image_tokenizer(tmp_path / "image", 3),
    }
    pack(root / "data", tmp_path / "tokens", tokenizers=tokenizers, progress=False)
    for path in (tmp_path / "tokens" / "vocabulary.json", tmp_path / "text.json"):
        if not path.exists():
            Vocabulary(Vocabulary.load(root / "tokens" / "vocabulary.json").ranges[:1]).save(path)
        run = values(root, tmp_path) | {"vocabulary": str(path)}
        assert f"vocabulary={root}/tokens/vocabulary.json" in refused(Run.model_validate(run))


@pytest.mark.parametrize(
    ("task", "named"),
    [
        ({"kind": "recognition", "data": "nowhere"}, "no packed data at nowhere"),
        ({"kind": "recognition", "split": "test"}, "no split 'test'"),
        ({"kind": "recognition", "split": "val"}, "a class; give the class words in 'classes'"),
        ({"kind": "recognition", "split": "val", "classes": ["cow"]}, "and a class"),
        ({"kind": "recognition", "split": "val", "to": "txt"}, "'txt'"),
        ({"kind": "judged_generation", "split": "val", "classes": ["cat"]}, "one class cat"),
        ({"kind": "bits_per_byte", "split": "val", "modalities": ["audio"]}, "'audio'"),
    ],
)
def test_a_task_that_cannot_be_measured_stops_the_run_before_it_trains(
    root: Path, tmp_path: Path, task: dict[str, Any], named: str
) -> None:
    tasks = [{"data": str(root / "data")} | task]
    told = refused(make_run(root, tmp_path, stage={"tasks": tasks}))
    assert told.startswith(f"stages.0.tasks.0 ({task['kind']}): ") and named in told


def test_a_task_that_is_measured_later_is_asked_for_at_the_start(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [{"kind": "recognition", "data": "nowhere"}]
    train(make_run(root, tmp_path, stage={"tasks": tasks}, steps=1, evaluate=False))
    said = [r.message for r in caplog.records if r.message.startswith("stages.0.tasks.0")]
    assert len(said) == 1 and "no packed data at nowhere" in said[0] and "mm eval" in said[0]


@pytest.mark.parametrize("kind", list(TASKS))
def test_law_every_task_asks_for_its_data_before_a_run_trains(kind: str) -> None:
    """Law of `Task.check`: a task whose data are not there is refused, not after the training."""
    with pytest.raises(UserError):
        TASKS.get(kind).smallest().build().check(None, {})


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ({"image": "nowhere.png", "to": "text"}, "nowhere.png"),
        ({"text": "a", "to": "audio"}, "'audio'"),
    ],
)
def test_a_prompt_that_cannot_be_read_stops_the_run_before_it_trains(
    root: Path, tmp_path: Path, prompt: dict[str, str], named: str
) -> None:
    callback = {"kind": "samples", "prompts": [prompt]}
    assert named in refused(make_run(root, tmp_path, callbacks=[callback]))
    assert CALLBACKS.parse(callback).build().config.prompts == (prompt,)


def test_data_of_a_later_stage_are_asked_for_at_the_start(root: Path, tmp_path: Path) -> None:
    run = values(root, tmp_path)
    later = json.loads(json.dumps(run["stages"][0]))
    later["data"]["sources"][0]["path"] = str(root / "data")
    run["stages"].append(later)
    assert "raw shards, not tokens" in refused(Run.model_validate(run))


def test_a_driver_that_torch_cannot_use_is_said_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine's driver works")
    train(make_run(root, tmp_path, "without", steps=1))
    assert "driver" not in caplog.text
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    train(make_run(root, tmp_path, "with", steps=1))
    told = [r.getMessage() for r in caplog.records if "NVIDIA driver" in r.getMessage()]
    assert len(told) == 1 and "training on the CPU" in told[0] and "mm doctor" in told[0]
