"""What an audio codec learns from: spectra, samples, latents near their codes, maybe a critic.

G items, N samples.
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
from mm.tokenizers.audio.losses import mel_counts, mel_loss, valid_samples, wave_loss

WAVE = frozenset({"wave"})


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
    windows: Annotated[
        tuple[int, ...], Field(min_length=1, description="STFT lengths of the mel loss, samples")
    ] = (256, 1024)
    mel: Annotated[float, Field(ge=0, description="weight of the mel loss")] = 1.0
    wave: Annotated[float, Field(ge=0, description="weight of the waveform L1")] = 0.1
    aux_weights: Annotated[
        dict[str, float],
        Field(description="factor of losses that the quantizer reports; default 0"),
    ] = {"commitment": 0.25}
    bypass_steps: Annotated[
        int, Field(ge=0, description="first steps without the quantizer; 10-20 % of the run")
    ] = 100
    quantizer_dropout: Annotated[
        float, Field(ge=0, le=1, description="share of steps with a random number of codebooks")
    ] = 0.0
    adversarial: gan.Adversarial | None = None

    def build(self, vocabulary: Any = None) -> CodecObjective:
        return CodecObjective(self)


class CodecObjective(Objective):
    """Reconstruction of ``batch.values[modality]`` by "model", judged by "critic" if there is one.

    Source: Defossez et al. 2022, arXiv:2210.13438, section 3.4; without its loss balancer: weights
    are plain factors.
    """

    def __init__(self, config: CodecConfig):
        self.config = config
        self.weights, self.aux_weights = (
            {"mel": config.mel, "wave": config.wave},
            config.aux_weights,
        )
        if config.adversarial is not None:
            self.networks = config.adversarial.networks
            self.weights |= config.adversarial.weights

    def scheduled(self, step: int, rng: Any) -> dict[str, float]:
        """Warm-up ("bypass" 1) and the share of codebooks in use ("books"), equal on all ranks."""
        books = 1.0
        if rng.random() < self.config.quantizer_dropout:
            books = 1.0 - rng.random()  # in (0, 1]: at least the first book
        return {"bypass": float(step < self.config.bypass_steps), "books": books}

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
        return (
            n
            | dict.fromkeys(("wave", *self.aux_weights), samples)
            | (
                gan.counts(self._valid(b).sum(), length.device)
                if self.config.adversarial is not None
                else {}
            )
        )

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        asked = self.config.adversarial
        if asked is None or env.step < asked.start_step:
            for i, b in enumerate(micros):
                yield LossTerm(
                    self._losses(nets["model"](b, return_intermediates=WAVE), b),
                    step=i == len(micros) - 1,
                )
            return
        with torch.no_grad():
            fakes = [
                self._with_wave(
                    b, nets["model"](b, return_intermediates=WAVE).intermediates["wave"]
                )
                for b in micros
            ]
        yield from gan.critic_terms(
            nets[gan.CRITIC], micros, fakes, [self._valid(b) for b in micros]
        )
        with env.frozen(gan.CRITIC) as critic:
            for i, b in enumerate(micros):
                out = nets["model"](b, return_intermediates=WAVE)
                fake = self._with_wave(b, out.intermediates["wave"])
                judged = gan.generator_losses(critic, b, fake, self._valid(b))
                yield LossTerm(self._losses(out, b) | judged, step=i == len(micros) - 1)

    def _losses(self, out: ModelOut, b: Batch) -> dict[str, Tensor]:
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

    def _valid(self, b: Batch) -> Tensor:
        """(G,) float32, 0 for the zero item of a rank without audio."""
        return (b.values[self.config.modality].length > 0).float()

    def _with_wave(self, b: Batch, wave_GN: Tensor) -> Batch:
        """The batch with other audio of the same lengths."""
        name = self.config.modality
        return dataclasses.replace(
            b, values={**b.values, name: dataclasses.replace(b.values[name], data=wave_GN)}
        )
