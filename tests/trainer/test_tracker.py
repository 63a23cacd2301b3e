"""The tracker and its sinks: none of them can hurt a run, whatever it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.registry import SINKS
from mm.run import Run
from mm.trainer.log import tracker
from mm.trainer.log.sinks import wandb_sink
from mm.trainer.log.sinks.base import Sink
from mm.trainer.log.tracker import Feed, Tracker
from mm.trainer.loop import train


class Kept(Sink):
    """Keeps what it is told, and does what it was made for."""

    def __init__(self, on_log: Any = None):
        self.rows: list[tuple[int, Mapping[str, Any]]] = []
        self.tables = 0
        self.on_log = on_log

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self.rows.append((step, row))
        if self.on_log is not None:
            self.on_log()

    def table(self, name: str, rows: Any, step: int) -> None:
        self.tables += 1


def with_sinks(run: Run, *sinks: Any, **tracking: Any) -> Run:
    return run.model_copy(
        update={"tracking": run.tracking.model_copy(update={"sinks": sinks, **tracking})}
    )


def test_mode_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """WANDB_MODE, then the config, then offline without a key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_sink.resolve_mode("auto") == "offline"
    assert wandb_sink.resolve_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_sink.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_sink.resolve_mode("online") == "disabled"


def test_a_dead_server_does_not_end_or_hold_up_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 6.0)
    run = make_run(tmp_path, steps=2)
    begun = time.monotonic()
    assert train(run)["step"] == 2
    assert time.monotonic() - begun < 40
    assert len(rows(run)) == 2
    assert "tracking is off" in caplog.text


def test_a_failing_sink_is_dropped_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("disk full")

    broken, whole = Kept(fail), Kept()
    mirror = Tracker([Feed("broken", lambda: broken), Feed("whole", lambda: whole)], "abc")
    for step in (1, 2, 3):
        mirror.log({"loss/total": 1.0}, step)
    mirror.table("x", [{"a": 1}], 3)
    mirror.finish()
    assert len(broken.rows) == 1 and broken.tables == 0
    assert caplog.text.count("tracking is off") == 1
    assert [step for step, _ in whole.rows] == [1, 2, 3] and whole.tables == 1  # the other goes on


@pytest.mark.parametrize("where", ["open", "log"])
def test_a_sink_that_hangs_costs_the_training_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker, "FINISH_TIMEOUT_S", 0.3)
    never = threading.Event()
    sink = Kept(never.wait)

    def begin() -> Sink:
        if where == "open":
            never.wait()
        return sink

    mirror = Tracker([Feed("slow", begin)], "abc")
    begun = time.monotonic()
    for step in range(2000):
        mirror.log({"loss/total": 1.0}, step)
    told = time.monotonic() - begun
    mirror.finish()
    assert told < 0.5 and time.monotonic() - begun < 2
    assert "entries were left out" in caplog.text
    never.set()


def test_what_a_full_queue_cannot_take_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker, "QUEUE", 3)
    go = threading.Event()
    sink = Kept(go.wait)
    feed = Feed("slow", lambda: sink)
    mirror = Tracker([feed], "abc")
    mirror.log({"a": 1}, 0)
    while not sink.rows:  # it holds that one, and the queue is empty
        time.sleep(0.01)
    for step in range(1, 10):
        mirror.log({"a": 1}, step)
    assert feed.left_out == 6 and caplog.text.count("entries behind") == 1
    go.set()
    time.sleep(0.1)
    mirror.finish()
    assert [step for step, _ in sink.rows] == [0, 1, 2, 3]


def test_a_run_has_one_id_whatever_its_checkpoints_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = tracker.own_id(tmp_path)  # and is killed before its first checkpoint
    assert tracker.own_id(tmp_path) == tracker.own_id(tmp_path, "of_checkpoint") == first
    (tmp_path / tracker.FILE).unlink()
    assert tracker.own_id(tmp_path, "of_checkpoint") == "of_checkpoint"
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    assert tracker.own_id(tmp_path) == "given"


def test_a_sink_without_its_package_is_refused_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SINKS.parse("mlflow")
    monkeypatch.setattr(type(config), "package", "no_such_package_here")
    run = with_sinks(make_run(tmp_path), config)
    with pytest.raises(UserError, match=r"'mlflow' needs .* pip install 'mm-stack\[mlflow\]'"):
        train(run)
    assert not (run.folder / "metrics.jsonl").exists()


def test_sinks_move_no_bit(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain, shown = make_run(tmp_path, "plain"), make_run(tmp_path, "shown")
    train(with_sinks(plain))
    train(with_sinks(shown, SINKS.parse("tensorboard")))
    assert losses(plain) == losses(shown)


def test_tensorboard_holds_the_scalars_of_metrics_jsonl(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = with_sinks(make_run(tmp_path), SINKS.parse("tensorboard"))
    train(run)
    found = EventAccumulator(str(run.folder / "tensorboard"))
    found.Reload()
    for name in ("loss/total", "loss/text", "optim/lr"):
        points = {event.step: event.value for event in found.Scalars(name)}
        assert points == {row["step"]: pytest.approx(row[name]) for row in rows(run)}
    assert any(tag.startswith("alerts") for tag in found.Tags()["tensors"])


def test_mlflow_holds_the_metrics_and_one_run_over_restarts(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    sink = SINKS.parse({"kind": "mlflow", "uri": f"sqlite:///{tmp_path / 'm.db'}"})
    for steps in (3, 5):
        run = with_sinks(make_run(tmp_path, steps=steps), sink, project="p", tags=("a",))
        train(run)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'm.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert found.data.params["model.kind"] == "toy_lm" and found.data.tags["a"] == "true"
    history = client.get_metric_history(found.info.run_id, "loss/total")
    assert {m.step: m.value for m in history} == {
        row["step"]: pytest.approx(row["loss/total"]) for row in rows(run)
    }
