"""Losses that modules report, and held-out knobs, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch, Sum
from mm.model.layer import ModelOut
from mm.objectives.adversarial import generator_losses
from mm.objectives.objective import AFTER_WARM_UP, Objective


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
