"""What the families of encoders share. W width, p pixels of a patch's side, M mels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.batch import Values
from mm.config import Config
from mm.interchange.family import Settings
from mm.interchange.parts import Entry, Part, Rows
from mm.model.adapters.encoder import EncoderAdapterConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
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

    def probe(self, c: Settings) -> tuple[Values, Tensor]:
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

    def adapter(self, c: Settings) -> dict[str, Any]:
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
        places = (size // patch) ** 2 + self.before
        return {
            "kind": "encoder",
            "inner": {"kind": "linear", "d_in": 3 * patch**2},
            "position": {"kind": "learned", "max_length": places},
            "class_token": self.before > 0,
            **made,
        }

    def probe(self, c: Settings) -> tuple[Values, Tensor]:
        p, size = c["patch_size"], c["image_size"]
        side = size // p
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(17)) * 2 - 1
        cut = images[..., : side * p, : side * p].reshape(2, 3, side, p, side, p)
        values = Values.items(cut.permute(0, 2, 4, 3, 5, 1).reshape(2, side**2, -1))
        grid = ((side, side),) * 2
        return Values(values.data, values.length, values.place, values.room, grid), images

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
