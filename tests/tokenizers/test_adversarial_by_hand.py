"""Losses of a critic and of what it judges: arXiv:1705.02894 eq. 9, arXiv:2210.13438 eq. 3, 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm.batch import Batch, Values
from mm.model.layer import ModelOut
from mm.objectives.adversarial import Adversarial, counts, critic_terms, generator_losses

REAL = torch.tensor([[0.5, 2.0], [-1.0, 0.0]])  # two items of two numbers
FAKE = torch.tensor([[-2.0, 1.0], [0.0, 0.5]])


def batch(x: torch.Tensor) -> Batch:
    n = torch.full((len(x),), x.shape[1], dtype=torch.int32)
    return Batch.of_values({"audio": Values(x, n, torch.zeros_like(n), n)})


def critic(b: Batch) -> ModelOut:
    """Two resolutions: the values are the scores and features, and twice the values."""
    x = b.values["audio"].data * 1
    found = {"score.0": x, "score.1": 2 * x, "feature.0.0": x, "feature.1.0": 3 * x - 1}
    return ModelOut(x, {}, None, found, {})


def test_the_critics_hinge_by_hand() -> None:
    (term,) = critic_terms(critic, [batch(REAL)], [batch(FAKE)])
    # of real scores relu(1 - s), of fake ones relu(1 + s); mean of an item, then of resolutions
    first = [(0.5 + 0) / 2 + (0 + 2) / 2, (2 + 1) / 2 + (1 + 1.5) / 2]
    second = [(0 + 0) / 2 + (0 + 3) / 2, (3 + 1) / 2 + (1 + 2) / 2]
    each = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert float(term.losses["critic"]) == pytest.approx(sum(each))
    assert term.network == "critic" and term.step
    weights = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    two = list(critic_terms(critic, [batch(REAL)] * 2, [batch(FAKE)] * 2, weights))
    assert [float(t.losses["critic"]) for t in two] == pytest.approx(each)
    assert [t.step for t in two] == [False, True], "one step for all micro-batches"


def test_the_generators_losses_by_hand() -> None:
    losses = generator_losses(critic, batch(REAL), batch(FAKE))
    hinge = [[(3 + 0) / 2, (5 + 0) / 2], [(1 + 0.5) / 2, (1 + 0) / 2]]
    assert float(losses["adversarial"]) == pytest.approx(sum(sum(h) / 2 for h in hinge))
    # mean |fake - real| over mean |real|: features x and 3 x - 1
    first = [(2.5 + 1) / (0.5 + 2), (1 + 0.5) / (1 + 0)]
    second = [3 * (2.5 + 1) / (0.5 + 5), 3 * (1 + 0.5) / (4 + 1)]
    distance = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert float(losses["feature"]) == pytest.approx(sum(distance))
    one = generator_losses(critic, batch(REAL), batch(FAKE), torch.tensor([0.0, 1.0]))
    assert float(one["adversarial"]) == pytest.approx(sum(hinge[1]) / 2)
    assert float(one["feature"]) == pytest.approx(distance[1])


def test_no_gradient_is_taken_through_the_real_items() -> None:
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    sum(generator_losses(critic, batch(real), batch(fake)).values()).backward()
    assert real.grad is None and fake.grad is not None and fake.grad.abs().sum() > 0


def test_weights_and_counts() -> None:
    config: Any = Adversarial(critic={"kind": "patch_critic"}, weight=0.5, feature_weight=3.0)
    assert config.weights == {"adversarial": 0.5, "feature": 3.0}
    assert list(config.networks) == ["critic"]
    n = counts(3, torch.device("cpu"))
    assert {k: float(v) for k, v in n.items()} == {"critic": 3, "adversarial": 3, "feature": 3}
