"""Raw values to files and back: png, wav and txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mm.errors import UserError
from mm.specs import Waveform

SUFFIX = {"image": ".png", "audio": ".wav", "text": ".txt"}


def media_kind(value: Any) -> str:
    """Return "text", "image" or "audio" for a raw value. Raises UserError on anything else."""
    if isinstance(value, str | bytes):
        return "text"
    if isinstance(value, Waveform):
        return "audio"
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return "image"
    raise UserError(
        f"a {type(value).__name__} is neither text, a uint8 image (H, W, C) nor a Waveform"
    )


def save_media(value: Any, path: str | Path) -> Path:
    """Write a raw value as PNG, WAV or text; the suffix is added where ``path`` has none.

    Args:
        value: str, bytes, uint8 image `(H, W, 3)` or `(H, W)`, or a Waveform of float32 in [-1, 1].
        path: file to write; folders are made.
    Returns:
        The file that was written.
    """
    path = Path(path)
    kind = media_kind(value)
    if not path.suffix:
        path = path.with_suffix(SUFFIX[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "text":
        path.write_bytes(value.encode() if isinstance(value, str) else value)
    elif kind == "image":
        from PIL import Image

        Image.fromarray(value).save(path)
    else:
        import soundfile

        samples = np.clip(np.asarray(value.samples, np.float32), -1, 1)
        soundfile.write(path, samples, value.sample_rate, subtype="PCM_16")
    return path
