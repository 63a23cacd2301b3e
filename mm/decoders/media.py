"""Raw values to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.data.modalities.base import modality_of_value, raw_modality


def save_media(value: Any, path: str | Path, modality: str | None = None) -> Path:
    """Write a raw value as its modality does: PNG, WAV, text, ...

    Args:
        value: raw value, such as str, bytes, uint8 image `(H, W, 3)` or `(H, W)`, or a Waveform.
        path: file to write; folders are made, the suffix is added where there is none.
        modality: token modality of the value; default what its type says. A picture that a model
            wrote as bytes is `image`, and is written as it is.
    Returns:
        The file that was written.
    Raises:
        UserError: the value is of no modality, or the suffix is of no file of its modality.
    """
    own = raw_modality(modality) if modality is not None else modality_of_value(value)
    return own.write(value, Path(path))
