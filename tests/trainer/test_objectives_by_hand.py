"""Losses that modules report, and held-out knobs, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch, Sum
from mm.model.layer import ModelOut
from mm.objectives.adversarial import generator_losses
from mm.objectives.objective import AFTER_WARM_UP, LossTerm, Objective
from mm.trainer import stage, step
from mm.trainer.log import metrics


class Plain(Objective):
    aux_weights = {"balance": 0.1}

    def counts(self, b: Batch) -> dict[str, torch.Tensor]:
        return {}

    def terms(self, micros: Any, nets: Any, env: Any) -> Iterator[Any]:
        return iter(())

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        return {"step": step, "drawn": rng.random()}


def out(aux: dict[str, Sum]) -> ModelOut:
    return ModelOut(torch.zeros(1), {}, None, {}, aux)


def test_a_module_that_saw_nothing_reports_no_loss() -> None:
    """Its mean is that of no tokens; the other's is 6 / 3, over the 4 tokens of the batch."""
    batch = Batch.of_ids(torch.zeros(1, 4, dtype=torch.int64))
    aux = {
        "blocks.0.balance": Sum(torch.tensor(6.0), torch.tensor(3.0)),
        "blocks.1.balance": Sum(torch.tensor(0.0), torch.tensor(0.0)),
    }
    assert float(Plain().aux_losses(out(aux), batch)["balance"]) == pytest.approx(8.0)


def test_losses_of_a_step_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank with the same batch: twice the sum, over a count that is known to be theirs."""
    monkeypatch.setattr(metrics, "all_reduce", lambda parts: [2 * part for part in parts])
    monkeypatch.setattr(step.dist, "get_world_size", lambda: 2)
    counts = {"x": torch.tensor(8.0)}
    monkeypatch.setattr(step, "_global_counts", lambda *given: (counts, {}))
    term = LossTerm({"x": torch.tensor(12.0, requires_grad=True)}, "model", True)
    objective = SimpleNamespace(
        corrupt=lambda b, rng, scheduled: b,
        scales=lambda n: {"x": 1.0},
        terms=lambda micros, nets, env: [term],
    )
    backward: list[float] = []
    engine = SimpleNamespace(
        backward=lambda loss, last: backward.append(float(loss.detach())),
        reduce=lambda: None,
        set_lr=lambda factor: factor,
        step=lambda norm: (True, 1.0),
        raw=SimpleNamespace(),
    )
    own: Any = SimpleNamespace(
        objective=objective,
        env=SimpleNamespace(
            take=lambda b: b, rng=None, know=lambda micros: None, before_update=lambda: None
        ),
        clock=SimpleNamespace(start=lambda: None, mark=lambda part: None),
        begin_step=lambda step: {},
        nets=SimpleNamespace(take=lambda name: metrics.MetricSum(), carried=None),
        engines={"model": engine},
        lr_factor=lambda step: 1.0,
        averages=SimpleNamespace(follow=lambda name: None),
        compiled=False,
    )
    usage: Any = SimpleNamespace(update=lambda aux: {})
    row = step.optimizer_step(own, 0, [], usage, None, False)  # type: ignore[arg-type]
    assert row["loss/x"] == row["loss/total"] == 3.0
    assert backward == [3.0], "ranks average their gradients: each gives its own loss twice"


def test_a_stream_is_given_what_the_objective_and_the_launch_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the names of the model's heads, where it wants to know them."""
    heads: list[Any] = []

    class Data:
        def build(self, **given: Any) -> Any:
            self.given = given
            return SimpleNamespace(require_heads=heads.extend)

    data = Data()
    monkeypatch.setattr(stage, "data_ranks", lambda size: SimpleNamespace(rank=size, world=6))
    run: Any = SimpleNamespace(
        seed=3,
        engine=SimpleNamespace(sequence=2),
        stages=[None, SimpleNamespace(data=data)],
        model=SimpleNamespace(heads={"tokens": None, "values": None}),
    )
    words: Any = "vocabulary"
    stage.make_stream(run, 1, SimpleNamespace(transform="masks"), words)  # type: ignore[arg-type]
    assert data.given == {
        "vocabulary": words,
        "transform": "masks",
        "seed": 3,
        "rank": 2,
        "world": 6,
    }
    assert heads == ["tokens", "values"]


def test_held_out_knobs_are_the_same_in_every_run() -> None:
    want = {"step": AFTER_WARM_UP, "drawn": np.random.default_rng(0).random()}
    assert Plain().scheduled_held_out() == want


def test_features_that_are_nothing_do_not_divide() -> None:
    def critic(b: Batch) -> ModelOut:
        x = b.values["audio"].data * 1
        return ModelOut(x, {}, None, {"score.0": x, "feature.0.0": x}, {})

    from mm.batch import Values

    def batch(value: float) -> Batch:
        n = torch.tensor([2], dtype=torch.int32)
        x = torch.full((1, 2), value)
        return Batch.of_values({"audio": Values(x, n, torch.zeros_like(n), n)})

    silent = generator_losses(critic, batch(0.0), batch(0.0))
    assert float(silent["feature"]) == 0.0
    loud = generator_losses(critic, batch(0.0), batch(1.0))
    assert float(loud["feature"]) == pytest.approx(1 / 1e-6)
