"""What the families of encoders share. W width, p pixels of a patch's side, M mels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.batch import Values
from mm.config import Config, validate
from mm.errors import UserError
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part, Rows
from mm.interchange.probes import peer_pixels, picture_values, random_pictures
from mm.interchange.processor import Pixels, read_pixels
from mm.model.adapters.encoder import EncoderAdapterConfig
from mm.model.backbones.stack import StackConfig
from mm.model.ffn.mlp import MlpConfig
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.positions.learned import LearnedConfig
from mm.specs import ModalityTokenizer
from mm.tokenizers.image.processed import ProcessedPatchesConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


class EncoderFamily(Config):
    """Plug point: how one ``model_type`` of Hugging Face's layout is an `encoder` adapter."""

    inside: ClassVar[str | None] = None  # key of a larger model's config that holds the encoder's
    prefixes: ClassVar[tuple[str, ...]] = ("",)  # of its names, one of which the folder uses
    modality: ClassVar[str] = "image"
    before: ClassVar[int] = 0  # places of theirs before the first of an item

    def build(self) -> EncoderFamily:
        return self

    def adapter(self, c: Settings) -> dict[str, Any]:
        """Values of our `EncoderAdapterConfig`. Raises UserError naming a key without an equal."""
        raise NotImplementedError

    def entries(self, config: EncoderAdapterConfig) -> Iterator[Entry]:
        """A line for each of our tensors but those of the last projection."""
        raise NotImplementedError

    def fit_reader(
        self, c: Settings, folder: Path, config: EncoderAdapterConfig
    ) -> tuple[EncoderAdapterConfig, ModalityTokenizer]:
        """The adapter, and the tokenizer whose values it reads, as the folder's processor says.

        Raises UserError naming a key of the processor without an equal.
        """
        raise NotImplementedError

    def probe(self, c: Settings, folder: Path) -> tuple[Values, Tensor]:
        """The same random items for us and for `transformers`."""
        raise NotImplementedError

    def run(self, peer: Any, given: Tensor) -> Tensor:
        """`(G, L, W)` last hidden states of `transformers`' model."""
        raise NotImplementedError


def layers(
    width: int, heads: int, depth: int, hidden: int, activation: str, eps: float
) -> dict[str, Any]:
    """Settings of layers that norm what they read, with biases everywhere."""
    attention = {
        "kind": "attention",
        "heads": heads,
        "qk_norm": False,
        "position": {"kind": "none"},
    }
    return {
        "width": width,
        "linear": {"kind": "dense", "bias": True},
        "backbone": {
            "kind": "stack",
            "pattern": " ".join(["attention"] * depth),
            "mixers": {"attention": attention},
            "ffn": {"kind": "mlp", "hidden": hidden, "activation": activation},
            "block": {"kind": "prenorm", "eps": eps, "norm": "layer"},
            "eps": eps,
            "norm": "layer",
        },
    }


def activation_of(c: Settings, key: str, default: str) -> str:
    """Our word for an activation. Raises UserError where there is none."""
    given = c.get(key, default)
    if given not in ACTIVATIONS:
        raise c.refuse(key, "is an activation without an equal")
    return ACTIVATIONS[given]


def both(ours: str, theirs: str, part: Part | None = None) -> Iterator[Entry]:
    """Weight and bias of one layer."""
    for kind in ("weight", "bias"):
        yield Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), part or Part())


def join_rows(ours: str, theirs: tuple[str, ...], width: int) -> Iterator[Entry]:
    """Weight and bias of matrices that are one here."""
    for kind in ("weight", "bias"):
        names = tuple(f"{name}.{kind}" for name in theirs)
        yield Entry(f"{ours}.{kind}", names, Rows(*[width] * len(names)))


class Patch(Part):
    """A convolution over patches, `(W, 3, p, p)`, as a matrix `(W, p * p * 3)`."""

    def join(self, given: Any) -> list[Tensor]:
        return [t.permute(0, 2, 3, 1).flatten(1) for t in given]

    def split(self, ours: Any) -> list[Tensor]:
        p = round((ours[0].shape[1] / 3) ** 0.5)
        return [t.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2) for t in ours]


class Vision(EncoderFamily):
    """Square pictures of one size, cut into patches, with a learned place each."""

    usual: ClassVar[Mapping[str, Any]] = {}  # what a config means that does not say it
    processor: ClassVar[str] = ""  # class of the image processor, where the folder names none
    last_norm: ClassVar[str] = "layer"
    written: ClassVar[Mapping[str, Any]] = {}  # further keys of the config

    def adapter(self, c: Settings) -> dict[str, Any]:
        c = c.with_usual(self.usual)
        c.only("num_channels", 3)
        patch, size = c.whole("patch_size"), c.whole("image_size")
        made = layers(
            c.whole("hidden_size"),
            c.whole("num_attention_heads"),
            c.whole("num_hidden_layers"),
            c.whole("intermediate_size"),
            activation_of(c, "hidden_act", "gelu"),
            c["layer_norm_eps"],
        )
        made["backbone"]["norm"] = self.last_norm
        places = (size // patch) ** 2 + self.before
        return {
            "kind": "encoder",
            "inner": {"kind": "linear", "d_in": 3 * patch**2},
            "position": {"kind": "learned", "max_length": places},
            "class_token": self.before > 0,
            **made,
        }

    def config(self, a: EncoderAdapterConfig) -> dict[str, Any]:
        """What `adapter` reads; ``image_size`` without pixels that fill no patch."""
        stack, position, inner = a.backbone, a.position, a.inner
        if not isinstance(stack, StackConfig) or not isinstance(position, LearnedConfig):
            raise UserError("its layers are no stack with learned places")
        mixer, ffn = stack.mixer("attention"), stack.ffn
        if not isinstance(mixer, AttentionConfig) or not isinstance(ffn, MlpConfig):
            raise UserError("its layers are no attention with an 'mlp'")
        patch = math.isqrt(inner.d_in // 3)
        words = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {
            "model_type": self.kind,  # type: ignore[attr-defined]
            "num_channels": 3,
            "hidden_size": a.width,
            "num_attention_heads": mixer.sizes(a.width)[0],
            "num_hidden_layers": len(stack.words()),
            "intermediate_size": ffn.width(a.width),
            "hidden_act": words[ffn.activation],
            "layer_norm_eps": stack.eps,
            "patch_size": patch,
            "image_size": math.isqrt(position.max_length - self.before) * patch,
            **self.written,
        }

    def reader(self, c: Settings, folder: Path) -> tuple[Pixels, ProcessedPatchesConfig]:
        """How the folder's pictures are made, and what makes them here. Raises UserError."""
        c = c.with_usual(self.usual)
        pixels = read_pixels(folder, self.processor, c.whole("image_size"))
        return pixels, ProcessedPatchesConfig(**pixels.tokenizer(c.whole("patch_size")))

    def fit_reader(
        self, c: Settings, folder: Path, config: EncoderAdapterConfig
    ) -> tuple[EncoderAdapterConfig, ModalityTokenizer]:
        pixels, made = self.reader(c, folder)
        inner = validate(type(config.inner), config.inner.to_dict() | pixels.channels, str(folder))
        return config.model_copy(update={"inner": inner}), made.build()

    def probe(self, c: Settings, folder: Path) -> tuple[Values, Tensor]:
        pixels, config = self.reader(c, folder)
        raws = random_pictures(config.size, config.shorter)
        return picture_values(config, raws), peer_pixels(folder, config, pixels, raws)

    def run(self, peer: Any, given: Tensor) -> Tensor:
        peer = getattr(peer, "vision_model", peer)
        return peer(pixel_values=given).last_hidden_state[:, self.before :]


class Padded(Part):
    """Weights of a convolution with taps of zeros behind its own, ``more`` of them."""

    def __init__(self, more: int):
        self.more = more

    def join(self, given: Any) -> list[Tensor]:
        return [F.pad(t, (0, self.more)) for t in given]

    def split(self, ours: Any) -> list[Tensor]:
        return [t[..., : -self.more] for t in ours]


class Written(Part):
    """A norm that nothing here reads: what changes nothing goes out in its place."""

    def __init__(self, width: int):
        self.width = width

    def join(self, given: Any) -> list[Tensor]:
        return []

    def split(self, ours: Any) -> list[Tensor]:
        return [torch.ones(self.width), torch.zeros(self.width)]


def unread(width: int) -> Iterator[Entry]:
    """The norm of a tower's pooling head, which is not here."""
    yield Entry((), ("post_layernorm.weight", "post_layernorm.bias"), Written(width))
