"""Small random codecs and image tokenizers that `transformers` itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_checkpoints import SHAPE

RATE = 8000
ENCODEC = {
    "sampling_rate": RATE,
    "target_bandwidths": [8.0, 16.0],  # 2 and 4 books at 1000 frames a second
    "hidden_size": 8,
    "num_filters": 4,
    "num_residual_layers": 2,
    "upsampling_ratios": [4, 2],
    "codebook_size": 16,
    "num_lstm_layers": 2,
}
MIMI = {
    "sampling_rate": RATE,
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 16,
    "codebook_dim": 6,
    "vector_quantization_hidden_dimension": 6,
    "num_quantizers": 4,
    "upsample_groups": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 9,  # shorter than the signals
}
DAC = {
    "sampling_rate": RATE,
    "encoder_hidden_size": 4,
    "downsampling_ratios": [2, 5],  # the odd one loses samples on the way back
    "decoder_hidden_size": 16,
    "n_codebooks": 3,
    "codebook_size": 16,
    "codebook_dim": 3,
}
# Name -> (family, its config, its model, settings).
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "encodec": ("encodec", "EncodecConfig", "EncodecModel", ENCODEC),
    "encodec, looks ahead": (
        "encodec",
        "EncodecConfig",
        "EncodecModel",
        {
            **ENCODEC,
            "use_causal_conv": False,
            "use_conv_shortcut": False,
            "upsampling_ratios": [5, 3],
            "target_bandwidths": [6.5],
        },
    ),
    "dac, looks ahead": ("dac", "DacConfig", "DacModel", DAC),
    "mimi": ("mimi", "MimiConfig", "MimiModel", MIMI),
}
VQGAN = {
    "embed_dim": 4,
    "num_embeddings": 50,
    "latent_channels": 6,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "num_patches": 8,
}
IMAGES = ("janus_vqgan", "janus")


def codec(folder: Path, case: str, **more: Any) -> Any:
    """Write a small random codec of `transformers`, with codes as wide as what they code."""
    transformers = pytest.importorskip("transformers")
    _, config, name, settings = CASES[case]
    torch.manual_seed(5)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings, **more)).eval()
    with torch.no_grad():
        for key, t in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("embed", "embed_sum", "codebook.weight")):
                t.copy_(torch.randn_like(t) * 0.15)
            elif key.endswith(("bias", "alpha", "scale", "norm.weight")):
                t.add_(0.2 * torch.randn_like(t))
            elif key.endswith("original0"):
                t.mul_(1.5)  # or the sound dies away from layer to layer
            elif t.dim() == 3 and "original" not in key:
                t.copy_(torch.randn_like(t) * 0.7 * t[0].numel() ** -0.5)
            elif "cluster" in key:
                t.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return model


def wave(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(n) / RATE
    tone = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(80, 3000, 4)) / 8
    return (tone + 0.1 * rng.standard_normal(n)).astype(np.float32)


def image_tokenizer(folder: Path, family: str) -> Any:
    """Write a small random image tokenizer of `transformers`, alone or in the whole model."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.janus import configuration_janus as janus

    torch.manual_seed(5)
    own = janus.JanusVQVAEConfig(**VQGAN)
    if family == "janus":
        text = transformers.LlamaConfig(**{**SHAPE, "num_hidden_layers": 1})
        vision = janus.JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8
        )
        whole = janus.JanusConfig(text_config=text, vision_config=vision, vq_config=own)
        model = transformers.JanusForConditionalGeneration(whole).eval()
        peer = model.model.vqmodel
    else:
        model = peer = transformers.JanusVQVAE(own).eval()
    with torch.no_grad():
        for p in peer.parameters():
            noise = torch.randn_like(p)
            p.add_(0.2 * noise) if p.dim() < 2 else p.copy_(noise * p[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return peer
