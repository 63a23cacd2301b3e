"""What an image tokenizer learns from: pixels, its quantizer's own losses, maybe a critic.

G items, C colours, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.model.layer import ModelOut
from mm.objectives import adversarial as gan
from mm.objectives.objective import Env, aux_total
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
    l1: float = Field(
        default=0.0, ge=0, le=1, description="share of L1 in the reconstruction; the rest is MSE"
    )
    aux_weights: dict[str, float] = Field(
        {"commitment": 0.25, "entropy": 0.01},
        description="factor of losses that the quantizer reports: commitment (0.25 suits vq, "
        "0.01 lfq), entropy; default 0",
    )
    bypass_steps: Annotated[int, Field(ge=0, description="first steps without the quantizer")] = 0
    adversarial: gan.Adversarial | None = None

    def build(self, vocabulary: Any = None) -> VqObjective:
        """Make the objective."""
        return VqObjective(self)


class VqObjective(gan.Reconstruction):
    """Reconstruction of an image tokenizer's images.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 3 (the codebook term is the EMA of the
    quantizer); with a
    critic: Esser et al. 2020, arXiv:2012.09841, eq. 5-6, with a fixed factor in place of the
    adaptive one of eq. 7.
    """

    made = "image"

    def __init__(self, config: VqObjectiveConfig):
        super().__init__(config, {"reconstruction": 1.0})

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The reconstruction: what a critic says moves with the critic."""
        return ("reconstruction",)

    def counts(self, b: Batch) -> dict[str, Tensor]:
        """Images; the zero item of a rank that has none does not count."""
        n = self.valid(b).sum()
        return dict.fromkeys(("reconstruction", *self.aux_weights), n) | self.judged_counts(b)

    def losses(self, out: ModelOut, b: Batch, env: Env) -> dict[str, Tensor]:
        """Sums over images of each loss's mean over pixels or cells."""
        image = out.intermediates["image"].float()
        error = image - colours(b.values[self.config.modality].data, image.shape[1]).float()
        each = error.square() * (1 - self.config.l1) + error.abs() * self.config.l1
        losses = {"reconstruction": (each.flatten(1).mean(1) * self.valid(b)).sum()}
        cells = out.hidden[0, ..., 0].numel()
        for name in self.aux_weights:
            total = aux_total(out.aux, name)
            if total is not None:
                # latents that are not quantised need not be near any code
                bypass = env.step < self.config.bypass_steps
                losses[name] = total * (0.0 if bypass else 1 / cells)
        return losses
