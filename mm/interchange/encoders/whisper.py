"""Whisper's encoder of log-mel frames. F frames, M mels, W width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mm.batch import Values
from mm.interchange.encoders.family import EncoderFamily, Padded, activation_of, both, layers
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part, Rows
from mm.interchange.probes import peer_frames, random_sounds
from mm.interchange.processor import read_sound
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.registry import ENCODERS
from mm.specs import ModalityTokenizer
from mm.tokenizers.audio.whisper_mel import WhisperMelConfig

STACK = 2  # frames of a place: the stride of its second convolution


@ENCODERS.register("whisper")
class Whisper(EncoderFamily):
    """Radford et al. 2022 (arXiv:2212.04356)."""

    kind: Literal["whisper"] = "whisper"
    prefixes: ClassVar[tuple[str, ...]] = ("model.encoder.", "encoder.", "")
    modality: ClassVar[str] = "audio"

    def adapter(self, c: Settings) -> dict[str, Any]:
        c.only("scale_embedding", False)
        W = c.whole("d_model")
        made = layers(
            W,
            c.whole("encoder_attention_heads"),
            c.whole("encoder_layers"),
            c.whole("encoder_ffn_dim"),
            activation_of(c, "activation_function", "gelu"),
            1e-5,
        )
        return {
            "kind": "encoder",
            "inner": {
                "kind": "mel",
                "n_mels": c.whole("num_mel_bins", 80),
                "stack": STACK,
                "width": W,
            },
            "position": {
                "kind": "learned",
                "max_length": c.whole("max_source_positions", 1500),
            },
            **made,
        }

    def entries(self, config: EncoderAdapterConfig) -> Iterator[Entry]:
        W = config.width
        yield from both("inner.first", "conv1")
        # Ours has a tap more, which reads the next place: none.
        yield Entry("inner.second.weight", ("conv2.weight",), Padded(STACK + 2 - 3))
        yield Entry("inner.second.bias", ("conv2.bias",))
        yield Entry(("inner.out.weight", "inner.out.bias"), (), Nothing(W))
        yield Entry("position.table", ("embed_positions.weight",))
        for i in range(len(config.backbone.words())):
            ours, theirs = f"backbone.layers.{i}", f"layers.{i}"
            yield from both(f"{ours}.mixer_norm", f"{theirs}.self_attn_layer_norm")
            q, k, v = (f"{theirs}.self_attn.{name}_proj" for name in "qkv")
            weights = (f"{q}.weight", f"{k}.weight", f"{v}.weight")
            yield Entry(f"{ours}.mixer.qkv.weight", weights, Rows(W, W, W))
            yield Entry(f"{ours}.mixer.qkv.bias", (f"{q}.bias", f"{v}.bias"), NoKeyBias())
            yield from both(f"{ours}.mixer.out", f"{theirs}.self_attn.out_proj")
            yield from both(f"{ours}.ffn_norm", f"{theirs}.final_layer_norm")
            yield from both(f"{ours}.ffn.up", f"{theirs}.fc1")
            yield from both(f"{ours}.ffn.out", f"{theirs}.fc2")
        yield from both("backbone.norm", "layer_norm")

    def reader(self, c: Settings, folder: Path) -> WhisperMelConfig:
        """What makes the frames that the encoder reads. Raises UserError."""
        M, places = c.whole("num_mel_bins", 80), c.whole("max_source_positions", 1500)
        return WhisperMelConfig(**read_sound(folder, M, places, STACK))

    def fit_reader(
        self, c: Settings, folder: Path, config: EncoderAdapterConfig
    ) -> tuple[EncoderAdapterConfig, ModalityTokenizer]:
        return config, self.reader(c, folder).build()

    def probe(self, c: Settings, folder: Path) -> tuple[Values, Tensor]:
        config = self.reader(c, folder)
        sounds = random_sounds(config.sample_rate, config.seconds)
        values = torch.stack(
            [torch.from_numpy(code.values) for code in config.build().encode(sounds)]
        )
        return Values.items(values), peer_frames(folder, config, sounds)

    def run(self, peer: Any, given: Tensor) -> Tensor:
        return getattr(peer, "encoder", peer)(given).last_hidden_state


class Nothing(Part):
    """A projection that changes nothing, where there is none."""

    def __init__(self, width: int):
        self.width = width

    def join(self, given: Any) -> list[Tensor]:
        return [torch.eye(self.width), torch.zeros(self.width)]


class NoKeyBias(Part):
    """Biases of queries and values; those of keys, which a softmax does not see, are zeros."""

    def join(self, given: Any) -> list[Tensor]:
        q, v = given
        return [torch.cat([q, torch.zeros_like(q), v])]
