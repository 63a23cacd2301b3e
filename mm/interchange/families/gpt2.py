"""GPT-2: learned places, layer norms, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mm.errors import UserError
from mm.interchange.family import Family, Settings, stack_of
from mm.interchange.parts import Entry, Part, Transposed
from mm.model.model import LmConfig
from mm.registry import FAMILIES

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
WRITTEN = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


@FAMILIES.register("gpt2")
class Gpt2(Family):
    """Radford et al. 2019, GPT-2."""

    kind: Literal["gpt2"] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    table: ClassVar[tuple[str, str, str]] = (
        "transformer.wte.weight",
        "lm_head.weight",
        "transformer",
    )
    silent: ClassVar[str] = r"\.attn\.(bias|masked_bias)$"

    def model(self, c: Settings) -> dict[str, Any]:
        for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
            c.only(key, False)
        c.only("scale_attn_weights", True)
        D, eps = c.whole("n_embd"), c.get("layer_norm_epsilon", 1e-5)
        given = c.get("activation_function", "gelu_new")
        if given not in ACTIVATIONS:
            raise c.refuse("activation_function", "is an activation without an equal")
        hidden = c.whole("n_inner", 4 * D)
        attention = {
            "kind": "attention",
            "heads": c.whole("n_head"),
            "qk_norm": False,
            "position": {"kind": "none"},
        }
        return {
            "d_model": D,
            "backbone": {
                "kind": "stack",
                "pattern": " ".join(["attention"] * c.whole("n_layer")),
                "mixers": {"attention": attention},
                "ffn": {"kind": "mlp", "hidden": hidden, "activation": ACTIVATIONS[given]},
                "block": {"kind": "prenorm", "eps": eps, "norm": "layer"},
                "eps": eps,
                "norm": "layer",
            },
            "embedder": {
                "kind": "sum",
                "scale": 1.0,
                "position": {"kind": "learned", "max_length": c.whole("n_positions", 1024)},
            },
            "heads": {
                "tokens": {"kind": "softmax", "tied": bool(c.get("tie_word_embeddings", True))}
            },
            "linear": {"kind": "dense", "bias": True},
        }

    def config(self, lm: LmConfig) -> dict[str, Any]:
        stack, words = stack_of(lm), stack_of(lm).words()
        ffn, position, head = stack.ffn, lm.embedder.position, lm.heads["tokens"]
        if ffn is None or ffn.kind != "mlp" or position.kind != "learned":
            raise UserError("model: no `mlp` layers with learned places")
        return {
            "n_embd": lm.d_model,
            "n_layer": len(words),
            "n_head": getattr(stack.mixer(words[0]), "heads", 1),
            "n_inner": ffn.hidden,
            "n_positions": position.max_length,
            "activation_function": WRITTEN.get(ffn.activation, "gelu_new"),
            "layer_norm_epsilon": stack.eps,
            "tie_word_embeddings": head.tied,
        }

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        yield Entry("embedder.position.table", ("transformer.wpe.weight",))
        pairs = (
            ("mixer_norm", "ln_1", False),
            ("mixer.qkv", "attn.c_attn", True),
            ("mixer.out", "attn.c_proj", True),
            ("ffn_norm", "ln_2", False),
            ("ffn.up", "mlp.c_fc", True),
            ("ffn.out", "mlp.c_proj", True),
        )
        for i in range(len(stack_of(lm).words())):
            for ours, theirs, matrix in pairs:
                ours, theirs = f"backbone.layers.{i}.{ours}", f"transformer.h.{i}.{theirs}"
                part = Transposed() if matrix else Part()
                yield Entry(f"{ours}.weight", (f"{theirs}.weight",), part)
                yield Entry(f"{ours}.bias", (f"{theirs}.bias",))
        for name in ("weight", "bias"):
            yield Entry(f"backbone.norm.{name}", (f"transformer.ln_f.{name}",))
