"""What a run writes and reads beside its weights: checks, locks, beats, lineage, held-out data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_guard_by_hand import STEADY, batch, guard_of, lines
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.model.slices import INDEX
from mm.specs import Segment
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer import explain, final_eval, folder, held_out_batches, start
from mm.trainer.checkpoint.check import MARK, SCHEMA, STATE, fault_of, require_state
from mm.trainer.health import heartbeat
from mm.trainer.health.signals import Interrupted
from mm.trainer.log import lineage
from mm.trainer.survey import endings
from mm.vocabulary import extend_vocabulary

CPU = torch.device("cpu")


def checkpoint(root: Path, **files: bytes) -> Path:
    """A folder whose mark vouches for all of its files."""
    made = root / "step_000004"
    made.mkdir(parents=True)
    state = json.dumps({"schema": SCHEMA, "step": 4}).encode()
    for name, data in {STATE: state, **files}.items():
        (made / name).write_bytes(data)
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in made.iterdir()}
    (made / MARK).write_text(json.dumps(hashes))
    return made


def tensors(table: bytes) -> bytes:
    return struct.pack("<Q", len(table)) + table


def test_a_file_of_tensors_is_looked_into_though_its_hash_is_right(tmp_path: Path) -> None:
    """Its table says eight bytes, and none are there."""
    entry = {"x": {"dtype": "F32", "shape": [2], "rank": 0}}
    index = json.dumps({"world": 1, "files": {"a": entry, "b": entry}}).encode()
    bad = tensors(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}')
    good = {INDEX: index, "a.safetensors": bad + bytes(8)}
    fine = checkpoint(tmp_path / "good", **good, **{"b.safetensors": bad + bytes(8)})
    assert fault_of(fine) is None
    found = fault_of(checkpoint(tmp_path / "bad", **good, **{"b.safetensors": bad}))
    assert found is not None and found.startswith("b.safetensors is no file of tensors")


@pytest.mark.parametrize("mark", ["[]", "", '{"state.json": 1}'])
def test_a_mark_that_is_no_table_of_hashes_vouches_for_nothing(tmp_path: Path, mark: str) -> None:
    made = checkpoint(tmp_path)
    (made / MARK).write_text(mark)
    assert fault_of(made) == f"{MARK} is not readable"


def test_a_stage_that_the_run_has_not_is_refused() -> None:
    state = {
        "step": 4,
        "stage": 2,
        "world": 1,
        "vocabulary": None,
        "config": {},
        "data": {},
        "optimizers": {},
        "bytes_per_token": {},
    }
    require_state(state, "x", 3)
    with pytest.raises(UserError, match="saved in stage 2, this run has 2"):
        require_state(state, "x", 2)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"), folder.lock(tmp_path / "file" / "run"):
        pass
    with folder.lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a repository of one commit, in which the program seems to lie."""
    file = tmp_path / "repository" / "module.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    for args in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", *args], cwd=file.parent, check=True)
    for module in (folder, lineage):
        monkeypatch.setattr(module, "__file__", str(file))
    return file


def test_the_commit_is_git_s_and_its_changes_lie_beside_it(source: Path, tmp_path: Path) -> None:
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=source.parent, capture_output=True, text=True).stdout.strip()
    diff = tmp_path / lineage.DIFF
    assert len(commit) == 40 and folder._commit() == commit
    source.write_text("a = 2\n")
    assert folder._commit() == f"{commit}+"
    lineage.write_diff(tmp_path, f"{commit}+")
    assert "+a = 2" in diff.read_text()
    for told in (commit, None):
        lineage.write_diff(tmp_path, told)
        assert not diff.exists(), "that of an earlier part is gone, too"


def test_outside_of_a_repository_there_is_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "__file__", str(tmp_path / "module.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert folder._commit() is None


def test_what_a_run_reads_is_marked_as_its_input(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(tracking=SimpleNamespace(upload=()))
    one = lineage._folder(run, "tokens", tmp_path, {})
    assert one.is_input and one.references == [tmp_path] and not one.files


# ---- heartbeats ----


def beat(**change: Any) -> dict[str, Any]:
    return {"phase": "step", "host": socket.gethostname(), "pid": os.getpid()} | change


def test_a_process_is_dead_when_it_was_killed_here_before_its_end() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(20)"])
    assert not heartbeat._dead(beat(pid=child.pid)) and not heartbeat._dead(beat())
    child.kill()
    stat = Path(f"/proc/{child.pid}/stat")
    until = time.monotonic() + 5
    while stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert heartbeat._dead(beat(pid=child.pid)), "nobody has waited for it yet"
    child.wait()
    assert heartbeat._dead(beat(pid=child.pid))
    assert not heartbeat._dead(beat(pid=child.pid, phase="end"))
    assert not heartbeat._dead(beat(pid=child.pid, host="elsewhere"))


def test_beats_that_another_process_has_just_removed_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "rank_0000.json").write_text("{}")
    gone = [tmp_path / "rank_0001.json", tmp_path / "rank_0000.json"]
    heartbeat.clear(SimpleNamespace(glob=lambda pattern: gone))  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


# ---- guard, evaluation and start ----


def test_the_guard_counts_steps_from_nought(tmp_path: Path) -> None:
    """The 21st step is number 20 in the lines of what it reads."""
    guard = guard_of(tmp_path)
    at: Any = SimpleNamespace(batches=[batch()])
    for step, loss in enumerate([*STEADY, 1000.0], start=1):
        metrics = {"loss/total": loss}
        guard.post_step(at, step, metrics)
        assert metrics["skipped"] == 0
    assert [e["step"] for e in lines(guard, "events")] == [20]


def test_a_run_is_done_when_the_tasks_of_its_last_stage_are(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    stages = [SimpleNamespace(tasks=()), SimpleNamespace(tasks=("a task",))]
    run: Any = SimpleNamespace(folder=tmp_path, evaluate=True, stages=stages, export="last")
    assert not final_eval.is_done(run, 6, 6)
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "eval/a/accuracy": 0.5}\n')
    assert final_eval.is_done(run, 6, 6) and not final_eval.is_done(run, 5, 6)


def test_an_evaluation_that_a_signal_ends_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(tasks: Any, each: Any) -> Any:
        yield 0, {"figures": {"accuracy": 0.5}}
        raise Interrupted

    monkeypatch.setattr(final_eval, "measure", measured)
    monkeypatch.setattr(final_eval, "_generator", lambda *given: None)
    monkeypatch.setattr(final_eval, "on_any", lambda flag, device: flag)
    monkeypatch.setattr(final_eval, "by_name", lambda tasks: dict(zip("ab", tasks, strict=True)))
    run = SimpleNamespace(evaluate=True, stages=[SimpleNamespace(tasks=("a", "b"))])
    at: Any = SimpleNamespace(run=run, device=CPU)
    stop: Any = SimpleNamespace(at_once=contextlib.nullcontext)
    assert final_eval.of_stage(at, 0, stop, None) == {}


def test_tasks_that_are_never_measured_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a final evaluation only those that come while it trains."""
    for name in ("warn_of_driver", "check_shards", "check_tokenizers"):
        monkeypatch.setattr(start, name, lambda *given: None)

    def check(vocabulary: Any, tokenizers: Any) -> None:
        raise UserError("no such data")

    once, often = (SimpleNamespace(kind="x", check=check, **e) for e in ({}, {"every": 2}))
    stage = SimpleNamespace(data=None, tasks=(once,))
    run = SimpleNamespace(stages=[stage], evaluate=False, tracking=SimpleNamespace(sinks=()))
    at: Any = SimpleNamespace(run=run, vocabulary=None, tokenizers={}, callbacks=())
    start.check(at, 0)
    stage.tasks = (once, often)
    with pytest.raises(UserError, match=r"stages.0.tasks.1 \(x\): no such data"):
        start.check(at, 0)


class Told:
    """A stream that tells of its sources; ``closed`` once it was."""

    def __init__(self, source: str) -> None:
        self.source, self.closed = source, False

    def survey(self, steps: int) -> list[dict[str, Any]]:
        return [{"source": self.source, "steps": steps}]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("words", [None, "vocabulary"])
def test_the_stage_that_begins_is_told_of_by_its_own_stream(
    monkeypatch: pytest.MonkeyPatch, words: str | None
) -> None:
    own, later = Told("own"), Told("later")
    judged: list[tuple[int, Any]] = []
    judge = lambda number, stage, stream, sources, words: judged.append((number, stream))
    monkeypatch.setattr(start.figures, "show", lambda *given: None)
    monkeypatch.setattr(start.begun, "show", lambda *given: None)
    monkeypatch.setattr(start.figures, "judge", judge)
    monkeypatch.setattr(start, "build", lambda *given, **kw: None)
    monkeypatch.setattr(start, "make_stream", lambda *given: later)
    stages = [SimpleNamespace(objective=None, budget=SimpleNamespace(steps=n)) for n in (1, 2, 3)]
    at: Any = SimpleNamespace(
        run=SimpleNamespace(stages=stages),
        vocabulary=words,
        stream=own,
        device=CPU,
        step=1,
        stage=SimpleNamespace(parameters={}, trained={}, begun=None),
        env=SimpleNamespace(precision="fp32"),
    )
    found = start.survey(at, 1)["stages"]
    assert [(s["stage"], s["sources"][0]["source"]) for s in found] == [(1, "own"), (2, "later")]
    assert judged == ([(1, own), (2, later)] if words else [])
    assert later.closed and not own.closed


def test_paths_are_told_apart_by_their_ends() -> None:
    assert endings(["/x/y/a/b/c", "/x/y/a/d/c"]) == {"/x/y/a/b/c": "b/c", "/x/y/a/d/c": "d/c"}
    assert endings(["/x/y/z"]) == {"/x/y/z": "z"}


# ---- held-out data ----


class Counted:
    """A stream of numbered steps, two an epoch."""

    def __init__(self) -> None:
        self.read = 0

    @property
    def epoch(self) -> float:
        return self.read / 2

    def next(self) -> list[int]:
        self.read += 1
        return [self.read]


def test_held_out_data_are_passed_over_once_and_as_far_as_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(held_out_batches, "most", lambda n, device: n + 2)
    config = SimpleNamespace(held_out_batches=9)
    stage: Any = SimpleNamespace(config=config, env=SimpleNamespace(device=CPU))
    stream, steps = Counted(), []
    assert held_out_batches._pass_over(stream, steps, stage) is None
    assert steps == [[1], [2]]
    assert held_out_batches._as_far_as_all(stream, steps, stage) is None
    assert steps == [[1], [2], [3], [4]]


def test_bytes_of_a_modality_that_only_another_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without text adds nothing to its tokens."""
    text, other = BytesConfig(modality="text").build(), BytesConfig(modality="other").build()
    words = extend_vocabulary([text.spec, other.spec])
    sent: list[torch.Tensor] = []

    def beside(modality: str, from_others: torch.Tensor | None = None) -> Any:
        def all_reduce(total: torch.Tensor) -> None:
            sent.append(total.clone())
            if from_others is not None:
                total.add_(from_others)

        monkeypatch.setattr(held_out_batches.dist, "all_reduce", all_reduce)
        row = [Segment(modality, np.arange(1, 6, dtype=np.int32))]
        made = to_batch([[row]], words, 16, 4, ["a"])
        tokenizers = {"text": text, "other": other}
        return held_out_batches._beside([made], words, tokenizers, CPU)

    monkeypatch.setattr(held_out_batches.dist, "get_world_size", lambda: 2)
    _, alone, _ = beside("text")
    _, both, _ = beside("other", sent[0])
    assert alone["text"] == both["text"] > 0


def test_a_step_is_explained_by_a_run_that_nothing_ends_or_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are not finite are what it is to see, however many; it saves and tells nothing."""

    class Begun(Exception):
        pass

    def trainer(run: Any, callbacks: Any) -> Any:
        raise Begun(run)

    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(explain, "Trainer", trainer)
    monkeypatch.setattr(explain, "_copy", lambda run, to, step: 0)
    with pytest.raises(UserError, match="has no step 3; it has done 2 steps"):
        explain.explain(run, 3)
    with pytest.raises(Begun) as begun:
        explain.explain(run, 2)
    (replay,) = begun.value.args
    assert replay.engine.max_skips > 10**6 and replay.guard.spike == "off"
    assert (replay.checkpoints.every, replay.tracking.sinks, replay.callbacks) == (0, (), ())
    assert replay.folder != run.folder and replay.seed == run.seed
