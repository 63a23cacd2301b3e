"""What an audio codec learns from: spectra, samples, latents near their codes, maybe a critic.

G items, N samples.
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
from mm.tokenizers.audio.losses import mel_counts, mel_loss, valid_samples, wave_loss


@OBJECTIVES.register("codec")
class CodecConfig(Config):
    """Multi-scale mel and waveform reconstruction, commitment, and optional adversarial losses.

    Every loss is a mean over seconds of audio, so the weights do not depend on clip length or batch
    size.
    """

    kind: Literal["codec"] = "codec"
    modality: str = "audio"
    renamed: ClassVar[Mapping[str, str]] = {"commitment": "aux_weights.commitment"}
    sample_rate: Annotated[int, Field(gt=0, description="Hz, that of the codec")] = 16000
    windows: tuple[int, ...] = Field(
        default=(256, 1024), min_length=1, description="STFT lengths of the mel loss, samples"
    )
    mel: Annotated[float, Field(ge=0, description="weight of the mel loss")] = 1.0
    wave: Annotated[float, Field(ge=0, description="weight of the waveform L1")] = 0.1
    aux_weights: dict[str, float] = Field(
        default={"commitment": 0.25},
        description="factor of losses that the quantizer reports; default 0",
    )
    bypass_steps: int = Field(
        default=100, ge=0, description="first steps without the quantizer; 10-20 % of the run"
    )
    quantizer_dropout: float = Field(
        default=0.0, ge=0, le=1, description="share of steps with a random number of codebooks"
    )
    adversarial: gan.Adversarial | None = None

    def build(self, vocabulary: Any = None) -> CodecObjective:
        return CodecObjective(self)


class CodecObjective(gan.Reconstruction):
    """Reconstruction of a codec's audio.

    Source: Defossez et al. 2022, arXiv:2210.13438, section 3.4; without its loss balancer: weights
    are plain factors.
    """

    made = "wave"

    def __init__(self, config: CodecConfig):
        super().__init__(config, {"mel": config.mel, "wave": config.wave})

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """Warm-up ("bypass" 1) and the share of codebooks in use ("books"), equal on all ranks."""
        books = 1.0
        if rng.random() < self.config.quantizer_dropout:
            books = 1.0 - rng.random()  # in (0, 1]: at least the first book
        return {**super().scheduled(step, rng), "books": books}

    def scheduled_held_out(self) -> dict[str, float]:
        return {"bypass": 0.0, "books": 1.0}

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The reconstruction: what a critic says moves with the critic."""
        return ("mel", "wave")

    def counts(self, b: Batch) -> dict[str, Tensor]:
        """Samples, by item length alone.

        A codec weighs each latent's commitment by the samples it stands for.
        """
        length = b.values[self.config.modality].length
        samples = length.sum().float()
        n = {"mel": mel_counts(length, self.config.windows)}
        return n | dict.fromkeys(("wave", *self.aux_weights), samples) | self.judged_counts(b)

    def losses(self, out: ModelOut, b: Batch, env: Env) -> dict[str, Tensor]:
        c, values = self.config, b.values[self.config.modality]
        target = values.data * valid_samples(values.length, values.data.shape[1])
        wave = out.intermediates["wave"]
        losses = {
            "mel": mel_loss(
                wave, target, values.length, sample_rate=c.sample_rate, windows=c.windows
            ),
            "wave": wave_loss(wave, target, values.length),
        }
        for name in self.aux_weights:
            total = aux_total(out.aux, name)
            losses[name] = wave.new_zeros(()) if total is None else total
        return losses
