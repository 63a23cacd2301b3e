"""The same random pictures and sounds for us and for `transformers`.

G items, S pixels of a side, M mels, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.batch import Values
from mm.data.batching.collate import values_of
from mm.data.batching.document import Features
from mm.interchange.check import require_peer
from mm.interchange.processor import Pixels, has_processor, read_processor
from mm.specs import Waveform
from mm.tokenizers.audio.whisper_mel import WhisperMelConfig
from mm.tokenizers.image.processed import ProcessedPatchesConfig

SEED = 17


def random_pictures(side: int, shorter: int | None = None) -> list[np.ndarray]:
    """Two pictures of other shapes than the model's, uint8 (H, W, 3), one wide and one high.

    ``shorter``: as of the tokenizer `image_processed`; an odd number of columns is cut off then.
    """
    rng = np.random.default_rng(SEED)
    is_odd = lambda width: (int((shorter or side) * width / side) - side) % 2
    wide = next(width for width in range(2 * side, 4 * side + 2) if is_odd(width))
    shapes = ((side, wide, 3), (2 * side + 1, side + 2, 3))
    return [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]


def picture_values(config: ProcessedPatchesConfig, raws: Sequence[np.ndarray]) -> Values:
    """What our tokenizer makes of pictures, as items of a batch."""
    found = [code.values for code in config.build().encode(raws)]
    n = found[0].shape[0] * found[0].shape[1]
    rows = [Features(config.modality, 0, v.reshape(n, -1), v.shape[:2]) for v in found]
    return values_of([(i * n, row) for i, row in enumerate(rows)])


def peer_pixels(
    folder: Path, config: ProcessedPatchesConfig, pixels: Pixels, raws: Sequence[np.ndarray]
) -> Tensor:
    """`(G, 3, S, S)` float32 that `transformers` makes of pictures by the folder's own processor.

    Of a folder without one, what our reading of its kind makes.
    """
    if has_processor(folder):
        require_peer()
        import transformers

        peer = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return peer(images=list(raws), return_tensors="pt")["pixel_values"]
    tokenizer = config.build()
    made = torch.stack([tokenizer.picture(raw) for raw in raws]).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (pixels.mean, pixels.std))
    return (made - mean) / std


def random_sounds(rate: int, seconds: int) -> list[Waveform]:
    """Two recordings, one of them shorter than ``seconds``; float32 in [-1, 1]."""
    rng = np.random.default_rng(SEED)
    out = []
    for n in (rate * seconds, rate * seconds // 3 + 1):
        at = np.arange(n) / rate
        loud = 0.4 * np.sin(2 * np.pi * (200 + 300 * at) * at) + 0.05 * rng.standard_normal(n)
        out.append(Waveform(loud.clip(-1, 1).astype(np.float32), rate))
    return out


def peer_frames(folder: Path, config: WhisperMelConfig, sounds: Sequence[Waveform]) -> Tensor:
    """`(G, M, F)` float32 that `transformers` makes of recordings by the folder's own extractor.

    Of a folder without one, by the extractor of the same settings.
    """
    require_peer()
    import transformers

    if read_processor(folder, "feature_extractor") is not None:
        peer: Any = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    else:
        peer = transformers.WhisperFeatureExtractor(
            feature_size=config.n_mels,
            sampling_rate=config.sample_rate,
            hop_length=config.hop,
            chunk_length=config.seconds,
            n_fft=config.n_fft,
        )
    raws = [sound.samples for sound in sounds]
    made = peer(raws, sampling_rate=config.sample_rate, return_tensors="pt")
    return made["input_features"].float()
