"""Audio as log-mel frames: values in place of ids, for an adapter to read.

N samples, F frames, M mels, L places of `stack` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, TokenSpec, Waveform
from mm.tokenizers.audio.mel import log_mel, mel_filterbank, resample, wave_of
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of

FLOOR = 1e-5  # magnitude; its logarithm is the quietest value


class MelFrames(ConfigTokenizer):
    """Recordings to float16 values (L, stack * M): log-mel magnitudes, scaled to about [-1, 1].

    `decode` gives the samples back with phases guessed by Griffin & Lim 1984, to hear what a model
    is given.
    """

    def __init__(self, config: MelFramesConfig):
        self.config = config
        rate = config.sample_rate / config.hop / config.stack
        self.spec = TokenSpec(
            config.modality,
            0,
            tokens_per_second=rate,
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=config.n_mels * config.stack,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Frames of each `Waveform`, resampled; the last place is filled up with silence.

        Raises:
            UserError: something is no Waveform of finite samples.
        """
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Any) -> Encoded:
        samples = np.asarray(raw.samples) if isinstance(raw, Waveform) else None
        if samples is None or samples.ndim != 1 or not np.isfinite(samples).all():
            raise UserError(f"mel frames: expected a finite Waveform, got {type(raw).__name__}")
        c = self.config
        wave = resample(
            torch.from_numpy(samples.astype(np.float32)), raw.sample_rate, c.sample_rate
        )
        n = max(1, -(-len(wave) // (c.hop * c.stack))) * c.stack * c.hop
        wave = torch.nn.functional.pad(wave, (0, n - len(wave)))
        mel = log_mel(
            wave[None],
            sample_rate=c.sample_rate,
            n_mels=c.n_mels,
            n_fft=c.n_fft,
            hop=c.hop,
            floor=FLOOR,
        )[0]
        values = _scaled(mel).reshape(-1, self.spec.n_features).to(torch.float16).numpy()
        return Encoded(values=values, side={"samples": int(round(len(samples)))})

    def decode(self, codes: Sequence[Encoded]) -> list[Waveform]:
        return [self._decode(code) for code in codes]

    def _decode(self, code: Encoded) -> Waveform:
        c = self.config
        values = np.zeros((0, self.spec.n_features)) if code.values is None else code.values
        mel = _unscaled(torch.from_numpy(np.array(values, np.float32)).reshape(-1, c.n_mels)).exp()
        bank = mel_filterbank(c.n_fft, c.n_mels, c.sample_rate, torch.float32, mel.device)
        spectrum = (mel @ torch.linalg.pinv(bank)).clamp_min(0) * (c.n_fft / 2)
        if not len(spectrum):
            return Waveform(np.zeros(0, np.float32), c.sample_rate)
        wave = wave_of(spectrum, c.n_fft, c.hop)
        return Waveform(wave.clamp(-1, 1).numpy(), c.sample_rate)


def _scaled(mel: torch.Tensor) -> torch.Tensor:
    """From the floor's logarithm, -11.5, and full scale, 0, to -1 and 1."""
    return 1 - mel * (2 / float(np.log(FLOOR)))


def _unscaled(values: torch.Tensor) -> torch.Tensor:
    return (1 - values) * (float(np.log(FLOOR)) / 2)


@TOKENIZERS.register("mel_frames")
class MelFramesConfig(Config):
    """Log-mel frames; nothing is trained."""

    kind: Literal["mel_frames"] = "mel_frames"
    modality: Annotated[
        str, Field(description="audio, or mel where a codec of audio is beside it")
    ] = "audio"
    sample_rate: Annotated[int, Field(gt=0, le=2**20, description="Hz; others are resampled")] = (
        16000
    )
    n_mels: Annotated[int, Field(gt=0, le=1024)] = 80
    n_fft: Annotated[int, Field(gt=1, le=2**16, description="samples of a window, even")] = 400
    hop: Annotated[int, Field(gt=0, le=2**16, description="samples between frames")] = 160
    stack: Annotated[int, Field(gt=0, le=64, description="frames that one place takes")] = 4

    @model_validator(mode="after")
    def _even(self) -> MelFramesConfig:
        if self.n_fft % 2 or self.hop > self.n_fft:
            raise ValueError("n_fft must be even, and not below hop")
        return self

    def fit(self, recordings: Iterable[Any] = ()) -> MelFrames:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> MelFrames:
        """Make it; its folder holds nothing but this config."""
        return MelFrames(self)

    @classmethod
    def smallest_tokenizer(cls) -> MelFrames:
        """An instance for the laws."""
        return cls(sample_rate=8000, n_mels=16, n_fft=128, hop=80, stack=2).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        rng = np.random.default_rng(0)
        lengths = (1600, 800, 4000, 1)
        waves = [(0.3 * rng.standard_normal(n)).clip(-1, 1).astype(np.float32) for n in lengths]
        return [Waveform(w, rate) for w, rate in zip(waves, (8000, 8000, 16000, 8000), strict=True)]
