"""What an image tokenizer learns from: pixels, its quantizer's own losses, maybe a critic.

G items, C colours, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.objectives import adversarial as gan
from mm.objectives.objective import Env, LossTerm, Objective, aux_total
from mm.registry import OBJECTIVES
from mm.tokenizers.image.vq import colours


@OBJECTIVES.register("vq")
class VqObjectiveConfig(Config):
    """Reconstruction, commitment and entropy, and optional adversarial losses.

    Every loss is a mean over images.
    """

    kind: Literal["vq"] = "vq"
    modality: str = "image"
    renamed: ClassVar[Mapping[str, str]] = {
        "commitment": "aux_weights.commitment",
        "entropy": "aux_weights.entropy",
    }
    l1: Annotated[
        float, Field(ge=0, le=1, description="share of L1 in the reconstruction; the rest is MSE")
    ] = 0.0
    aux_weights: Annotated[
        dict[str, float],
        Field(
            description="factor of losses that the quantizer reports: commitment (0.25 suits vq, "
            "0.01 lfq), entropy; default 0"
        ),
    ] = {"commitment": 0.25, "entropy": 0.01}
    bypass_steps: Annotated[int, Field(ge=0, description="first steps without the quantizer")] = 0
    adversarial: gan.Adversarial | None = None

    def build(self, vocabulary: Any = None) -> VqObjective:
        """Make the objective."""
        return VqObjective(self)


class VqObjective(Objective):
    """Reconstruction of ``batch.values[modality]`` by "model", judged by "critic" if there is one.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3 (the codebook term is the EMA of the
    quantizer); with a
    critic: Esser et al. 2020, arXiv:2012.09841, eq. 5-6, with a fixed factor in place of the
    adaptive one of eq. 7.
    """

    def __init__(self, config: VqObjectiveConfig):
        self.config = config
        self.weights, self.aux_weights = {"reconstruction": 1.0}, config.aux_weights
        if config.adversarial is not None:
            self.networks = config.adversarial.networks
            self.weights |= config.adversarial.weights

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """ "bypass": 1 during the warm-up, in which latents are decoded as they are."""
        return {"bypass": float(step < self.config.bypass_steps)}

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The reconstruction: what a critic says moves with the critic."""
        return ("reconstruction",)

    def counts(self, b: Batch) -> dict[str, Tensor]:
        """Images; the zero item of a rank that has none does not count."""
        n = self._valid(b).sum()
        out = dict.fromkeys(("reconstruction", *self.aux_weights), n)
        return out | (gan.counts(n, n.device) if self.config.adversarial is not None else {})

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        asked = self.config.adversarial
        bypass = env.step < self.config.bypass_steps
        if asked is None or env.step < asked.start_step:
            for i, b in enumerate(micros):
                yield LossTerm(self._losses(nets["model"](b), b, bypass), step=i == len(micros) - 1)
            return
        with torch.no_grad():
            fakes = [self._with_image(b, nets["model"](b).intermediates["image"]) for b in micros]
        yield from gan.critic_terms(
            nets[gan.CRITIC], micros, fakes, [self._valid(b) for b in micros]
        )
        with env.frozen(gan.CRITIC) as critic:
            for i, b in enumerate(micros):
                out = nets["model"](b)
                fake = self._with_image(b, out.intermediates["image"])
                judged = gan.generator_losses(critic, b, fake, self._valid(b))
                yield LossTerm(self._losses(out, b, bypass) | judged, step=i == len(micros) - 1)

    def _losses(self, out: ModelOut, b: Batch, bypass: bool) -> dict[str, Tensor]:
        """Sums over images of each loss's mean over pixels or cells."""
        image = out.intermediates["image"].float()
        error = image - colours(b.values[self.config.modality].data, image.shape[1]).float()
        each = error.square() * (1 - self.config.l1) + error.abs() * self.config.l1
        losses = {"reconstruction": (each.flatten(1).mean(1) * self._valid(b)).sum()}
        cells = out.hidden[0, ..., 0].numel()
        for name in self.aux_weights:
            total = aux_total(out.aux, name)
            if total is not None:
                # latents that are not quantised need not be near any code
                losses[name] = total * (0.0 if bypass else 1 / cells)
        return losses

    def _valid(self, b: Batch) -> Tensor:
        return (b.values[self.config.modality].length > 0).float()

    def _with_image(self, b: Batch, image: Tensor) -> Batch:
        """The batch with other images."""
        name = self.config.modality
        return dataclasses.replace(
            b, values={**b.values, name: dataclasses.replace(b.values[name], data=image)}
        )
