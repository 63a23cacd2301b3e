"""Raw values to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.data.modalities.base import modality_of_value


def save_media(value: Any, path: str | Path) -> Path:
    """Write a raw value as its modality does: PNG, WAV, text, ...

    Args:
        value: raw value, such as str, bytes, uint8 image `(H, W, 3)` or `(H, W)`, or a Waveform.
        path: file to write; folders are made, the suffix is added where there is none.
    Returns:
        The file that was written.
    Raises:
        UserError: the value is of no modality.
    """
    modality, path = modality_of_value(value), Path(path)
    if not path.suffix:
        path = path.with_suffix(f".{modality.extensions[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    modality.save(value, path)
    return path
