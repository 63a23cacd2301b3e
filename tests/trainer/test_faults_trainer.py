"""What a run does when something goes wrong around it: guard, saves, signals, heartbeat, memory."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainer_toys as toys
from thinned import only
from trainer_runs import Calls, losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.run import GuardConfig, Run
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.checkpoint import folder, save, writer
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.health import heartbeat
from mm.trainer.health.anomaly import Guard, RollBack, out_of_memory
from mm.trainer.loop import Trainer, train

SMALL = {"model": {"w": torch.arange(6.0)}, "model.optimizer": {"exp_avg/w": torch.ones(6)}}


def small(step: int) -> save.Moment:
    return save.Moment.of({"step": step, "stage": 0}, SMALL)


def guarded(run: Run, **change: Any) -> Run:
    return run.model_copy(update={"guard": GuardConfig(**change)})


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]


# ---- guard ------------------------------------------------------------------


@pytest.mark.parametrize("stage", only([0, 3], 0))
def test_too_many_bad_steps_go_back_to_the_checkpoint_and_past_the_batches(
    tmp_path: Path, stage: int
) -> None:
    """Weights and optimizer of step 3, data from step 5 on: as a run without steps 4 and 5."""
    change: dict[str, Any] = {"stage": stage, "model": {"spike_at": 17}, "steps": 8}
    change["engine"] = {"max_skips": 1}
    run = make_run(tmp_path, data={"spikes": (3, 4)}, **change)
    train(run)
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    assert all(loss is not None for loss in losses(run))
    (event,) = events(run)
    assert (event["event"], event["step"], event["to"]) == ("rollback", 4, 3)

    other = make_run(tmp_path, "other", **change)

    class Jump(Callback):
        def on_stage_start(self, trainer: Training) -> None:
            stream, real = trainer.stream, trainer.stream.next

            def jump() -> Any:
                if stream.step == 3:
                    stream.step = 5
                return real()

            stream.next = jump

    Trainer(other, [Jump()]).fit()
    assert losses(run) == losses(other)


def test_the_run_stops_when_going_back_does_not_help(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        steps=20,
        data={"spikes": tuple(range(3, 99))},
        model={"spike_at": 17},
        engine={"max_skips": 1},
    )
    with pytest.raises(UserError, match="after 2 returns to a checkpoint"):
        train(run)
    assert [e["to"] for e in events(run)] == [3, 3]


def feed(guard: Guard, values: Any, begin: int = 0) -> None:
    for i, value in enumerate(values):
        guard.loss(begin + i, float(value), ())


def test_spikes_are_told_and_after_some_the_guard_goes_back(tmp_path: Path) -> None:
    run = guarded(make_run(tmp_path), spike="rollback", spike_steps=3, window=50)
    run.folder.mkdir(parents=True)
    guard = Guard(run, True)
    noise = np.random.default_rng(0).normal(0, 0.1, 60)
    feed(guard, 3 + noise)  # a noisy plateau holds no spike
    guard.loss(60, 30.0, ())
    guard.loss(61, 30.0, ())
    again = Guard(run, True)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(RollBack, match="3 steps"):
        again.loss(62, 30.0, ())  # as the one that was not resumed
    (event,) = events(run)
    assert event["event"] == "spike" and event["step"] == 60 and event["median"] < 3.2
    feed(guard, 3 + noise[:20], 62)  # two in a row only: forgotten
    assert guard.state_dict()["spikes"] == 0


def test_a_spike_is_only_told_by_default_and_a_new_level_is_accepted(tmp_path: Path) -> None:
    run = guarded(make_run(tmp_path), window=30)
    run.folder.mkdir(parents=True)
    guard = Guard(run, True)
    feed(guard, [2.0] * 40 + [9.0] * 30)
    assert len(events(run)) == 1
    feed(guard, [9.0] * 30, 70)
    assert guard.state_dict()["losses"] == [9.0] * 30


# ---- saves ------------------------------------------------------------------


def test_keep_every_stays_for_good(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=7, checkpoints={"every": 1, "keep_last": 2, "keep_every": 3})
    train(run)
    kept = sorted(p.name for p in (run.folder / "checkpoints").iterdir() if p.is_dir())
    assert kept == ["step_000003", "step_000006", "step_000007"]


def test_a_background_save_stalls_the_loop_for_less_than_its_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files as in the foreground; each save waits for the one before, no more."""
    plain = make_run(tmp_path, "plain", checkpoints={"every": 2, "keep_last": 9})
    train(plain)
    real, threads = writer.save, []

    def slow(*args: Any, **keep: Any) -> Path:
        threads.append(threading.current_thread().name)
        time.sleep(0.4)
        return real(*args, **keep)

    monkeypatch.setattr(writer, "save", slow)
    run = make_run(tmp_path, checkpoints={"every": 2, "keep_last": 9, "background": True})
    begun: list[float] = []
    stalls: list[float] = []

    class Timed(Callback):
        def on_phase(self, trainer: Training, name: str, step: int, keys: Any = ()) -> None:
            if name == "save":
                begun.append(time.monotonic())

        def on_save(self, trainer: Training, step: int) -> None:
            stalls.append(time.monotonic() - begun[-1])

    Trainer(run, [Timed()]).fit()
    assert threads == ["mm-checkpoint"] * 3
    assert stalls[0] < 0.35
    for step in (2, 4, 6):
        for name in ("model", "model.optimizer"):
            a, b = (
                (r.folder / "checkpoints" / f"step_{step:06d}" / f"{name}.safetensors")
                for r in (plain, run)
            )
            assert a.read_bytes() == b.read_bytes(), (step, name)


def test_an_error_of_a_background_save_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **keep: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(writer, "save", fails)
    with pytest.raises(UserError, match="the disk is full"):
        train(make_run(tmp_path, checkpoints={"background": True}))


def test_a_folder_that_comes_back_is_saved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = save.write_tensors, []

    def flaky(path: Path, tensors: Any) -> str:
        calls.append(path)
        if len(calls) < 3:
            raise OSError(116, "Stale file handle", str(path))
        return real(path, tensors)

    monkeypatch.setattr(save, "write_tensors", flaky)
    monkeypatch.setattr(save, "RETRY_S", (0.01, 0.01))
    save.save(tmp_path, small(1), 2)
    assert checkpoint.newest(tmp_path).state["step"] == 1
    assert caplog.text.count("Stale file handle") == 2


def test_a_folder_that_stays_away_is_told_with_the_checkpoints_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save.save(tmp_path, small(1), 2)

    def gone(path: Path, tensors: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(save, "write_tensors", gone)
    monkeypatch.setattr(save, "RETRY_S", (0.01,))
    with pytest.raises(UserError, match="Read-only file system; the checkpoints before"):
        save.save(tmp_path, small(2), 1)
    assert checkpoint.newest(tmp_path).state["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_the_rehearsal_refuses_before_the_first_step(tmp_path: Path) -> None:
    folder.rehearse(tmp_path / "good", 1000)
    assert list((tmp_path / "good").iterdir()) == []
    with pytest.raises(UserError, match="MiB free"):
        folder.rehearse(tmp_path, 2**62)
    run = make_run(tmp_path)
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / f"{folder.PART}rehearsal").symlink_to("/proc/nowhere")
    trainer = Trainer(run, [Calls("pre_step", lambda trainer: pytest.fail("a step was taken"))])
    with pytest.raises(UserError, match="nothing can be saved here"):
        trainer.fit()


def test_what_a_killed_save_left_is_removed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save.save(tmp_path, small(1), 2)
    (tmp_path / ".part_step_000002_77").mkdir()
    (tmp_path / ".part_step_000002_77" / "model.safetensors").write_bytes(b"half")
    assert folder.clean(tmp_path) == [".part_step_000002_77"]
    assert "was killed" in caplog.text
    assert checkpoint.newest(tmp_path).state["step"] == 1


# ---- heartbeat --------------------------------------------------------------


def test_the_heartbeat_says_phase_step_and_keys(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    seen: list[dict[str, Any]] = []
    look = lambda trainer: seen.extend(heartbeat.read(run.folder / "health"))
    Trainer(run, [Calls("pre_step", look)]).fit()
    assert [b["step"] for b in seen] == [1, 2] and seen[0]["phase"] == "step"
    assert seen[0]["keys"][:2] == ["row0", "row1"] and seen[0]["pid"] == os.getpid()
    (last,) = heartbeat.read(run.folder / "health")
    assert last["phase"] == "end"


def test_the_verdict_names_the_rank_that_holds_the_job_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearts = [heartbeat.Heartbeat(tmp_path, rank, 0) for rank in range(3)]
    hearts[0].phase("step", 5, ["a"])
    hearts[1].phase("data", 5, ["b", "c"])
    hearts[2].phase("step", 5)
    told = heartbeat.verdict(tmp_path)
    assert told.startswith("rank 1 (") and "phase 'data' of step 5, samples b, c" in told
    assert "others: 0 in 'step', 2 in 'step'" in told
    hearts[1].phase("step", 5)  # all may wait for one: the last to begin a collective does not
    for heart, begun in zip(hearts, (7, 7, 6), strict=True):
        monkeypatch.setattr(heartbeat, "begun_collectives", lambda n=begun: n)
        heart._count()
    assert heartbeat.verdict(tmp_path).startswith("rank 2 (")
    beat = json.loads((tmp_path / "rank_0002.json").read_text())
    (tmp_path / "rank_0002.json").write_text(json.dumps(beat | {"pid": 2**22 + 1}))
    assert "rank 2 (process 4194305" in (told := heartbeat.verdict(tmp_path)) and "is dead" in told
    for heart in hearts:
        heart.__exit__(None, None, None)


def test_a_hang_dumps_the_stacks_and_ends_the_process(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:  # no pytest in the child
        heart = heartbeat.Heartbeat(tmp_path, 0, 0.3)
        heart.phase("data", 7, ["x"])
        time.sleep(20)
        os._exit(0)
    begun = time.monotonic()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == heartbeat.HUNG
    assert time.monotonic() - begun < 10
    stacks = (tmp_path / "rank_0000.stacks.txt").read_text()
    assert '"phase": "data"' in stacks and "test_a_hang_dumps" in stacks


# ---- memory -----------------------------------------------------------------


def test_out_of_memory_is_told_with_the_lengths_of_each_modality(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    fails = lambda trainer: torch.empty(2**50) if trainer.step == 2 else None  # the allocator's own
    with pytest.raises(UserError) as told:
        Trainer(run, [Calls("pre_step", fails)]).fit()
    text = str(told.value)
    assert "step 2 ran out of memory" in text and "micro_batch_size" in text
    assert "8x12 places; longest: text 12, image 12" in text and "row0, row1" in text
    vocabulary = toys.vocabulary()
    assert out_of_memory(MemoryError(), [], vocabulary, 1) is not None
    assert out_of_memory(ValueError("no"), [], vocabulary, 1) is None
