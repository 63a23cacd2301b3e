"""What the held-out losses decide, on figures written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.data.batching.collate import to_batch
from mm.errors import UserError
from mm.run import Run
from mm.specs import Segment, TokenSpec
from mm.tasks.chance import nats_at
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.engine.process_group import join
from mm.trainer.held_out import Best, HeldOut, _means
from mm.trainer.held_out_batches import _beside, _targets
from mm.vocabulary import extend_vocabulary


def run_of(out: Path, *stages: dict[str, Any], **keys: Any) -> Run:
    """A run with one stage of 10 steps for each of ``stages``."""
    run = make_run(out, steps=10)
    first = run.stages[0].to_dict()
    run = Run.model_validate(run.to_dict() | {"stages": [first | s for s in stages]} | keys)
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def judge(held_out: HeldOut, *losses: float, first: int = 1, **figures: float) -> None:
    for step, loss in enumerate(losses, start=first):
        held_out.figures = {"val/loss": loss, **figures}
        held_out.new_best = False
        held_out._judge(step, step / 10)


def events(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "events.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.is_file() else []


def test_the_best_is_the_first_of_the_lowest_finite_ones(tmp_path: Path) -> None:
    held_out = HeldOut(run_of(tmp_path, {}), True)
    judge(held_out, 3.0)
    assert held_out.best == Best(1, 3.0) and held_out.new_best and held_out.since == 0
    judge(held_out, 2.0, 2.0, math.nan, -math.inf, first=2)
    assert held_out.best == Best(2, 2.0) and not held_out.new_best and held_out.since == 3
    judge(held_out, 1.9, first=6)
    assert held_out.best == Best(6, 1.9) and held_out.since == 0
    assert held_out.ended == {}, "no early_stop, no early end"


def test_a_stage_ends_early_after_so_many_without_a_new_best(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"early_stop": 2, "eval_every": 1}, {})
    held_out = HeldOut(run, True)
    judge(held_out, 2.0, 3.0)
    assert held_out.ends() == [10, 20]
    judge(held_out, 3.0, first=3)
    assert held_out.ended == {0: 3} and held_out.ends() == [3, 13]
    again = HeldOut(run, False)
    again.load_state_dict(json.loads(json.dumps(held_out.state_dict())))
    assert again.state_dict() == held_out.state_dict() and again.ends() == [3, 13]
    assert again.best == Best(1, 2.0)
    patient = HeldOut(run_of(tmp_path, {"early_stop": 3, "eval_every": 1}, {}), True)
    patient.load_state_dict(held_out.state_dict())
    assert patient.ends() == [10, 20], "it asks for more patience now"
    late = HeldOut(run, True)
    judge(late, 1.0, 2.0, first=9)
    judge(late, 2.0, first=10)
    assert late.ended == {}, "at its last step a stage ends anyway"
    empty = HeldOut(run, True)
    empty.load_state_dict({})
    assert (empty.stage, empty.best, empty.since, empty.ended) == (0, None, 0, {})


def test_a_new_stage_begins_without_a_best(tmp_path: Path) -> None:
    held_out = HeldOut(run_of(tmp_path, {}, {}), True)
    judge(held_out, 2.0, 3.0)
    at = lambda index: SimpleNamespace(stage=SimpleNamespace(index=index))
    trainer: Any = at(0)
    held_out.on_stage_start(trainer)
    assert held_out.best == Best(1, 2.0) and held_out.since == 1, "of this stage"
    trainer = at(1)
    held_out.on_stage_start(trainer)
    assert (held_out.stage, held_out.best, held_out.since) == (1, None, 0)


@pytest.mark.parametrize("keys", [{"export": "best"}, {"checkpoints": {"keep_best": True}}])
def test_what_needs_held_out_losses_is_refused_without(tmp_path: Path, keys: Any) -> None:
    trainer: Any = SimpleNamespace(stage=SimpleNamespace(index=0))
    with pytest.raises(UserError, match=r"stages\.0: .* its eval_every is 0"):
        HeldOut(run_of(tmp_path / "a", {}, **keys), True).on_stage_start(trainer)
    # asked of the last stage alone
    HeldOut(run_of(tmp_path / "b", {}, {}, **keys), True).on_stage_start(trainer)


def test_worse_than_chance_and_rising_are_said_once_and_not_at_first(tmp_path: Path) -> None:
    run = run_of(tmp_path, {})
    held_out, chance = HeldOut(run, True), {"val/text/loss": 5.0, "val/text/loss_chance": 4.0}
    judge(held_out, 2.0, **chance)
    assert events(run) == []
    judge(held_out, *[3.0] * 9, first=2, **chance)
    assert [e["event"] for e in events(run)] == [
        "held-out: text worse than chance",
        "held-out: rising",
    ]
    quiet = HeldOut(run_of(tmp_path, {}, name="b"), False)
    judge(quiet, 2.0, *[3.0] * 9, **chance)
    assert events(quiet.run) == [], "the main process alone writes"
    equal = HeldOut(run_of(tmp_path, {}, name="c"), True)
    judge(equal, *[2.0 - 0.1 * i for i in range(10)], **chance | {"val/text/loss": 4.0})
    assert events(equal.run) == [], "as good as chance, and falling"


def test_means_are_of_what_was_counted() -> None:
    join(1)
    t = lambda x: torch.tensor(x, dtype=torch.float64)
    n, means = _means({"b": t(6.0), "a": t(1.0)}, {"a": t(0.0), "b": t(4.0), "c": t(2.0)})
    assert means == {"b": 1.5} and {k: float(v) for k, v in n.items()} == {"a": 0, "b": 4, "c": 2}


TEXT = BytesConfig(modality="text").build()
WORDS = extend_vocabulary([TEXT.spec, TokenSpec("audio", 4)])


def test_chance_and_bytes_of_a_target_by_hand() -> None:
    """Text first or after another text; a condition is no target, and its bytes count."""
    spec = TEXT.spec
    ids = [code.ids for code in TEXT.encode(["hello", "ab", "never"])]
    given = Segment("text", ids[2], role="condition")
    first = to_batch([[[Segment("text", ids[0])]]], WORDS)
    second = to_batch([[[given, Segment("text", ids[1])]]], WORDS)
    one, two = math.log(spec.n_ids), math.log(spec.n_ids + 1)  # the end is a choice after a code
    weight, nats, targets, codes = _targets(first, "text", WORDS).tolist()
    assert (weight, targets, codes) == (6, 6, 5) and nats == pytest.approx(one + 5 * two)
    assert _targets(first, "audio", WORDS).tolist() == [0, 0, 0, 0]
    join(1)
    chance, ratio, some = _beside([first, second], WORDS, {"text": TEXT}, torch.device("cpu"))
    assert some
    assert chance == {"text": pytest.approx((2 * one + (5 + 2) * two) / (6 + 3))}
    # 12 codes are 12 bytes; of the 9 targets 7 are codes
    assert ratio == {"text": pytest.approx(7 / 9)}
    assert _beside([first], WORDS, {}, torch.device("cpu"))[1] == {}


@pytest.mark.filterwarnings("error")
def test_values_have_targets_and_no_chance() -> None:
    """They alone, and beside text; the split is not said to have no target."""
    series = TokenSpec("time_series", 0, continuous=True, n_features=2)
    vocabulary = extend_vocabulary([TEXT.spec, series])
    x = np.ones((3, 2), np.float32)
    values = Segment("time_series", np.full(3, -1), x, role="target")
    join(1)
    for row, known in (([values], set()), ([values, Segment("text", np.arange(3))], {"text"})):
        batch = to_batch([[row]], vocabulary)
        chance, _, some = _beside([batch], vocabulary, {"text": TEXT}, torch.device("cpu"))
        assert some and chance.keys() == known and all(map(math.isfinite, chance.values()))
    with pytest.raises(ValueError, match="'time_series' has values in place of ids: there is no"):
        nats_at(np.arange(3), np.zeros(3, bool), series)
