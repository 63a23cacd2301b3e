"""When a run goes wrong: decisions of the guard on losses and steps written out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import make_run
from trainer_toys import toys_registered, vocabulary  # noqa: F401

from mm.batch import Batch, Values
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.run import GuardConfig
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.health.anomaly import Guard, RollBack, append, out_of_memory
from mm.trainer.held_out import HeldOut
from mm.trainer.log.metrics import BytesPerToken
from mm.trainer.state import TrainState

STEADY = [1.0, 1.2] * 10  # median 1.1, deviation from it 0.1 everywhere


def guard_of(folder: Path, max_skips: int = 3, is_main: bool = True, **settings: Any) -> Guard:
    run = make_run(folder, engine={"max_skips": max_skips})
    run = run.model_copy(update={"guard": GuardConfig(**settings)})
    run.folder.mkdir(parents=True, exist_ok=True)
    return Guard(run, is_main)


def lines(guard: Guard, name: str) -> list[dict[str, Any]]:
    path = guard.folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def batch(ids: int = 4, keys: tuple[str, ...] = ("a", "b")) -> Batch:
    return dataclasses.replace(Batch.of_ids(torch.zeros(1, ids, dtype=torch.int64)), keys=keys)


def test_a_spike_lies_so_many_deviations_over_the_median(tmp_path: Path) -> None:
    """1.1 + 10 x 1.4826 x 0.1 = 2.5826."""
    for value, found in ((2.58, []), (2.59, [20])):
        guard = guard_of(tmp_path / str(value), spike_sigma=10.0)
        for step, loss in enumerate([*STEADY, value]):
            guard.loss(step, loss, [batch(), batch(keys=("c",))])
        assert [e["step"] for e in lines(guard, "events")] == found
    (event,) = lines(guard, "events")
    assert event.pop("median") == pytest.approx(1.1)
    assert event == {"step": 20, "event": "spike", "loss": 2.59, "keys": ["a", "b", "c"]}
    guard.loss(21, 2.59, [batch()])
    assert len(lines(guard, "events")) == 1, "one line a row of spikes"


def test_a_loss_that_stands_still_may_move_by_a_share(tmp_path: Path) -> None:
    """No deviation at all: 1 per cent of the median stands for it, 2 x (1 + 12 x 0.01) = 2.24."""
    guard = guard_of(tmp_path)
    for step in range(20):
        guard.loss(step, 2.0, [])
    guard.loss(20, 2.23, [])
    assert lines(guard, "events") == []
    guard.loss(21, 2.25, [])
    assert [e["step"] for e in lines(guard, "events")] == [21]


def test_nothing_is_a_spike_before_the_window_is_known(tmp_path: Path) -> None:
    guard = guard_of(tmp_path / "a")
    for step, value in enumerate([*STEADY[:19], 1000.0]):
        guard.loss(step, value, [])
    assert lines(guard, "events") == []
    short = guard_of(tmp_path / "b", window=5)
    for step, value in enumerate([*STEADY[:5], 1000.0]):
        short.loss(step, value, [])
    assert [e["step"] for e in lines(short, "events")] == [5]
    off = guard_of(tmp_path / "c", spike="off")
    for step, value in enumerate([*STEADY, 1000.0]):
        off.loss(step, value, [])
    assert lines(off, "events") == [] and off.state_dict()["losses"] == []
    bad = guard_of(tmp_path / "d")
    for value in (float("nan"), float("inf")):
        bad.loss(0, value, [])
    assert bad.state_dict()["losses"] == [], "losses that are not finite are no history"


def test_spikes_in_a_row_go_back_and_a_new_level_is_taken(tmp_path: Path) -> None:
    guard = guard_of(tmp_path / "a", spike="rollback", spike_steps=3)
    for step, value in enumerate([*STEADY, 50.0, 50.0, 1.0, 50.0, 50.0]):
        guard.loss(step, value, [])
    assert [e["step"] for e in lines(guard, "events")] == [20, 23], "the first of each row"
    with pytest.raises(RollBack, match=r"for 3 steps \(up to step 25\)"):
        guard.loss(25, 50.0, [])
    warn = guard_of(tmp_path / "b", window=20)
    for step, value in enumerate([*STEADY, *[50.0] * 19]):
        warn.loss(step, value, [])
    assert warn.state_dict()["spikes"] == 19 and len(warn.state_dict()["losses"]) == 20
    warn.loss(39, 50.0, [])
    assert warn.state_dict()["spikes"] == 0 and warn.state_dict()["losses"] == []


def test_skipped_steps_are_counted_in_a_window(tmp_path: Path) -> None:
    guard = guard_of(tmp_path, max_skips=2, window=10)
    metrics = {"loss/total": float("nan"), "optim/lr": 1.0}
    for step in (1, 5, 11):  # 1 has left the window of 10 steps at 11
        guard.skip(step, "model", metrics, [batch()])
    assert guard.state_dict()["bad"] == [5, 11] and guard.skipped == 3
    assert lines(guard, "skipped")[0] == {
        "step": 1,
        "network": "model",
        "losses": {"loss/total": "nan"},
        "keys": ["a", "b"],
    }
    with pytest.raises(RollBack, match="3 of the last 10 steps .* step 14"):
        guard.skip(14, "model", metrics, [batch()])


def test_returns_to_a_checkpoint_are_counted(tmp_path: Path) -> None:
    guard, why = guard_of(tmp_path, max_rollbacks=2), RollBack("it went wrong")
    guard._bad, guard.spikes = [3], 2
    guard.roll_back(why, 7, 4)
    assert guard.state_dict()["bad"] == [] and guard.state_dict()["spikes"] == 0
    assert lines(guard, "events") == [
        {"step": 7, "event": "rollback", "to": 4, "why": "it went wrong"}
    ]
    with pytest.raises(UserError, match="it went wrong after 1 returns to a checkpoint"):
        guard.roll_back(why, 7, None)
    guard.roll_back(why, 9, 0)
    with pytest.raises(UserError, match="after 2 returns"):
        guard.roll_back(why, 9, 4)
    with pytest.raises(UserError, match=r"it went wrong\. Lower"):
        guard_of(tmp_path / "b").roll_back(why, 1, None)


def test_only_the_main_rank_writes_and_a_resumed_guard_decides_alike(tmp_path: Path) -> None:
    other = guard_of(tmp_path, is_main=False, max_skips=9, window=30)
    for step, value in enumerate([*STEADY, 50.0]):
        other.loss(step, value, [])
    other.skip(21, "model", {}, [])
    other.roll_back(RollBack("x"), 21, 20)
    other.skip(22, "model", {}, [])
    assert not list(other.folder.glob("*.jsonl"))
    again = guard_of(tmp_path, window=30)
    again.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert again.state_dict() == other.state_dict()
    assert again.state_dict() == {
        "skipped": 2,
        "rollbacks": 1,
        "bad": [22],
        "losses": STEADY,
        "spikes": 0,
    }
    for _ in range(40):
        again.loss(30, 1.1, [])
    assert len(again.state_dict()["losses"]) == 30, "the window has its length again"


def test_a_resumed_run_has_its_guard_counts_and_held_out_decisions(tmp_path: Path) -> None:
    guard = guard_of(tmp_path, max_skips=9)
    guard.skip(3, "model", {}, [])
    held_out = {"stage": 0, "best": [2, 1.5], "since": 4, "ended": {}}
    totals = {"text": [1.0, 2.0, 3.0]}
    state = {"step": 4, "guard": guard.state_dict(), "bytes_per_token": totals}
    new = guard_of(tmp_path)
    run = make_run(tmp_path)
    found = TrainState(new, BytesPerToken(), HeldOut(run, True))
    found.load(Snapshot(state | {"held_out": held_out}, {}))
    assert found.step == 4 and new.skipped == 1 and new.state_dict()["bad"] == [3]
    assert found.bytes_per_token.totals == totals
    assert found.held_out.state_dict() == held_out
    del state["guard"]  # of an older version
    found.load(Snapshot(state, {}))
    assert new.skipped == 1 and found.held_out.best is None


def test_memory_that_runs_out_is_told_with_the_longest_span_of_each_modality() -> None:
    layout = Layout.from_rows(
        [
            [Doc(5, modality=[1, 1, 0, 2, 2]), Doc(2, modality=[2, 2])],
            [Doc(4, modality=[1, 1, 1, 0])],
        ],
        8,
    )
    tokens = Batch.of_ids(torch.zeros(2, 8, dtype=torch.int64), layout)
    tokens = dataclasses.replace(tokens, keys=tuple("abcdefghij"))
    n = torch.tensor([3, 7], dtype=torch.int32)
    raw = Batch.of_values({"image": Values(torch.zeros(2, 9), n, 0 * n, n)})
    say = lambda error, *batches: str(out_of_memory(error, batches, vocabulary(), 12))
    names = vocabulary().modalities
    told = say(MemoryError("not enough"), tokens)
    assert told.startswith("step 12 ran out of memory (not enough): 1 micro-batches of 2x8 places")
    assert (
        f"longest: control 1, {names[0]} 3, {names[1]} 2; samples a, b, c, d, e, f, g, h. " in told
    )
    assert "longest: image 7;" in say(MemoryError(), raw) and "(no memory)" in say(
        MemoryError(), raw
    )
    none = {"audio": Values(torch.zeros(2, 9), 0 * n, 0 * n, 0 * n)}
    assert "longest: image 7;" in say(MemoryError(), raw, Batch.of_values(none))
    assert "2x8" in say(RuntimeError("x: can't allocate memory: y"), tokens, raw)
    assert "image 7" in say(RuntimeError("not enough memory"), tokens, raw)
    assert out_of_memory(RuntimeError("another"), [tokens], None, 1) is None
    bare = str(out_of_memory(torch.OutOfMemoryError("cuda"), [tokens], None, 1))
    assert "longest: control 1, 1 3, 2 2;" in bare


def test_lines_are_appended(tmp_path: Path) -> None:
    for n in range(2):
        append(tmp_path / "a.jsonl", {"n": n})
    assert (tmp_path / "a.jsonl").read_text() == '{"n": 0}\n{"n": 1}\n'
