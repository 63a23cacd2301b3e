"""Audio: mono float32 recordings at their own sample rate."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mm.data.modalities.base import BadSample, Features, Modality, one_line
from mm.data.streams.shuffle import uniform
from mm.registry import MODALITIES
from mm.specs import Waveform

if TYPE_CHECKING:
    from torch import Tensor

    from mm.batch import Values

# Names of libsndfile -> extension. Nothing else is read.
FORMATS = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "OGG": "ogg", "MP3": "mp3", "AIFF": "aiff"}
LOWPASS_ZEROS = 6  # of torchaudio's filter
MAX_TAPS = 2**28  # 1 GiB
STREAMED = 0x7FFFF000  # lengths from here on stand for "not known" in a WAV header


@MODALITIES.register("audio")
class AudioModality(Modality):
    """`Waveform`: mono float32 in [-1, 1], channels averaged. Length: frames of the file."""

    kind: Literal["audio"] = "audio"
    max_seconds: float = 1800.0
    min_seconds: float = 0.01  # of what packing takes

    order: ClassVar[int] = 20
    extensions: ClassVar[tuple[str, ...]] = ("wav", "flac", "ogg", "mp3", "aiff")
    value_name: ClassVar[str] = "a Waveform"
    unit: ClassVar[str] = "frames"
    tokens: ClassVar[Mapping[str, int]] = {"audio": 3, "mel": 5}
    shown_as: ClassVar[Literal["text", "image", "audio"]] = "audio"
    has_items: ClassVar[bool] = True
    reconstruction: ClassVar[str] = "wave"

    def decode(self, data: bytes) -> Waveform:
        plain = _plain_wav(data, self.max_seconds)
        if plain is not None:
            levels = plain[1].astype(np.float32) * np.float32(2.0**-15)
            return Waveform(levels[:, 0] if levels.shape[1] == 1 else levels.mean(axis=1), plain[0])
        with self._open(data) as info:
            frames, rate = int(info.frames), int(info.samplerate)
            try:
                samples = info.read(dtype="float32", always_2d=True)
            except Exception as error:
                raise BadSample(f"audio: {one_line(error)}") from error
        if len(samples) == 0:
            raise BadSample(f"audio: header says {frames} frames, there are none")
        mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
        if not np.isfinite(mono).all():
            raise BadSample("audio: samples are not finite")
        return Waveform(np.ascontiguousarray(np.clip(mono, -1.0, 1.0)), rate)

    def header(self, data: bytes) -> tuple[str, int, int]:
        """(extension, frames, sample rate) without decoding.

        Raises BadSample when the header is absurd or over the cap.
        """
        plain = _plain_wav(data, self.max_seconds)
        if plain is not None:
            return "wav", len(plain[1]), plain[0]
        with self._open(data) as info:
            return FORMATS[str(info.format)], int(info.frames), int(info.samplerate)

    def length(self, data: bytes) -> int:
        return self.header(data)[1]

    def check(self, data: bytes) -> tuple[str, int]:
        extension, _, _ = self.header(data)
        return extension, len(self.decode(data).samples)

    def check_whole(self, data: bytes) -> None:
        _, frames, rate = self.header(data)
        promised = _promised_bytes(data)
        if promised is not None and promised[0] > promised[1]:
            raise BadSample(
                f"audio: cut short: the header promises {promised[0]} bytes of sound, the file has "
                f"{promised[1]}"
            )
        if frames < self.min_seconds * rate:
            raise BadSample(
                f"audio: {frames} frames are {1000 * frames / rate:.1f} ms, less than "
                f"{1000 * self.min_seconds:g} ms"
            )

    @contextmanager
    def _open(self, data: bytes) -> Iterator[Any]:
        """Yield an open `SoundFile` with nothing but the header read and checked."""
        import soundfile

        with ExitStack() as stack:
            try:
                info = stack.enter_context(soundfile.SoundFile(io.BytesIO(data)))
                kind, rate = str(info.format), int(info.samplerate)
                frames, channels = int(info.frames), int(info.channels)
            except Exception as error:
                raise BadSample(f"audio: unreadable header ({one_line(error)})") from error
            if kind not in FORMATS:
                raise BadSample(
                    f"audio: format {kind} is not one of {', '.join(sorted(set(FORMATS.values())))}"
                )
            if not 1000 <= rate <= 768_000:
                raise BadSample(f"audio: header says {rate} Hz")
            if not 1 <= channels <= 64:
                raise BadSample(f"audio: header says {channels} channels")
            if frames < 1:
                raise BadSample("audio: no frames")
            if frames > self.max_seconds * rate:
                raise BadSample(
                    f"audio: header says {frames / rate:.0f} s, the cap is {self.max_seconds:.0f} s"
                )
            yield info

    def owns(self, value: Any) -> bool:
        return isinstance(value, Waveform)

    def accept(self, value: Any) -> Waveform:
        """A `Waveform`, also of a pair (samples (N,), sample rate in Hz)."""
        if not isinstance(value, Waveform):
            pair = isinstance(value, (tuple, list)) and len(value) == 2
            if not pair or not isinstance(value[1], (int, np.integer)):
                raise BadSample("audio: give a file, a Waveform, or (samples, sample rate in Hz)")
            value = Waveform(value[0], int(value[1]))
        samples = np.asarray(value.samples)
        if samples.ndim != 1 or len(samples) == 0 or samples.dtype.kind != "f":
            raise BadSample(
                "audio: samples are (N,) floats in [-1, 1], mono; "
                f"found {samples.dtype} {samples.shape}"
            )
        if not np.isfinite(samples).all():
            raise BadSample("audio: samples are not finite")
        return Waveform(np.clip(samples, -1, 1).astype(np.float32), value.sample_rate)

    def describe(self, value: Waveform) -> str:
        samples = np.asarray(value.samples)
        seconds = len(samples) / value.sample_rate
        peak = float(np.abs(samples).max(initial=0.0))
        return f"{seconds:.3f} s at {value.sample_rate} Hz, peak {peak:.3f}"

    def save(self, value: Waveform, path: Path) -> None:
        import soundfile

        samples = np.clip(np.asarray(value.samples, np.float32), -1, 1)
        kind = {extension: name for name, extension in reversed(FORMATS.items())}.get(
            path.suffix.removeprefix(".").lower(), "WAV"
        )
        lossless = soundfile.check_format(kind, "PCM_16")  # else what the format has by itself
        soundfile.write(
            path, samples, value.sample_rate, "PCM_16" if lossless else None, format=kind
        )

    def vary(self, data: bytes, key: int) -> bytes:
        """A WAV that is a little faster or slower, with its pitch, and louder or softer."""
        import soundfile

        wave = self.decode(data)
        speed, level = uniform(key, np.arange(2))
        places = np.arange(0, len(wave.samples) - 1, 0.92 + 0.16 * speed)
        samples = np.interp(places, np.arange(len(wave.samples)), wave.samples)
        out = io.BytesIO()
        loud = np.clip((0.7 + 0.5 * level) * samples, -1, 1)
        soundfile.write(out, loud, wave.sample_rate, format="WAV", subtype="PCM_16")
        return out.getvalue()

    def n_bytes(self, value: Waveform, tokenizer: Any = None) -> int:
        """Of 16-bit samples; with a tokenizer, of those at its sample rate."""
        rate = getattr(tokenizer, "sample_rate", value.sample_rate) / value.sample_rate
        return round(2 * len(value.samples) * rate)

    def item(self, value: Waveform, config: Any) -> np.ndarray:
        samples = resample(value, config.sample_rate).samples
        return np.ascontiguousarray(loudness(samples, config.loudness), np.float32)

    def stack(
        self, items: Sequence[np.ndarray], counts: np.ndarray, key: int, config: Any
    ) -> Values:
        """(G, N) float32: random crops, shorter ones padded with zeros."""
        import torch

        from mm.batch import Values

        size = max(1, round(config.crop_seconds * config.sample_rate))
        out = np.zeros((len(items), size), np.float32)
        length = np.empty(len(items), np.int32)
        where = uniform(key, counts)
        for g, samples in enumerate(items):
            start = int(where[g] * (max(0, len(samples) - size) + 1))
            part = samples[start : start + size]
            out[g, : len(part)], length[g] = part, len(part)
        return Values.items(torch.from_numpy(out), torch.from_numpy(length))

    def from_network(self, x: Tensor, length: int, sample_rate: int) -> Waveform:
        """(N,) float, of which ``length`` are real."""
        return Waveform(x[:length].numpy().clip(-1, 1), sample_rate)

    def features(self) -> Features:
        return AudioFeatures()


def _plain_wav(data: bytes, max_seconds: float) -> tuple[int, np.ndarray] | None:
    """Sample rate and a view (frames, channels) int16 of a plain WAV: 16-bit PCM, 44-byte header.

    libsndfile, which calls back into Python for every read, takes several times as long as the
    samples themselves. None for any other file, and for one that there is anything to say about:
    libsndfile judges it.
    """
    if len(data) < 44 or data[:4] != b"RIFF" or data[8:16] != b"WAVEfmt " or data[36:40] != b"data":
        return None
    size, code, channels, rate, _, frame, bits = struct.unpack_from("<IHHIIHH", data, 16)
    (n,) = struct.unpack_from("<I", data, 40)
    plain = (size, code, bits) == (16, 1, 16) and 1 <= channels <= 64 and frame == 2 * channels
    if not plain or not 1000 <= rate <= 768_000 or n > len(data) - 44 or n % frame:
        return None
    if not 0 < n // frame <= max_seconds * rate:
        return None
    return rate, np.frombuffer(data, "<i2", n // 2, 44).reshape(-1, channels)


def _promised_bytes(data: bytes) -> tuple[int, int] | None:
    """Bytes of sound that the header of a WAV promises, and those that are there.

    None for other formats, and for a stream whose writer did not know its length.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    at = 12
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] == b"data":
            return None if size >= STREAMED else (size, len(data) - at - 8)
        at += 8 + size + size % 2
    return None


def resample(wave: Waveform, sample_rate: int) -> Waveform:
    """Change the sample rate by windowed-sinc interpolation.

    Returns ``wave`` itself when it has that rate. Raises BadSample where the two rates have next
    to no common divisor, so that the filter would take gigabytes.
    """
    if wave.sample_rate == sample_rate:
        return wave
    common = math.gcd(wave.sample_rate, sample_rate)
    old, new = wave.sample_rate // common, sample_rate // common
    # One filter a phase; each reaches LOWPASS_ZEROS zero crossings of the lower rate to both sides.
    taps = new * (old + 2 * math.ceil(LOWPASS_ZEROS * old / min(old, new)))
    if taps > MAX_TAPS:
        raise BadSample(
            f"audio: {wave.sample_rate} Hz to {sample_rate} Hz takes a filter of {taps:,} taps, "
            f"the limit is {MAX_TAPS:,}; convert the file first: sox IN.wav -r {sample_rate} "
            "OUT.wav"
        )
    import torch
    from torchaudio.functional import resample as convert

    with torch.no_grad():
        out = convert(
            torch.from_numpy(np.ascontiguousarray(wave.samples)), wave.sample_rate, sample_rate
        )
    return Waveform(out.numpy(), sample_rate)


def loudness(samples: np.ndarray, mode: str) -> np.ndarray:
    """Scale (N,) samples: "peak" to 0.95, "rms" to -20 dBFS without clipping.

    Silence and "none" stay as they are.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if mode == "none" or peak < 1e-6:
        return samples
    gain = 0.95 / peak
    if mode == "rms":
        gain = min(gain, 0.1 / float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))))
    return samples * np.float32(gain)


# ---- judges


RATE = 16000  # Hz, of the features
FRAME, HOP, BANDS, SEGMENTS = 400, 160, 40, 6


class AudioFeatures(Features):
    """Log-mel statistics, see `audio_features`, of the bands that all values of `fit` can have.

    Above half their rate recordings hold nothing; a codec's higher rate would put its noise there.
    """

    def __init__(self) -> None:
        self.rate_hz = RATE

    def fit(self, raws: Sequence[Waveform]) -> Features:
        self.rate_hz = min([RATE, *(int(clip.sample_rate) for clip in raws)])
        return self

    def __call__(self, raws: Sequence[Waveform]) -> np.ndarray:
        return audio_features(raws, self.rate_hz)


def audio_features(clips: Sequence[Waveform], rate_hz: int = RATE) -> np.ndarray:
    """Log-mel statistics (N, BANDS * (SEGMENTS + 2)) float32 of clips.

    Mean and deviation over time, and means of equal parts. Silence at both ends is cut (30 dB under
    the loudest frame) and each clip's level is removed, so that neither padding nor loudness tells
    the class.

    Args:
        rate_hz: bands that reach above half of it are left out, but for the lowest one.
    """
    mel = _mel_matrix()
    highest = [np.flatnonzero(band)[-1] * RATE / 512 for band in mel]
    mel = mel[: max(1, sum(f <= rate_hz / 2 for f in highest))]
    window = np.hanning(FRAME).astype(np.float32)
    rows = []
    for clip in clips:
        samples = _at_rate(clip)
        if len(samples) < FRAME:
            samples = np.pad(samples, (0, FRAME - len(samples)))
        frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP] * window
        power = np.abs(np.fft.rfft(frames, 512)) ** 2
        bands = power @ mel.T
        log_mel = np.log(
            bands + 1e-5 * bands.max() + 1e-10
        )  # a floor relative to the clip: level must not matter
        loud = power.sum(1)
        heard = np.flatnonzero(loud > loud.max() * 1e-3) if loud.max() > 0 else np.arange(len(loud))
        log_mel = log_mel[heard[0] : heard[-1] + 1]
        log_mel = log_mel - log_mel.mean()
        bounds = np.linspace(0, len(log_mel), SEGMENTS + 1)
        parts = [
            log_mel[int(a) : max(int(np.ceil(b)), int(a) + 1)].mean(0)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        rows.append(np.concatenate([log_mel.mean(0), log_mel.std(0), *parts]))
    return np.stack(rows).astype(np.float32)


def _at_rate(clip: Waveform) -> np.ndarray:
    samples = np.nan_to_num(np.asarray(clip.samples, np.float32).reshape(-1))
    if clip.sample_rate != RATE and len(samples):
        from fractions import Fraction

        from scipy.signal import resample_poly

        ratio = Fraction(RATE, int(clip.sample_rate))
        samples = resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)
    return samples


def _mel_matrix() -> np.ndarray:
    """Triangles `(BANDS, 257)` equally spaced on the mel scale from 60 Hz to 7600 Hz."""
    to_mel = lambda f: 2595 * np.log10(1 + f / 700)
    edges = 700 * (10 ** (np.linspace(to_mel(60.0), to_mel(7600.0), BANDS + 2) / 2595) - 1)
    f = np.fft.rfftfreq(512, 1 / RATE)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((f - low) / (mid - low), (high - f) / (high - mid)), 0, None).astype(
        np.float32
    )
