"""What Mamba and Mamba-2 share: a stack of one mixer without feed-forward layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from mm.errors import UserError
from mm.interchange.family import Family, Settings, stack_of
from mm.interchange.parts import Entry
from mm.model.model import LmConfig


class StateSpace(Family):
    """Norm, mixer, residual."""

    table: ClassVar[tuple[str, str, str]] = (
        "backbone.embeddings.weight",
        "lm_head.weight",
        "backbone",
    )
    mixers: ClassVar[tuple[str, ...]]
    tied: ClassVar[bool]  # where the config does not say it
    into: ClassVar[tuple[str, ...]]  # our matrices that make up `in_proj`

    def mixer(self, c: Settings) -> dict[str, Any]:
        """Settings of the mixer."""
        raise NotImplementedError

    def mixer_config(self, mixer: Any, D: int) -> dict[str, Any]:
        """What `mixer` reads."""
        raise NotImplementedError

    def mixer_entries(self, lm: LmConfig, mixer: Any, ours: str, theirs: str) -> Iterator[Entry]:
        raise NotImplementedError

    def model(self, c: Settings) -> dict[str, Any]:
        c.only("hidden_act", "silu")
        for silent in ("residual_in_fp32", "rescale_prenorm_residual", "time_step_floor"):
            c.get(silent)  # of precision, and of the first weights
        for silent in ("time_step_min", "time_step_max", "time_step_scale"):
            c.get(silent)
        eps = c.get("layer_norm_epsilon", 1e-5)
        biases = sorted((*self.into, "out")) if c.get("use_bias", False) else False
        return {
            "d_model": c.whole("hidden_size"),
            "backbone": {
                "kind": "stack",
                "pattern": " ".join([self.kind] * c.whole("num_hidden_layers")),  # type: ignore[attr-defined]
                "mixers": {self.kind: self.mixer(c)},  # type: ignore[attr-defined]
                "ffn": None,
                "block": {"kind": "prenorm", "eps": eps},
                "eps": eps,
            },
            "embedder": {"kind": "sum", "scale": 1.0},
            "heads": {
                "tokens": {
                    "kind": "softmax",
                    "tied": bool(c.get("tie_word_embeddings", self.tied)),
                }
            },
            "linear": {"kind": "dense", "bias": biases},
        }

    def config(self, lm: LmConfig) -> dict[str, Any]:
        stack, words = stack_of(lm), stack_of(lm).words()
        mixer: Any = stack.mixer(words[0])
        head: Any = lm.heads["tokens"]
        if stack.ffn is not None:
            raise UserError("model.backbone.ffn: such a model has no feed-forward layers")
        return {
            "hidden_size": lm.d_model,
            "num_hidden_layers": len(words),
            "layer_norm_epsilon": stack.eps,
            "conv_kernel": mixer.conv_size,
            "use_conv_bias": mixer.conv_bias,
            "use_bias": lm.linear.bias is not False,
            "hidden_act": "silu",
            "tie_word_embeddings": head.tied,
            **self.mixer_config(mixer, lm.d_model),
        }

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        stack = stack_of(lm)
        for i, word in enumerate(stack.words()):
            ours, theirs = f"backbone.layers.{i}", f"backbone.layers.{i}"
            yield Entry(f"{ours}.mixer_norm.weight", (f"{theirs}.norm.weight",))
            yield from self.mixer_entries(lm, stack.mixer(word), f"{ours}.mixer", f"{theirs}.mixer")
        yield Entry("backbone.norm.weight", ("backbone.norm_f.weight",))
