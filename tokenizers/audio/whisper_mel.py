"""The log-mel frames that Whisper's encoder was trained on, for an adapter to read.

N samples, F frames, M mels, L places of `stack` frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, TokenSpec, Waveform
from mm.tokenizers.audio.mel import resample, wave_of
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of

TOP_HZ = 8000.0
FLOOR, RANGE = 1e-10, 8.0  # of power; decades below the loudest that are told apart
LINEAR_HZ, BREAK_MEL, STEP = 200 / 3, 15.0, math.log(6.4) / 27


class WhisperMel(ConfigTokenizer):
    """Recordings to float32 values (L, stack * M): `log10` of mel power, as Whisper scales it.

    Each is filled up with silence to ``seconds``, which the encoder reads, too. Source: Radford et
    al. 2022 (arXiv:2212.04356), section 2.2, as `WhisperFeatureExtractor` of `transformers` has it.
    `decode` gives samples with phases guessed by Griffin & Lim 1984.
    """

    def __init__(self, config: WhisperMelConfig):
        self.config = config
        self.spec = TokenSpec(
            config.modality,
            0,
            tokens_per_second=config.sample_rate / config.hop / config.stack,
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=config.n_mels * config.stack,
            inline=config.inline,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Frames of each `Waveform`, resampled.

        Raises:
            UserError: something is no Waveform of finite samples, or is longer than ``seconds``.
        """
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Any) -> Encoded:
        samples = np.asarray(raw.samples) if isinstance(raw, Waveform) else None
        if samples is None or samples.ndim != 1 or not np.isfinite(samples).all():
            raise UserError(f"whisper mel: expected a finite Waveform, got {type(raw).__name__}")
        c = self.config
        wave = resample(
            torch.from_numpy(samples.astype(np.float32)), raw.sample_rate, c.sample_rate
        )
        room = c.seconds * c.sample_rate
        if len(wave) > room:
            raise UserError(
                f"whisper mel: a recording of {len(wave) / c.sample_rate:.1f} s, the encoder reads "
                f"{c.seconds} s: cut it"
            )
        mel = self.log_mel(torch.nn.functional.pad(wave, (0, room - len(wave))))
        values = mel.T.reshape(-1, self.spec.n_features).contiguous().numpy()
        return Encoded(values=values, side={"samples": len(wave)})

    def log_mel(self, wave: Tensor) -> Tensor:
        """`(M, F)` float32 of samples `(N,)` float32."""
        c = self.config
        window = torch.hann_window(c.n_fft)
        spectrum = torch.stft(wave, c.n_fft, c.hop, window=window, return_complex=True)
        power = (spectrum[:, :-1].abs() ** 2).contiguous()
        log = (slaney_filters(c.n_fft, c.n_mels, c.sample_rate).T @ power).clamp_min(FLOOR).log10()
        return (torch.maximum(log, log.max() - RANGE) + 4) / 4

    def decode(self, codes: Sequence[Encoded]) -> list[Waveform]:
        return [self._decode(code) for code in codes]

    def _decode(self, code: Encoded) -> Waveform:
        c = self.config
        values = np.zeros((0, self.spec.n_features)) if code.values is None else code.values
        n = int(code.side.get("samples", len(values) * c.stack * c.hop))
        log = torch.from_numpy(np.array(values, np.float32)).reshape(-1, c.n_mels)
        if not len(log) or not n:
            return Waveform(np.zeros(0, np.float32), c.sample_rate)
        rows = max(-(-n // c.hop), c.n_fft // c.hop + 1)  # as many as one window reads
        log = torch.cat((log, log[-1:].expand(rows, -1)))[:rows]
        bank = slaney_filters(c.n_fft, c.n_mels, c.sample_rate)
        spectrum = (10 ** (4 * log - 4).clamp_max(4) @ torch.linalg.pinv(bank)).clamp_min(0).sqrt()
        wave = wave_of(spectrum, c.n_fft, c.hop)
        return Waveform(wave[:n].clamp(-1, 1).numpy(), c.sample_rate)


@functools.lru_cache(maxsize=8)
def slaney_filters(n_fft: int, n_mels: int, sample_rate: int) -> Tensor:
    """Triangles of equal area (n_fft // 2 + 1, M) on Slaney's mel scale, 0 to 8,000 Hz, float32.

    Linear below 1,000 Hz, 200 / 3 Hz a mel, above it logarithmic, 27 mels to the factor 6.4.
    Source: Slaney 1998, Auditory Toolbox, as in librosa.
    """
    top = BREAK_MEL + math.log(TOP_HZ / (BREAK_MEL * LINEAR_HZ)) / STEP
    mels = np.linspace(0.0, top, n_mels + 2)
    edges = np.where(
        mels < BREAK_MEL,
        mels * LINEAR_HZ,
        BREAK_MEL * LINEAR_HZ * np.exp(STEP * (mels - BREAK_MEL)),
    )
    bins = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    up, down = (bins[:, None] - low) / (centre - low), (high - bins[:, None]) / (high - centre)
    bank = np.maximum(0, np.minimum(up, down)) * (2 / (high - low))
    return torch.from_numpy(bank).float()


@TOKENIZERS.register("whisper_mel")
class WhisperMelConfig(Config):
    """Log-mel frames of Whisper's scale; nothing is trained."""

    kind: Literal["whisper_mel"] = "whisper_mel"
    modality: str = "audio"
    sample_rate: Annotated[int, Field(gt=0, le=2**20, description="Hz; others are resampled")] = (
        16000
    )
    n_mels: Annotated[int, Field(gt=0, le=1024)] = 80
    n_fft: Annotated[int, Field(gt=1, le=2**16, description="samples of a window")] = 400
    hop: Annotated[int, Field(gt=0, le=2**16, description="samples between frames")] = 160
    stack: Annotated[int, Field(gt=0, le=64, description="frames that one place takes")] = 2
    seconds: Annotated[
        int, Field(gt=0, le=3600, description="that every recording is filled up to")
    ] = 30
    inline: Annotated[
        bool, Field(description="stands inside the text around it, without a begin and an end")
    ] = False

    @model_validator(mode="after")
    def _whole_places(self) -> WhisperMelConfig:
        if self.seconds * self.sample_rate % (self.hop * self.stack):
            raise ValueError("seconds must be a whole number of places of hop * stack samples")
        return self

    def fit(self, recordings: Iterable[Any] = ()) -> WhisperMel:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> WhisperMel:
        """Make it; its folder holds nothing but this config."""
        return WhisperMel(self)

    @classmethod
    def smallest_tokenizer(cls) -> WhisperMel:
        """An instance for the laws."""
        return cls(sample_rate=16000, n_mels=16, n_fft=400, seconds=1).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        rng = np.random.default_rng(0)
        lengths = (1600, 800, 4000, 1)
        waves = [(0.3 * rng.standard_normal(n)).clip(-1, 1).astype(np.float32) for n in lengths]
        return [Waveform(w, rate) for w, rate in zip(waves, (8000, 8000, 16000, 8000), strict=True)]
