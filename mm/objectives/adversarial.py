"""The adversarial half of a tokenizer's objective: a critic, its terms, what it adds.

A critic is any network that returns intermediates "score.<i>" and "feature.<i>.<j>", each
(G, ...): one row an item. All sums here are over items, each item's places averaged first, so that
every denominator is the number of items.
G items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.objectives.objective import LossTerm, Network
from mm.registry import NetworkField

CRITIC = "critic"


class Adversarial(Config):
    """A critic, how much its opinion weighs, and from which step on it is asked."""

    critic: NetworkField
    weight: Annotated[float, Field(ge=0, description="factor of the generator's hinge loss")] = 1.0
    feature_weight: Annotated[float, Field(ge=0, description="factor of feature matching")] = 2.0
    start_step: Annotated[
        int, Field(ge=0, description="before it the model trains alone and the critic not at all")
    ] = 1000

    @property
    def networks(self) -> dict[str, Network]:
        """For `Objective.networks`."""
        return {CRITIC: Network(self.critic)}

    @property
    def weights(self) -> dict[str, float]:
        """For `Objective.weights`."""
        return {"adversarial": self.weight, "feature": self.feature_weight}


def counts(n_items: int | Tensor, device: torch.device) -> dict[str, Tensor]:
    """Denominators of all adversarial losses of ``n_items``; a 0-d tensor stays on its device."""
    n = torch.as_tensor(n_items, dtype=torch.float32, device=device)
    return {CRITIC: n, "adversarial": n, "feature": n}


def critic_terms(
    critic: Callable[..., ModelOut],
    real: Sequence[Batch],
    fake: Sequence[Batch],
    weights: Sequence[Tensor] | None = None,
) -> Iterator[LossTerm]:
    """One LossTerm a micro-batch for the critic, the last one steps it. ``fake`` must be detached.

    Args:
        critic: called once on the real and once on the fake items of a micro-batch.
        real: micro-batches as they came.
        fake: the same with reconstructions.
        weights: (G,) float32 of each micro-batch, 0 for items that do not count; default all do.

    Source: hinge loss, Lim and Ye 2017, arXiv:1705.02894, eq. 9.
    """
    for i, (r, f) in enumerate(zip(real, fake, strict=True)):
        on_real, on_fake = scores(critic(r)), scores(critic(f))
        losses = [
            _by_item((1 - a).relu()) + _by_item((1 + b).relu())
            for a, b in zip(on_real, on_fake, strict=True)
        ]
        each = torch.stack(losses).mean(0)
        yield LossTerm(
            {CRITIC: _total(each, weights[i] if weights is not None else None)},
            CRITIC,
            i == len(real) - 1,
        )


def generator_losses(
    critic: Callable[..., ModelOut], real: Batch, fake: Batch, weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over items of "adversarial" (hinge) and "feature" (relative L1 of critic features).

    Args:
        critic: the RAW module, ``requires_grad`` off (``env.frozen``).
        real: recordings; no gradient is taken through them.
        fake: reconstructions, with gradient.
        weight: (G,) float32, 0 for items that do not count; default all do.

    Source: Defossez et al. 2022, arXiv:2210.13438, section 3.4, eq. 3 and 4.
    """
    with torch.no_grad():
        goal = features(critic(real))
    out = critic(fake)
    hinge = [_by_item((1 - score).relu()) for score in scores(out)]
    distance = [
        _by_item((f - g).abs()) / _by_item(g.abs()).clamp_min(1e-6)
        for f, g in zip(features(out), goal, strict=True)
    ]
    return {
        "adversarial": _total(torch.stack(hinge).mean(0), weight),
        "feature": _total(torch.stack(distance).mean(0), weight),
    }


def scores(out: ModelOut) -> list[Tensor]:
    """A critic's scores, by resolution; higher is more real."""
    return _named(out.intermediates, "score.")


def features(out: ModelOut) -> list[Tensor]:
    """A critic's hidden features, by resolution and layer."""
    return _named(out.intermediates, "feature.")


def _named(intermediates: Mapping[str, Any], prefix: str) -> list[Tensor]:
    return [intermediates[name] for name in sorted(intermediates) if name.startswith(prefix)]


def _total(each: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted sum of (G,), a scalar."""
    return each.sum() if weight is None else (each * weight).sum()


def _by_item(x: Tensor) -> Tensor:
    """Mean of each row, (G,) float32."""
    return x.float().flatten(1).mean(1)
