"""Small real files: cut-outs of photographs, spoken words, a licence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from mm.quickstart.speech import speaker, trim

PHOTOS = ("china", "flower")  # of scikit-learn
WORDS = ("one", "two", "three")


def photographs(root: Path, each: int, side: int = 40) -> Path:
    """``china_000.png`` and ``china_000.txt``: cut-outs, the class as caption."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, photo in zip(PHOTOS, load_sample_images().images, strict=True):
        for i in range(each):
            top, left = rng.integers(0, 360), rng.integers(0, 560)
            part = photo[top : top + 64, left : left + 64]
            Image.fromarray(part).resize((side, side)).save(root / f"{name}_{i:03d}.png")
            (root / f"{name}_{i:03d}.txt").write_text(name)
    return root


def recordings(root: Path, voices: tuple[str, ...] = ("en", "en+f2")) -> Path:
    """``train/one_0_en.wav`` and ``test/...``: three words by each voice at several speeds."""
    from mm.data.modalities.audio import AudioModality
    from mm.specs import Waveform

    with speaker() as one:
        for voice in voices:
            for word in WORDS:
                for i, rate in enumerate((130, 155, 180, 205)):
                    folder = root / ("test" if i == 3 else "train")
                    folder.mkdir(parents=True, exist_ok=True)
                    wave = Waveform(trim(one.say(word, voice, rate, 50)), one.sample_rate)
                    AudioModality().save(wave, folder / f"{word}_{i}_{voice}.wav")
                    (folder / f"{word}_{i}_{voice}.txt").write_text(word)
    return root


def book(root: Path) -> Path:
    """A text file of some tens of kilobytes: the licence of this project, thrice."""
    root.mkdir(parents=True, exist_ok=True)
    licence = Path(__file__).resolve().parents[2] / "LICENSE"
    (root / "book.txt").write_text(licence.read_text(encoding="utf-8") * 3, encoding="utf-8")
    return root / "book.txt"
