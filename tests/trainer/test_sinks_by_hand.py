"""What goes to the sinks of a run and how it is named there; services are recorded, not asked."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.run import Run
from mm.trainer.log import tracker, workspace
from mm.trainer.log.lineage import Artifact
from mm.trainer.log.sinks.base import Place
from mm.trainer.log.sinks.mlflow_sink import MlflowConfig, MlflowSink, _flat
from mm.trainer.log.sinks.tensorboard_sink import TensorboardSink
from mm.trainer.log.sinks.wandb_sink import WandbConfig, WandbSink, _high
from mm.trainer.log.summary import WINDOW, Summary


def silent(run: Run) -> Run:
    return run.model_copy(update={"tracking": run.tracking.model_copy(update={"sinks": ()})})


# ---- Weights & Biases ----


class Recorder:
    """Stands for a run of wandb, or for one of its artifacts: what was called on it."""

    def __init__(self, *given: Any, **kw: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.given = (given, kw)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kw: self.calls.append((name, args, kw))


def wandb_sink(offline: bool = True) -> tuple[WandbSink, Recorder]:
    sink, run = WandbSink.__new__(WandbSink), Recorder()
    sink.offline, sink._sent, sink._at, sink._seen = offline, -1, -1, set()
    sink._run = run  # type: ignore[assignment]
    return sink, run


def test_wandb_gets_a_step_again_but_never_one_behind() -> None:
    """Figures and a table of one step share it; after a return to a checkpoint it is left out."""
    sink, run = wandb_sink()
    for step in (3, 3, 4, 2):
        sink._send({"loss": 1.0}, step)
    rows = [(args[0], kw["step"]) for _, args, kw in run.calls]
    assert rows == [
        ({"loss": 1.0, "step": step}, at) for step, at in ((3, 3), (3, 3), (4, 4), (2, None))
    ]


@pytest.mark.parametrize(("resumed", "sent"), [(False, [0, 1, 8]), (True, [8])])
def test_wandb_gets_every_step_that_the_server_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed: bool, sent: list[int]
) -> None:
    """A run that begins has sent none, whatever its summary says; one gone on with up to its 7."""
    run = Recorder()
    run.resumed, run.summary = resumed, {"step": 7}  # type: ignore[attr-defined]
    asked: dict[str, Any] = {}
    init = lambda **kw: asked.update(kw) or run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    place = Place(make_run(tmp_path), tmp_path, "an id", {"a": 1}, goes_on=resumed)
    sink = WandbSink(WandbConfig(statistics_s=30.0), place, "offline")
    for step in (0, 1, 8):
        sink.log({"loss": 1.0}, step)
    assert [kw["step"] for name, _, kw in run.calls if name == "log"] == sent
    told = {k: asked[k] for k in ("id", "mode", "resume", "config", "name", "dir")}
    assert told == {
        "id": "an id",
        "mode": "offline",
        "resume": "allow" if resumed else None,
        "config": {"a": 1},
        "name": "run",
        "dir": str(tmp_path),
    }
    assert asked["settings"] == {
        "init_timeout": 15.0,  # a server that does not answer keeps no figure longer
        **dict.fromkeys(("silent", "quiet", "disable_git", "disable_code"), True),
        "console": "off",
        "x_stats_sampling_interval": 30.0,
    }
    steps = [(args, kw) for name, args, kw in run.calls if name == "define_metric"]
    assert steps[:2] == [(("step",), {}), (("*",), {"step_metric": "step"})]
    assert os.environ.pop("WANDB_DATA_DIR") == str(tmp_path.resolve() / "wandb" / "data")


def test_wandb_keeps_the_best_of_held_out_figures() -> None:
    sink, run = wandb_sink()
    row = {
        "val/loss": 1.0,
        "eval/a/image_to_text_accuracy": 0.5,
        "eval/a/psnr_db": 20.0,
        "eval/a/accuracy_chance": 0.1,
        "loss/total": 2.0,
        "val/share": 0.5,
    }
    sink._define(row)
    sink._define(row)
    found = {args[0]: kw["summary"] for name, args, kw in run.calls if name == "define_metric"}
    assert found == {
        "val/loss": "min,last",
        "eval/a/image_to_text_accuracy": "max,last",
        "eval/a/psnr_db": "max,last",
    }
    assert len(run.calls) == 3
    assert _high("accuracy") and not _high("share")


@pytest.mark.parametrize("offline", [True, False])
def test_wandb_is_told_what_a_run_used_and_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: bool
) -> None:
    """References are not hashed: they may be terabytes."""
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Artifact=Recorder))
    sink, run = wandb_sink(offline)
    for is_input in (True, False):
        sink.artifact(Artifact("data-x", "data", (), (tmp_path,), {"n": 1}, is_input))
    used = ["log_artifact", "log_artifact"] if offline else ["use_artifact", "log_artifact"]
    assert [name for name, _, _ in run.calls] == used
    made = run.calls[0][1][0]
    assert made.given == (("data-x",), {"type": "data", "metadata": {"n": 1}})
    ((name, args, kw),) = made.calls
    assert (name, args) == ("add_reference", (f"file://{tmp_path.resolve()}",))
    assert kw == {"name": tmp_path.name, "checksum": False}


def test_the_view_has_tables_patterns_and_lines_each_in_its_own_panel() -> None:
    """The one section that few runs fill is closed at first."""
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.reports.v2 as wr  # pyright: ignore[reportMissingImports]

    made = workspace.make_workspace("me", "mm", "view")
    for section in made.sections:
        assert section.is_open == (section.name != "Layers")
        panels = workspace.SECTIONS[section.name]
        assert len(section.panels) == len(panels)
        for panel, (label, keys) in zip(section.panels, panels, strict=True):
            if keys[0] in workspace.TABLES:
                assert isinstance(panel, wr.WeavePanelSummaryTable)
                assert panel.table_name == keys[0]
                continue
            assert (panel.title, panel.x) == (label, "step"), "not the step of wandb itself"
            pattern = any(".*" in key for key in keys)
            assert panel.metric_regex == ("|".join(keys) if pattern else None)
            assert pattern or [getattr(y, "name", y) for y in panel.y] == list(keys)


def test_a_pattern_beside_a_name_is_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    sections = {"Mixed": (("both", ("loss/total", "grad/.*")),)}
    monkeypatch.setattr(workspace, "SECTIONS", sections)
    (section,) = workspace.make_workspace("me", "mm", "view").sections
    assert section.panels[0].metric_regex == "loss/total|grad/.*"


# ---- MLflow and TensorBoard ----


def test_nested_settings_are_told_by_their_paths() -> None:
    given = {"a": {"b": 1}, "c": [{"d": 2}, 3], "e": [4, 5], "f": Path("x") / "y"}
    want = [("a.b", 1), ("c.0.d", 2), ("c.1", 3), ("e", [4, 5]), ("f", "x/y")]
    assert _flat(given) == want


class Client(Recorder):
    """MLflow's, with so many runs of this one there already."""

    def search_runs(self, where: Any, query: str) -> list[Any]:
        self.calls.append(("search_runs", (where, query), {}))
        return [SimpleNamespace(info=SimpleNamespace(run_id="old"))] * self.runs

    def create_run(self, *args: Any, **kw: Any) -> Any:
        self.calls.append(("create_run", args, kw))
        return SimpleNamespace(info=SimpleNamespace(run_id="new"))

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7")

    runs = 0


@pytest.mark.parametrize("runs", [0, 1])
def test_mlflow_gets_all_settings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """A hundred a request; a run that is gone on with has them."""
    param = lambda key, value: SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Param=param))
    monkeypatch.setattr(Client, "runs", runs)
    config = {f"key{n:03d}": n for n in range(150)}
    sink: Any = MlflowSink(MlflowConfig(), Place(make_run(tmp_path), tmp_path, "id", config))
    assert sink._id == ("old" if runs else "new")
    sent = [kw["params"] for name, _, kw in sink._client.calls if name == "log_batch"]
    assert [len(params) for params in sent] == ([] if runs else [100, 50])
    told = {p.key: p.value for params in sent for p in params}
    assert told == ({} if runs else {k: str(n) for k, n in config.items()})


def test_tensorboard_shows_the_settings_at_the_begin(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, config in (("with", {"out": Path("x") / "y"}), ("without", None)):
        folder = tmp_path / name
        sink = TensorboardSink(Place(make_run(tmp_path), folder, "id", config))
        sink.log({"loss": 1.0}, 3)
        sink.finish()
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        tags = events.Tags()["tensors"]
        assert tags == ([] if config is None else ["config/text_summary"])
        if config is not None:
            (event,) = events.Tensors("config/text_summary")
            assert event.step == 0 and b'"out": "x/y"' in event.tensor_proto.string_val[0]


# ---- tracker and summary ----


def test_all_sinks_share_the_time_that_a_run_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracker, "FINISH_TIMEOUT_S", 20.0)
    waited: list[float] = []

    def feed(seconds: float, failed: bool = False) -> Any:
        def finish(timeout: float) -> None:
            waited.append(timeout)
            clock[0] += seconds

        return SimpleNamespace(failed=failed, finish=finish)

    clock = [100.0]
    monkeypatch.setattr(tracker, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    made = tracker.Tracker([feed(15.0), feed(9.0, failed=True), feed(30.0), feed(1.0)], "id")
    made.finish()
    assert waited == pytest.approx([20.0, 5.0, 0.1])
    made.finish()
    assert len(waited) == 3


def test_a_run_that_begins_has_made_nothing_yet(tmp_path: Path) -> None:
    """A model of an earlier part is told as of step 0 until this one has ended."""
    run = silent(make_run(tmp_path))
    (run.folder / "model").mkdir(parents=True)
    tracker.Tracker.start(run, run.folder, {"commit": None}).finish()
    (made,) = json.loads((run.folder / "lineage.json").read_text())["outputs"]
    assert made["kind"] == "model" and made["step"] == 0


def test_a_summary_keeps_no_more_steps_than_its_mean_is_of() -> None:
    seconds = {"data": 1.23456}
    summary = Summary(SimpleNamespace(by_phase=lambda: seconds))  # type: ignore[arg-type]
    at: Any = SimpleNamespace(steps=10_000)
    for step in range(1, 3 * WINDOW + 1):
        summary.post_step(at, step, {"loss": float(step)})
    kept = [value for value in vars(summary).values() if isinstance(value, deque)]
    assert [len(value) for value in kept] == [WINDOW]
    found = summary.result(at)
    assert found["steps"] == WINDOW and found["seconds"] == {"data": 1.23}
    assert found["means"] == {"loss": 2.5 * WINDOW + 0.5}
