"""A family of models: its config and its tensors in ours, read in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mm.config import Config
from mm.errors import UserError
from mm.interchange.check import Media
from mm.interchange.parts import Entry
from mm.model.backbones.stack import StackConfig
from mm.model.model import LmConfig
from mm.specs import ModalityTokenizer


class Settings(Mapping[str, Any]):
    """A checkpoint's `config.json`, which remembers what was asked of it."""

    def __init__(self, values: Mapping[str, Any], origin: str):
        self._given, self.origin = values, origin
        self.asked: set[str] = set()
        self.parts: dict[str, Settings] = {}  # what `inside` made

    def with_usual(self, usual: Mapping[str, Any]) -> Settings:
        """These, and ``usual`` where they say nothing; both remember what was asked."""
        made = Settings({**usual, **{k: v for k, v in self.items() if v is not None}}, self.origin)
        made.asked, made.parts = self.asked, self.parts
        return made

    def inside(self, key: str, usual: Mapping[str, Any]) -> Settings:
        """The settings below ``key``. Raises UserError where they are no mapping."""
        if key not in self.parts:
            given = self[key]
            if not isinstance(given, Mapping):
                raise self.refuse(key, "is no mapping")
            self.parts[key] = Settings(given, f"{self.origin}: {key}")
        return self.parts[key].with_usual(usual)

    def unread(self) -> list[str]:
        """Keys that nobody asked for and that are not of training or tools alone, sorted."""
        own = [k for k in self if k not in self.asked and k not in SILENT]
        inner = [f"{k}.{name}" for k, part in self.parts.items() for name in part.unread()]
        return sorted([*own, *inner])

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        try:
            return self._given[key]
        except KeyError:
            raise UserError(
                f"{self.origin}: has no '{key}'; copy config.json from the model's own folder"
            ) from None

    def __contains__(self, key: object) -> bool:
        return key in self._given

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        value = self._given.get(key)
        return default if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises UserError naming the key."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.refuse(key, "is no positive whole number")
        return value

    def only(self, key: str, wanted: Any, default: Any = None) -> None:
        """Refuse any value of ``key`` but ``wanted``."""
        if self.get(key, wanted if default is None else default) != wanted:
            raise self.refuse(key, f"has no equal here; only {wanted!r} has")

    def refuse(self, key: str, why: str) -> UserError:
        return UserError(f"{self.origin}: {key} = {str(self.get(key))[:60]!r} {why}")


# What a checkpoint's config says of its training or its tools, and not of its mathematics.
SILENT = frozenset(
    """_name_or_path _sliding_window_pattern architectures attention_dropout attn_pdrop
    cache_implementation dtype embd_pdrop eos_token_id bos_token_id pad_token_id unk_token_id
    gradient_checkpointing initializer_range max_position_embeddings max_window_layers
    mm_tokens mm_vocabulary model_type output_router_logits pretraining_tp resid_pdrop
    router_aux_loss_coef summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj task_specific_params torch_dtype transformers_version use_cache
    vocab_size n_ctx original_max_position_embeddings add_cross_attention
    chunk_size_feed_forward is_encoder_decoder id2label label2id return_dict
    dropout image_seq_length image_token_id image_token_index initializer_factor processor_class
    projection_dim vision_use_head
    keys_to_ignore_at_inference""".split()
)


class Family(Config):
    """Plug point: how one ``model_type`` of Hugging Face's layout is written in our settings."""

    architecture: ClassVar[str] = ""  # class of `transformers`
    table: ClassVar[tuple[str, str, str]] = ("model.embed_tokens.weight", "lm_head.weight", "model")
    mixers: ClassVar[tuple[str, ...]] = ("attention",)  # kinds that it may have
    # Names that hold nothing that is learned: tables that older versions stored.
    silent: ClassVar[str] = r"\.rotary_emb\.inv_freq$"
    auto: ClassVar[str] = "AutoModelForCausalLM"  # what loads it in `transformers`
    origin: ClassVar[tuple[str, ...]] = ()  # keys that no setting of ours holds and that come back

    def build(self) -> Family:
        return self

    def model(self, c: Settings) -> dict[str, Any]:
        """Values of our `LmConfig`. Raises UserError naming a key that has no equal."""
        raise NotImplementedError

    def config(self, lm: LmConfig) -> dict[str, Any]:
        """The checkpoint's config without its vocabulary; need not be right where none is."""
        raise NotImplementedError

    def entries(self, lm: LmConfig) -> Iterator[Entry]:
        """A line for each of our tensors but the embedding table and the head."""
        raise NotImplementedError

    # ---- of a family that reads more than text ----

    def text(self, c: Settings) -> Settings:
        """The settings of its text: vocabulary, begin and end."""
        return c

    def rename(self, name: str) -> str:
        """A tensor's name as the table has it, of a file by another tool."""
        return name

    def readers(
        self, c: Settings, folder: Path, lm: LmConfig
    ) -> tuple[LmConfig, dict[str, ModalityTokenizer]]:
        """The model and, by modality, what makes the values that its adapters read.

        Raises UserError naming a key of the folder's processor without an equal.
        """
        return lm, {}

    def is_unread(self, lm: LmConfig, name: str) -> bool:
        """Whether nothing there reads a tensor, so that it is left out."""
        return False

    def media(
        self, folder: Path, c: Settings, tokenizers: Mapping[str, ModalityTokenizer]
    ) -> Media | None:
        """What stands in the probe besides text."""
        return None

    def finish(
        self,
        config: dict[str, Any],
        outer: Mapping[str, Any],
        text: Mapping[str, Any],
        tokenizers: Mapping[str, ModalityTokenizer],
    ) -> dict[str, Any]:
        """The whole config: ``outer`` says which model it is, ``text`` what its vocabulary is."""
        return {**config, **outer, **own_places(config, text)}

    def beside(
        self, lm: LmConfig, tokenizers: Mapping[str, ModalityTokenizer], have: Mapping[str, bytes]
    ) -> dict[str, Any]:
        """Further files of an exported folder, as JSON; ``have``: those that came with its text."""
        return {}


def rope(c: Settings, layer_type: str | None = None, usual: float = 1.0) -> dict[str, Any]:
    """Our rotary position, of ``layer_type`` where each has its own.

    ``usual``: share of a head that is rotated, where nothing says it.

    Source of the keys: `rope_parameters`, or as they were before it, `rope_theta` and
    `rope_scaling`.
    """
    given = c.get("rope_parameters")
    if isinstance(given, Mapping) and layer_type in given:
        given = given[layer_type]
    if not isinstance(given, Mapping):
        given = c.get("rope_scaling", {})
        if layer_type == "sliding_attention" and "rope_local_base_freq" in c:
            given = {"rope_theta": c["rope_local_base_freq"]}
    key = "rope_parameters" if "rope_parameters" in c else "rope_scaling"
    if not isinstance(given, Mapping):
        raise c.refuse(key, "is no mapping")
    theta = given.get("rope_theta") or c.get("rope_theta", 10000.0)
    position: dict[str, Any] = {"kind": "rope", "theta": theta}
    share = given.get("partial_rotary_factor") or c.get("partial_rotary_factor", usual)
    if share != 1.0:
        position["fraction"] = share
    rule = given.get("rope_type", given.get("type", "default"))
    if rule == "default":
        return position
    rule = {"su": "longrope"}.get(rule, rule)
    if rule not in ("linear", "llama3", "yarn", "dynamic", "longrope"):
        raise c.refuse(key, f"scales rotations by '{rule}', which has no equal")
    scaling = {"rule": rule, "factor": given.get("factor")}
    most = c.get("max_position_embeddings")
    if rule == "dynamic":
        scaling["original"] = most
    elif rule != "linear":
        known = given.get("original_max_position_embeddings")
        scaling["original"] = known or c.get("original_max_position_embeddings", most)
    if rule == "longrope":
        factor = scaling["factor"] = given.get("factor") or most / scaling["original"]
        grown = 1 + math.log(max(factor, 1.0)) / math.log(scaling["original"])
        scaling["length"] = given.get("attention_factor") or grown**0.5
        scaling |= {"short": given.get("short_factor"), "long": given.get("long_factor")}
    if rule == "llama3":
        scaling |= {"low": given.get("low_freq_factor"), "high": given.get("high_freq_factor")}
    if rule == "yarn":
        scaling |= {
            "low": given.get("beta_slow") or 1.0,
            "high": given.get("beta_fast") or 32.0,
            "round": given.get("truncate", True),
            "length": _length(given),
        }
    return position | {"scaling": scaling}


def _length(given: Mapping[str, Any]) -> float | None:
    """YaRN's length of rotated vectors where it is not the usual one."""
    if given.get("attention_factor"):
        return given["attention_factor"]
    m, every = given.get("mscale"), given.get("mscale_all_dim")
    if not (m and every):
        return None
    grown = lambda x: 0.1 * x * math.log(given["factor"]) + 1.0
    return grown(m) / grown(every)


def rope_parameters(position: Any) -> dict[str, Any]:
    """`rope_parameters` of our rotary position."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": position.theta}
    if position.fraction != 1.0:
        out["partial_rotary_factor"] = position.fraction
    s = position.scaling
    if s is None:
        return out
    out |= {"rope_type": s.rule, "factor": s.factor}
    if s.rule not in ("linear", "dynamic"):
        out["original_max_position_embeddings"] = s.original
    if s.rule == "longrope":
        out |= {"short_factor": s.short, "long_factor": s.long, "attention_factor": s.length or 1.0}
    if s.rule == "llama3":
        out |= {"low_freq_factor": s.low, "high_freq_factor": s.high or 4.0}
    if s.rule == "yarn":
        out |= {"beta_slow": s.low, "beta_fast": s.high or 32.0, "truncate": s.round}
        if s.length is not None:
            out["attention_factor"] = s.length
    return out


def places(position: Any) -> dict[str, Any]:
    """`max_position_embeddings` where a rotation's rule depends on it."""
    s = position.scaling
    if s is None or s.rule not in ("dynamic", "longrope"):
        return {}
    if s.rule == "dynamic":
        return {"max_position_embeddings": s.original}
    most = round(s.original * s.factor)
    return {"max_position_embeddings": most, "original_max_position_embeddings": s.original}


def own_places(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """``text`` without the number of places where a rotation's rule says it."""
    return {k: v for k, v in text.items() if k not in config or k != "max_position_embeddings"}


def stack_of(lm: LmConfig) -> StackConfig:
    """The stack of a model. Raises UserError when it has another backbone."""
    if not isinstance(lm.backbone, StackConfig):
        raise UserError(f"model.backbone: a '{lm.backbone.kind}' has no equal; only 'stack' has")
    return lm.backbone
