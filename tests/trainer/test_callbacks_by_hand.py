"""What callbacks do at one moment, told by plain values: alerts, samples, tasks, profiles."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_metrics_by_hand import WORDS, training
from torch import nn

from mm.decoders import generate
from mm.kernels.linear_scan import linear_scan
from mm.model.layer import Embedder, Head
from mm.trainer.callbacks import machine, modalities, profile, progress, samples
from mm.trainer.callbacks.alerts import AGAIN, Alerts, AlertsConfig, _command
from mm.trainer.callbacks.layers import DECAYS, Layers, LayersConfig
from mm.trainer.callbacks.modalities import Modalities, ModalitiesConfig
from mm.trainer.callbacks.seen import Seen
from mm.trainer.callbacks.tasks import TasksWhileTraining
from mm.trainer.callbacks.times import Times
from mm.trainer.explain import Look

CPU = torch.device("cpu")


class Tracker:
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.tables: list[Any] = []
        self.now = lambda: 0

    def alert(self, title: str, text: str, level: str) -> None:
        self.told.append((title.removeprefix("run: "), self.now()))

    def table(self, name: str, rows: Any, step: int) -> None:
        self.tables.append((name, rows, step))


def alerted(folder: Path, **values: Any) -> Any:
    guard = SimpleNamespace(skipped=0, rollbacks=0, spikes=0)
    made = training(
        folder=folder,
        run=SimpleNamespace(name="run"),
        guard=guard,
        tracker=Tracker(),
        stage=SimpleNamespace(begin=100, save_bytes=1),
        **values,
    )
    made.tracker.now = lambda: made.step
    return made


def test_alerts_of_the_guard_tell_what_is_new(tmp_path: Path) -> None:
    """A row of spikes once, each return to a checkpoint once; what was before this part never."""
    told = alerted(tmp_path)
    told.guard.rollbacks, told.guard.spikes = 2, 1
    alerts = Alerts(AlertsConfig())
    alerts.on_stage_start(told)
    assert told.tracker.told == []
    told.guard.spikes = 0
    told.step = AGAIN
    alerts.on_stage_start(told)
    told.guard.spikes, told.guard.rollbacks = 1, 3
    told.step = 2 * AGAIN
    alerts.on_stage_start(told)  # also at the start of a stage
    assert told.tracker.told == [("spike", 2 * AGAIN), ("rollback", 2 * AGAIN)]
    told.guard.spikes, told.step = 2, 4 * AGAIN
    alerts.on_stage_start(told)
    assert len(told.tracker.told) == 2
    other = alerted(tmp_path, is_main=False)
    alerts = Alerts(AlertsConfig())
    alerts.on_stage_start(other)
    other.guard.rollbacks = 1
    alerts.on_stage_start(other)
    assert other.tracker.told == []


def test_an_alert_comes_again_after_its_pause_and_not_before(tmp_path: Path) -> None:
    told, alerts = alerted(tmp_path), Alerts(AlertsConfig())
    for step in (5, 5 + AGAIN - 1, 5 + AGAIN):
        told.step = step
        alerts._tell(told, "slow", "text")
    assert told.tracker.told == [("slow", 5), ("slow", 5 + AGAIN)]


def test_dead_codes_are_told_from_the_named_step_of_a_stage_on(tmp_path: Path) -> None:
    told, alerts = alerted(tmp_path), Alerts(AlertsConfig(codes_after=50, dead_codes=0.5))
    for step in (149, 150):
        told.step = step
        alerts._of_codes(told, step, {"codebook/usage": 0.25})
    assert told.tracker.told == [("dead codes", 150)]


def test_a_command_that_fails_is_logged_with_its_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _command('echo "no $MM_ALERT" >&2; exit 3', {"alert": "spike", "step": 4})
    assert "ended with 3: no spike" in caplog.text


def test_decays_are_shares_that_a_token_keeps() -> None:
    """Given as they are or as logarithms; their figure is the mean over calls."""
    a = torch.tensor([[[0.0, -1.0]]])
    assert DECAYS["linear_scan"]({"a_BTD": a, "log": True}).tolist() == a.exp().tolist()  # type: ignore[union-attr]
    assert DECAYS["linear_scan"]({"a_BTD": a, "log": False}) is a
    look = Layers(LayersConfig())
    look._sums, look._loads, look._inside = {}, {}, ["mixer"]
    for decay in (0.5, 0.7):
        given = torch.full((1, 3, 2), decay)
        look._observe(linear_scan, (given, torch.zeros(1, 3, 2)), {}, torch.zeros(1, 3, 2))
    total, count = look._sums["mixer/decay"]
    assert float(total / count) == pytest.approx(0.6)


def test_memory_of_a_process_without_a_gpu_is_that_of_the_host() -> None:
    found = machine.memory(CPU)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    assert list(found) == ["memory/host_peak_mib"]
    assert 0.9 * resident <= found["memory/host_peak_mib"] < 100 * resident


class Profiler:
    """Stands for torch's, which takes seconds to begin; tests/trainer/test_profile.py has it."""

    def __init__(self, activities: Any) -> None:
        self.kinds, self.is_on = [a.name for a in activities], False

    def __enter__(self) -> None:
        self.is_on = True

    def __exit__(self, *error: object) -> None:
        self.is_on = False

    def export_chrome_trace(self, path: str) -> None:
        assert not self.is_on
        Path(path).write_text("{}")

    def key_averages(self) -> list[Any]:
        return [SimpleNamespace(key="add", count=2, self_cpu_time_total=3000.0)]


def test_a_profile_of_a_run_that_is_cut_off_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    assert profile.parse_steps("1:1") == (1, 1)
    shown: list[str] = []
    look = profile.Profile(1, 9, lambda rows, trace: shown.append(trace))
    at = training(folder=tmp_path, device=CPU)
    look.on_phase(at, "data", 1)
    look.post_step(at, 1, {})
    assert look._profiler.is_on and shown == []
    look.on_end(at)
    assert shown == [str(tmp_path / "profile" / "steps_1_9.trace.json")]
    (row,) = json.loads((tmp_path / "profile" / "steps_1_9.ops.json").read_text())
    assert row == {"op": "add", "calls": 2, "ms": 3.0, "share": 1.0}


@pytest.mark.parametrize(("device", "kinds"), [("cpu", ["CPU"]), ("cuda", ["CPU", "CUDA"])])
def test_a_profile_looks_at_the_device_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, device: str, kinds: list[str]
) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    look = profile.Profile(1, 1, lambda rows, trace: None)
    look.on_phase(training(device=torch.device(device)), "data", 1)
    assert look._profiler.kinds == kinds


def test_what_is_left_is_told_by_the_pace_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 3 to 6 took 40 s, so the last 4 of 10 take 40 s; a name in brackets is no markup."""
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    shown = progress.Progress(progress.ProgressConfig(every_s=1e-9))
    at = training(run=SimpleNamespace(name="toys[red]"), step=2, steps=10)
    shown.on_stage_start(at)
    shown.post_step(at, 6, {"loss/total": 1.5})
    assert capsys.readouterr().err.strip() == "toys[red] 6/10 loss 1.5000 ETA 0:40"


def looking(step: int, words: Any = WORDS) -> Any:
    """A training of a network that is one table of all ids, after so many steps."""
    embedder = nn.Embedding(10, 2)
    engine = SimpleNamespace(
        raw=nn.ModuleList([Embedding(embedder.weight), TwoHeads(), TwoHeads()]),
        base=torch.optim.SGD(embedder.parameters(), lr=0.1),
        grad_clip=0.0,
        trainable=lambda: iter([("0.weight", embedder.weight)]),
    )
    stage = SimpleNamespace(
        engines={"model": engine},
        clock=SimpleNamespace(seconds=dict),
        config=SimpleNamespace(data=SimpleNamespace(modality_tokens={"text": 3, "audio": 1})),
        env=SimpleNamespace(precision="fp32"),
    )
    return training(step=step, vocabulary=words, device=CPU, stage=stage, tokenizers={})


class Embedding(Embedder):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class TwoHeads(Head):
    """One of two: it has no matrix."""

    weight = torch.zeros(0)


def test_modalities_are_looked_at_in_the_first_step_and_in_every_so_many() -> None:
    look = Modalities(ModalitiesConfig(every=50))
    due = {}
    for step in (1, 2, 48, 49, 50, 51, 100):
        look._sums = None
        look.pre_step(looking(step - 1), [])
        due[step] = look._sums is not None and len(look._hooks) == 3
    assert [step for step, is_due in due.items() if is_due] == [1, 50, 100]
    look._sums = None
    look.pre_step(looking(0, words=None), [])
    assert look._sums is None and look._hooks == []


def test_accuracies_are_those_of_the_modality_after_the_control_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modalities, "all_reduce", lambda tensors: tensors)
    look = Modalities(ModalitiesConfig())
    look._sums = torch.tensor([[1.0, 3.0, 2.0], [1.0, 4.0, 8.0]])  # control, text, audio
    look.post_step(looking(0), 1, found := {})
    assert found == {
        "accuracy/text": 0.75,
        "accuracy/audio": 0.25,
        "targets/text_wanted": 0.75,
        "targets/audio_wanted": 0.25,
    }


def test_the_share_of_the_device_s_speed_is_told_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """6 FLOPs a token and weight; the table of 20 is only looked up."""
    monkeypatch.setattr(machine, "peak_flops", lambda device, precision: 1000.0)
    monkeypatch.setattr(machine, "multiplied_weights", lambda module: 30)
    monkeypatch.setattr(machine.dist, "get_world_size", lambda: 1)
    at, look = looking(0), machine.Machine(machine.MachineConfig(every=10))
    look.on_stage_start(at)
    look.pre_step(at, [])
    found = {"perf/tokens_per_second": 5.0, "data/wait_seconds": 0.25}
    look.post_step(at, 3, found)
    assert found["perf/mfu"] == 6 * 30 * 5.0 / 1000.0 and found["time/data"] == 0.25
    assert not any(name.startswith("memory/") for name in found)


def test_a_step_that_is_explained_is_looked_at_in_one_head() -> None:
    """A second one would count each sample twice."""
    look = Look(4)
    look.pre_step(looking(3), [])
    assert len(look._hooks) == 2  # gradients, and the head
    assert look.batches == []


def test_a_prompt_is_text_or_bytes_or_a_file(tmp_path: Path) -> None:
    assert samples._raw("text", "a word") == "a word"
    with pytest.raises(Exception, match="prompt file"):
        samples._raw("image", str(tmp_path / "none.png"))


def test_samples_are_files_with_lines_and_a_table(tmp_path: Path) -> None:
    at = training(folder=tmp_path, tracker=Tracker())
    samples._write(at, [], 4)
    assert not (tmp_path / "samples").exists() and at.tracker.tables == []
    picture = np.zeros((4, 4, 3), np.uint8)
    made = [samples.Made(0, "a", {"text": "a word"}, "image", picture)]
    samples._write(at, made, 4)
    (line,) = map(json.loads, (tmp_path / "samples" / "index.jsonl").read_text().splitlines())
    assert line["step"] == 4 and line["to"] == "image" and line["number"] == 0
    file = tmp_path / "samples" / line["file"]
    assert file.is_file() and line["file"].startswith("step_000004/00_a")
    ((name, (row,), step),) = at.tracker.tables
    assert (name, step) == ("samples", 4)
    assert row == {"step": 4, "prompt text": "a word", "sample image": file}


def test_a_tokenizer_is_asked_for_its_reconstruction() -> None:
    def module(batch: Any, return_intermediates: frozenset[str]) -> Any:
        (name,) = return_intermediates
        return SimpleNamespace(intermediates={name: batch.values["audio"].data * 0.5})

    kept = {"audio": torch.full((2, 8), 0.5), "length": torch.tensor([8, 4], dtype=torch.int32)}
    made = samples._reconstruct(module, kept, CPU)  # type: ignore[arg-type]
    assert [one.number for one in made] == [0, 1] and {one.to for one in made} == {"audio"}


class Timed:
    """A task that is measured every second step."""

    every, kind = 2, "timed"

    def __init__(self) -> None:
        self.seeds: list[Any] = []

    def build(self) -> Timed:
        return self

    def evaluate(self, generator: Any, seed: int | None = None) -> dict[str, Any]:
        self.seeds.append(seed)
        return {"accuracy": 0.5}


def test_tasks_are_measured_when_due_with_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "Generator", lambda *given: None)
    phases: list[tuple[str, int]] = []
    task, callback = Timed(), TasksWhileTraining()
    at = training(
        stage=SimpleNamespace(begin=10),
        stage_end=14,
        vocabulary=object(),
        tokenizers={},
        run=SimpleNamespace(seed=7),
        phase=lambda name, step: phases.append((name, step)),
        unsharded=lambda: contextlib.nullcontext(None),
    )
    callback._tasks = {"timed": task}  # type: ignore[dict-item]
    found = {}
    for step in (11, 12, 14):  # not due, due, the stage's last
        metrics: dict[str, Any] = {}
        callback.post_step(at, step, metrics)
        found[step] = metrics
    assert found == {11: {}, 12: {"eval/timed/accuracy": 0.5}, 14: {}}
    assert task.seeds == [7] and phases == [("evaluate", 12), ("report", 12)]
    at.vocabulary = None
    callback.post_step(at, 12, metrics := {})
    assert metrics == {}


def test_times_of_a_run_that_was_cut_off_after_one_step_are_kept(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps({"seconds": {"step": 100.0}}))
    times = Times()
    times.on_stage_start(training(folder=tmp_path, step=1))
    times.on_save(training(folder=tmp_path), 2)
    assert json.loads((tmp_path / "times.json").read_text())["seconds"]["step"] == 100.0


def test_epochs_go_on_over_stages_that_read_the_same_sources() -> None:
    """And over a resume between them; other sources begin anew."""
    one, other = ({"sources": [SimpleNamespace(path=p, split="train")]} for p in "ab")
    stages = [one, {**one, "seq_len": 7}, other]
    seen, found = Seen(), []
    for index, data in enumerate(stages):
        for epoch in (0.5, 1.5):
            config = SimpleNamespace(data=SimpleNamespace(**data))
            trainer: Any = SimpleNamespace(
                stage=SimpleNamespace(index=index, config=config),
                stream=SimpleNamespace(epoch=epoch),
            )
            metrics: dict[str, Any] = {}
            seen.post_step(trainer, 1, metrics)
            found.append(metrics["data/epoch"])
            again = Seen()
            again.load_state_dict(json.loads(json.dumps(seen.state_dict())))
            seen = again
    assert found == [0.5, 1.5, 2.0, 3.0, 0.5, 1.5]


def test_tokens_and_items_are_counted_over_the_whole_run() -> None:
    seen, metrics = Seen(), {}
    at: Any = SimpleNamespace(stream=None)
    seen.count({"tokens/step": 5.0})
    seen.post_step(at, 1, metrics)
    assert metrics == {"tokens/seen": 5}
    seen.count({"tokens/step": 6.0, "items/step": 2.0})
    seen.post_step(at, 2, metrics)
    assert metrics == {"tokens/seen": 11, "items/seen": 2}
