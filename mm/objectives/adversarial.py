"""What tokenizers' objectives share: reconstruction by a model, judged by a critic or not.

A critic is any network that returns intermediates "score.<i>" and "feature.<i>.<j>", each
(G, ...): one row an item. All sums here are over items, each item's places averaged first, so that
every denominator is the number of items.
G items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.objectives.objective import Env, LossTerm, Network, Objective
from mm.registry import NetworkField

CRITIC = "critic"


class Adversarial(Config):
    """A critic, how much its opinion weighs, and from which step on it is asked."""

    critic: NetworkField
    weight: Annotated[float, Field(ge=0, description="factor of the generator's hinge loss")] = 1.0
    feature_weight: Annotated[float, Field(ge=0, description="factor of feature matching")] = 2.0
    start_step: int = Field(
        default=1000, ge=0, description="before it the model trains alone and the critic not at all"
    )

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


class Reconstruction(Objective):
    """Reconstruction of ``batch.values[modality]`` by "model", judged by "critic" if there is one.

    Args:
        config: has the fields ``modality``, ``adversarial``, ``aux_weights`` and ``bypass_steps``.
        weights: of the losses without a critic.
    """

    made: ClassVar[str]  # the intermediate that holds the reconstruction

    def __init__(self, config: Any, weights: dict[str, float]):
        self.config, self.weights, self.aux_weights = config, weights, config.aux_weights
        if config.adversarial is not None:
            self.networks = config.adversarial.networks
            self.weights = weights | config.adversarial.weights

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """ "bypass": 1 during the warm-up, in which latents are decoded as they are."""
        return {"bypass": float(step < self.config.bypass_steps)}

    def losses(self, out: ModelOut, b: Batch, env: Env) -> dict[str, Tensor]:
        """Sums of the losses without a critic."""
        raise NotImplementedError

    def judged_counts(self, b: Batch) -> dict[str, Tensor]:
        """`counts` of the losses that a critic adds; {} without one."""
        valid = self.valid(b)
        return counts(valid.sum(), valid.device) if self.config.adversarial is not None else {}

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        run = lambda b: nets["model"](b, return_intermediates=frozenset({self.made}))
        asked = self.config.adversarial
        if asked is None or env.step < asked.start_step:
            for i, b in enumerate(micros):
                yield LossTerm(self.losses(run(b), b, env), step=i == len(micros) - 1)
            return
        with torch.no_grad():
            fakes = [self.with_reconstruction(b, run(b)) for b in micros]
        weights = [self.valid(b) for b in micros]
        yield from critic_terms(nets[CRITIC], micros, fakes, weights)
        with env.frozen(CRITIC) as critic:
            for i, b in enumerate(micros):
                out = run(b)
                judged = generator_losses(critic, b, self.with_reconstruction(b, out), weights[i])
                yield LossTerm(self.losses(out, b, env) | judged, step=i == len(micros) - 1)

    def valid(self, b: Batch) -> Tensor:
        """(G,) float32, 0 for the zero item of a rank without the modality."""
        return (b.values[self.config.modality].length > 0).float()

    def with_reconstruction(self, b: Batch, out: ModelOut) -> Batch:
        """The batch with what the model made of its values, of the same lengths."""
        name = self.config.modality
        values = dataclasses.replace(b.values[name], data=out.intermediates[self.made])
        return dataclasses.replace(b, values={**b.values, name: values})


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
