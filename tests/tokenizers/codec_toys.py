"""Small codecs, waves and batches for the tests of the audio codec."""

from __future__ import annotations

import numpy as np
import torch

from mm.batch import Batch, Values
from mm.model.layer import init_weights
from mm.tokenizers.audio.codec import AudioCodec, AudioCodecConfig
from mm.tokenizers.audio.melcodec import MelFrontEndConfig
from mm.tokenizers.audio.seanet import SeanetFrontEndConfig
from mm.tokenizers.audio.seanet_transformer import SeanetTransformerConfig
from mm.tokenizers.quantizers.rvq import RvqConfig

FRONT_ENDS = {
    "mel": MelFrontEndConfig(n_mels=16, width=16, hidden=32, synthesis_blocks=1),
    "seanet": SeanetFrontEndConfig(strides=(2, 4, 5), width=4),
    "seanet_lstm": SeanetFrontEndConfig(
        strides=(2, 4), width=4, lstm_layers=2, residual_dilations=(1, 3)
    ),
    "seanet_transformer": SeanetTransformerConfig(
        seanet=SeanetFrontEndConfig(strides=(2, 4), width=4, last_kernel=3),
        backbone={
            "kind": "stack",
            "mixers": {"attention": {"heads": 2, "head_dim": 4, "window": 5}},
        },
    ),
}


def codec(name: str, n_codebooks: int = 3) -> AudioCodec:
    torch.manual_seed(0)
    quantizer = RvqConfig(n_codebooks=n_codebooks, codebook_size=16, d=6)
    net = AudioCodecConfig(frontend=FRONT_ENDS[name], quantizer=quantizer).build()
    init_weights(net)
    return net


def speech_like(n: int, seed: int = 0) -> np.ndarray:
    """A gliding tone with overtones and a little noise, (n,) float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    pitch = rng.uniform(100, 250) * (
        1 + 0.2 * np.sin(2 * np.pi * rng.uniform(1, 4) * np.arange(n) / 16000)
    )
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    wave = sum(rng.uniform(0.02, 0.15) * np.sin(k * phase) for k in range(1, 12))
    return (wave + 0.003 * rng.standard_normal(n)).astype(np.float32)


def batch_of(lengths: list[int], n: int | None = None, seed: int = 0) -> Batch:
    n = n or max(lengths)
    data = torch.zeros(len(lengths), n)
    for g, length in enumerate(lengths):
        data[g, :length] = torch.from_numpy(speech_like(length, seed + g))
    return Batch.of_values({"audio": Values.items(data, torch.tensor(lengths))})
