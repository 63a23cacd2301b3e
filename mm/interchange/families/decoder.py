"""What the families of decoders share. H heads, G key heads, K head width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from mm.errors import UserError
from mm.interchange.family import Family, Settings, places, rope, rope_parameters, stack_of
from mm.interchange.parts import Entry, Experts, Part, Rows
from mm.model.mixers.attention.attention import AttentionConfig
from mm.model.model import LmConfig

FULL, SLIDING, RECURRENT = "full_attention", "sliding_attention", "linear_attention"
WORDS = {FULL: "attention", SLIDING: "sliding", RECURRENT: "recurrent"}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class Decoder(Family):
    """Attention, then a gated feed-forward layer, with rotary positions."""

    # Before the mixer, behind it, before the feed-forward layer, behind it.
    norms: ClassVar[tuple[str | None, ...]] = (
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    norm: ClassVar[str] = "rms"
    qk_norm: ClassVar[Any] = False
    tied: ClassVar[bool] = False  # where the config does not say it
    scaled: ClassVar[bool] = False  # embeddings times sqrt(D)
    share: ClassVar[float] = 1.0  # of a head that is rotated, where the config does not say it
    partial: ClassVar[bool] = False  # `transformers` knows heads that are rotated in part
    attention: ClassVar[str] = "self_attn"
    mlp: ClassVar[str] = "mlp"
    last: ClassVar[str] = "norm"
    activation_key: ClassVar[str] = "hidden_act"
    activation: ClassVar[str] = "silu"
    eps: ClassVar[float] = 1e-6

    # ---- what families say ----

    def types(self, c: Settings) -> list[str]:
        """Type of each layer: `FULL` or `SLIDING`."""
        return [FULL] * c.whole("num_hidden_layers")

    def window(self, c: Settings) -> int:
        """Tokens that a query of a `SLIDING` layer sees."""
        return c.whole("sliding_window")

    def bias(self, c: Settings) -> bool | list[str]:
        c.only("attention_bias", False)
        return False

    def bias_config(self, bias: bool | list[str]) -> dict[str, Any]:
        return {}

    def window_config(self, types: list[str], window: int | None) -> dict[str, Any]:
        return {}

    def more(self, c: Settings) -> dict[str, Any]:
        """Further settings of attention."""
        return {}

    def more_config(self, attention: AttentionConfig) -> dict[str, Any]:
        return {}

    def softcap(self, c: Settings) -> float | None:
        return None

    def recurrent(self, c: Settings) -> dict[str, Any]:
        """Settings of the layers without attention. Raises UserError: there are none."""
        raise c.refuse("layer_types", "names layers without attention")

    def recurrent_config(self, mixer: Any) -> dict[str, Any]:
        """What `recurrent` reads. Raises UserError where ``mixer`` is another."""
        raise UserError(f"a '{mixer.kind}' is no attention with rotary positions")

    def recurrent_entries(
        self, lm: LmConfig, mixer: Any, ours: str, theirs: str
    ) -> Iterator[Entry]:
        raise NotImplementedError

    def scale(self, D: int) -> float | None:
        """Factor of the embeddings; None: the square root of the width."""
        return None if self.scaled else 1.0

    def ffn(self, c: Settings) -> dict[str, Any]:
        given = c.get(self.activation_key, self.activation)
        if given not in ACTIVATIONS:
            raise c.refuse(self.activation_key, "is an activation without an equal")
        hidden = c.whole("intermediate_size")
        return {"kind": "swiglu", "hidden": hidden, "activation": ACTIVATIONS[given]}

    def ffn_config(self, ffn: Any) -> dict[str, Any]:
        known = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
        return {"intermediate_size": ffn.hidden, self.activation_key: known[ffn.activation]}

    def ffn_entries(self, lm: LmConfig, ours: str, theirs: str) -> Iterator[Entry]:
        hidden = stack_of(lm).ffn.hidden  # type: ignore[union-attr]
        theirs = f"{theirs}.{self.mlp}"
        both = (f"{theirs}.gate_proj", f"{theirs}.up_proj")
        yield from self.matrix(lm, "gate_up", f"{ours}.ffn.gate_up", both, Rows(hidden, hidden))
        yield from self.matrix(lm, "out", f"{ours}.ffn.out", (f"{theirs}.down_proj",))

    # ---- the two directions ----

    def model(self, c: Settings) -> dict[str, Any]:
        types = self.types(c)
        D, H = c.whole("hidden_size"), c.whole("num_attention_heads")
        if len(types) != c.whole("num_hidden_layers") or {*types} - {*WORDS}:
            raise c.refuse("layer_types", "does not name the type of each layer")
        mixers = {}
        eps = c.get("rms_norm_eps", self.eps)
        for kind in dict.fromkeys(types):
            if kind == RECURRENT:
                mixers[WORDS[kind]] = self.recurrent(c)
                continue
            position = rope(c, kind, self.share)
            if "fraction" in position and not self.partial:
                raise c.refuse("rope_parameters", "rotates a part of each head, which it cannot")
            mixers[WORDS[kind]] = {
                "kind": "attention",
                "heads": H,
                "kv_heads": c.whole("num_key_value_heads", H),
                "head_dim": c.whole("head_dim", D // H),
                "qk_norm": self.qk_norm,
                "position": position,
                "window": self.window(c) if kind == SLIDING else None,
                **({"norm_eps": eps} if self.qk_norm else {}),
                **self.more(c),
            }
        before, behind, *_ = self.norms
        block = {"kind": "prenorm", "eps": eps, "norm": self.norm}
        return {
            "d_model": D,
            "backbone": {
                "kind": "stack",
                "pattern": " ".join(WORDS[kind] for kind in types),
                "mixers": mixers,
                "ffn": self.ffn(c),
                "block": block | {"pre_norms": bool(before), "post_norms": bool(behind)},
                "eps": eps,
                "norm": self.norm,
            },
            "embedder": {"kind": "sum", "scale": self.scale(D)},
            "heads": {
                "tokens": {
                    "kind": "softmax",
                    "tied": bool(c.get("tie_word_embeddings", self.tied)),
                    "softcap": self.softcap(c),
                }
            },
            "linear": {"kind": "dense", "bias": self.bias(c)},
        }

    def config(self, lm: LmConfig) -> dict[str, Any]:
        stack, words = stack_of(lm), stack_of(lm).words()
        attentions: dict[str, Any] = {}
        kind, more = {}, {}
        for word in dict.fromkeys(words):
            mixer: Any = stack.mixer(word)
            if not isinstance(mixer, AttentionConfig):
                kind[word], more = RECURRENT, self.recurrent_config(mixer)
            elif mixer.position.kind != "rope":
                raise UserError(f"mixers.{word}: no attention with rotary positions")
            else:
                kind[word], attentions[word] = SLIDING if mixer.window else FULL, mixer
        if not attentions:
            raise UserError("model.backbone.pattern: no layer of attention")
        ropes = {kind[w]: rope_parameters(a.position) for w, a in attentions.items()}
        first: Any = next(iter(attentions.values()))
        H, G, K = first.sizes(lm.d_model)
        one = next(iter(ropes.values()))
        types = [kind[word] for word in words]
        window = next((a.window for a in attentions.values() if a.window), None)
        head: Any = lm.heads["tokens"]
        return {
            "hidden_size": lm.d_model,
            "num_hidden_layers": len(words),
            "num_attention_heads": H,
            "num_key_value_heads": G,
            "head_dim": K,
            "rms_norm_eps": stack.eps,
            "tie_word_embeddings": head.tied,
            **places(first.position),
            "rope_parameters": one if all(r == one for r in ropes.values()) else ropes,
            **self.ffn_config(stack.ffn),
            **self.bias_config(lm.linear.bias),
            **self.window_config(types, window),
            **self.more_config(first),
            **more,
        }

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        stack = stack_of(lm)
        for i, word in enumerate(stack.words()):
            ours, theirs = f"backbone.layers.{i}", f"{self.table[2]}.layers.{i}"
            slots = ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm")
            for slot, name in zip(slots, self.norms, strict=True):
                if name is not None:
                    yield Entry(f"{ours}.{slot}.weight", (f"{theirs}.{name}.weight",))
            mixer: Any = stack.mixer(word)
            if isinstance(mixer, AttentionConfig):
                yield from self.attention_entries(lm, mixer, ours, f"{theirs}.{self.attention}")
            else:
                yield from self.recurrent_entries(lm, mixer, ours, theirs)
            yield from self.ffn_entries(lm, ours, theirs)
        yield Entry("backbone.norm.weight", (f"{self.table[2]}.{self.last}.weight",))

    def attention_entries(
        self, lm: LmConfig, mixer: Any, ours: str, theirs: str
    ) -> Iterator[Entry]:
        H, G, K = mixer.sizes(lm.d_model)
        three = tuple(f"{theirs}.{name}_proj" for name in "qkv")
        rows = Rows(H * K, G * K, G * K)
        yield from self.matrix(lm, "qkv", f"{ours}.mixer.qkv", three, rows)
        yield from self.matrix(lm, "out", f"{ours}.mixer.out", (f"{theirs}.o_proj",))
        if mixer.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield Entry(f"{ours}.mixer.{name}.weight", (f"{theirs}.{name}.weight",))

    def matrix(
        self, lm: LmConfig, name: str, ours: str, theirs: tuple[str, ...], part: Part | None = None
    ) -> Iterator[Entry]:
        """A matrix, and its bias where ``lm`` has one."""
        part = part or Part()
        yield Entry(f"{ours}.weight", tuple(f"{t}.weight" for t in theirs), part)
        bias = lm.linear.bias
        if bias is True or (bias and name in bias):
            yield Entry(f"{ours}.bias", tuple(f"{t}.bias" for t in theirs), part)


class Mixture(Decoder):
    """Decoders whose feed-forward layers are experts."""

    place: ClassVar[str] = "mlp"
    experts_key: ClassVar[str] = "num_experts"
    hidden_key: ClassVar[str] = "moe_intermediate_size"
    matrices: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    def ffn(self, c: Settings) -> dict[str, Any]:
        c.only(self.activation_key, "silu")
        E = c.get("num_experts", c.get("num_local_experts"))
        return {
            "kind": "moe",
            "experts": E,
            "top_k": c.whole("num_experts_per_tok"),
            "hidden": c.whole(self.hidden_key),
            "gate": "softmax",
            "normalise": self.normalises(c),
            "bias_rate": 0.0,
        }

    def normalises(self, c: Settings) -> bool:
        return True

    def ffn_config(self, ffn: Any) -> dict[str, Any]:
        if ffn is None or ffn.kind != "moe":
            raise UserError("model.backbone.ffn is no 'moe'")
        return {
            self.experts_key: ffn.experts,
            "num_experts_per_tok": ffn.top_k,
            self.hidden_key: ffn.hidden,
            self.activation_key: "silu",
        }

    def ffn_entries(self, lm: LmConfig, ours: str, theirs: str) -> Iterator[Entry]:
        n = stack_of(lm).ffn.experts  # type: ignore[union-attr]
        place, (gate, up, down) = f"{theirs}.{self.place}", self.matrices
        yield Entry(f"{ours}.ffn.router.weight", (f"{place}.gate.weight",))
        first = [f"{place}.experts.{e}.{m}.weight" for e in range(n) for m in (gate, up)]
        yield Entry(f"{ours}.ffn.up.weight", tuple(first), Experts(n, 2))
        last = tuple(f"{place}.experts.{e}.{down}.weight" for e in range(n))
        yield Entry(f"{ours}.ffn.out.weight", last, Experts(n))
