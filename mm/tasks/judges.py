"""Judges: scikit-learn classifiers of raw images and recordings, trained on real training data
alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mm.errors import UserError
from mm.specs import Waveform

RATE = 16000  # Hz, of the audio features
FRAME, HOP, BANDS, SEGMENTS = 400, 160, 40, 6
SIDE = 16  # pixels of the image features


def image_features(images: Sequence[Any], side: int = SIDE, color: bool = False) -> np.ndarray:
    """Box-downsampled pixels in [0, 1], `(N, side * side)` gray or `(N, side * side * 3)`; float32.

    Args:
        images: uint8 `(H, W, 3)` or `(H, W)`.
    """
    from PIL import Image

    rows = []
    for image in images:
        picture = Image.fromarray(np.asarray(image)).convert("RGB" if color else "L")
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.BOX)
        rows.append(np.asarray(picture, np.float32).ravel() / 255)
    return np.stack(rows)


def audio_features(clips: Sequence[Waveform]) -> np.ndarray:
    """Log-mel statistics `(N, BANDS * (SEGMENTS + 2))` float32: mean and deviation over time, and
    means of equal parts.

    Silence at both ends is cut (30 dB under the loudest frame) and each clip's level is removed, so
    that neither padding nor loudness tells the class.
    """
    mel = _mel_matrix()
    window = np.hanning(FRAME).astype(np.float32)
    rows = []
    for clip in clips:
        samples = _resample(clip)
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


def _resample(clip: Waveform) -> np.ndarray:
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


class Judge:
    """Support vector classifier (RBF kernel): images by their pixels, recordings by standardised
    log-mel statistics."""

    def __init__(self, modality: str):
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        if modality not in ("image", "audio"):
            raise UserError(f"no judge for '{modality}'; there are: audio, image")
        self.modality, self.color = modality, False
        classifier = SVC(C=10.0, gamma="scale", random_state=0)
        # Pixels share one unit; standardising would blow up the noise of the nearly always dark.
        self.model: Any = (
            classifier if modality == "image" else make_pipeline(StandardScaler(), classifier)
        )

    def features(self, raws: Sequence[Any]) -> np.ndarray:
        """What the classifier sees, `(N, F)` float32."""
        return (
            image_features(raws, color=self.color)
            if self.modality == "image"
            else audio_features(raws)
        )

    def fit(self, raws: Sequence[Any], labels: Sequence[str]) -> Judge:
        """Train on REAL training data. Raises UserError when there is only one class."""
        if len(set(labels)) < 2:
            raise UserError(
                f"a judge needs at least two classes, the training split has {sorted(set(labels))}"
            )
        if self.modality == "image":
            self.color = any(raw.ndim == 3 and np.ptp(raw, axis=2).max() > 8 for raw in raws)
        self.model.fit(self.features(raws), np.asarray(labels))
        return self

    def predict(self, raws: Sequence[Any]) -> list[str]:
        """Class of each raw value."""
        return [str(c) for c in self.model.predict(self.features(raws))]

    def accuracy(self, raws: Sequence[Any], labels: Sequence[str]) -> float:
        """Share of raw values that it classifies as ``labels``."""
        return float(np.mean([p == t for p, t in zip(self.predict(raws), labels, strict=True)]))


def linear_probe(
    train: Sequence[Any],
    train_labels: Sequence[str],
    test: Sequence[Any],
    test_labels: Sequence[str],
) -> float:
    """Accuracy on ``test`` of logistic regression on raw colour pixels (16 x 16) of ``train``: the
    bar that needs no model."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    probe.fit(image_features(train, color=True), np.asarray(train_labels))
    return float(
        np.mean(probe.predict(image_features(test, color=True)) == np.asarray(test_labels))
    )
