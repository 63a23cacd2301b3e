"""Models as plain values: what a composition is made of. D model.

A case is YAML: `model` (a language model's config), `mask`, `path`, `seed` and `documents`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch

from mm.config import Config, validate
from mm.errors import UserError
from mm.model.backbones.stack import StackConfig, presets
from mm.model.layer import init_weights
from mm.model.memories import MEMORIES, memories_read
from mm.model.model import LmConfig, Model
from mm.plug_point import Registry
from mm.registry import BACKBONES, FFNS, MIXERS
from mm.specs import TokenSpec
from mm.vocabulary import Vocabulary

D = 16
ITEM = "image"  # the adapter's modality
VOCABULARY = Vocabulary().add(TokenSpec("text", 5))
Case = dict[str, Any]


def registry_of(value: Any) -> Registry | None:
    """The registry that a Config is an entry of."""
    kind = getattr(value, "kind", None)
    for registry in Registry.every.values():
        if isinstance(value, Config) and kind in registry and registry.get(kind) is type(value):
            return registry
    return None


def plain(config: Config) -> dict[str, Any]:
    """``config`` as YAML values: its kind, and what is not the default."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Config):
            return plain(value)
        if isinstance(value, Mapping):
            return {k: value_of(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [value_of(v) for v in value]
        return value

    made = {"kind": config.kind} if hasattr(config, "kind") else {}
    for name, field in type(config).model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = getattr(config, name)
        if name != "kind" and value_of(value) not in (value_of(default), default):
            made[name] = value_of(value)
    return made


def wrappers() -> list[str]:
    """Mixers that hold other mixers."""
    return [kind for kind in MIXERS if inner_fields(MIXERS.get(kind).smallest())]


def inner_fields(config: Config) -> dict[str, int | None]:
    """Fields of ``config`` that hold mixers: name -> how many (None: one, not in a list)."""
    found: dict[str, int | None] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if registry_of(value) is MIXERS:
            found[name] = None
        elif isinstance(value, list | tuple) and value and registry_of(value[0]) is MIXERS:
            found[name] = len(value)
    return found


def smallest(registry: Registry, kind: str) -> dict[str, Any]:
    return plain(registry.get(kind).smallest())


@functools.cache
def _preset(word: str) -> dict[str, Any]:
    return plain(StackConfig(pattern=word).mixer(word))


def preset(word: str) -> dict[str, Any]:
    return copy.deepcopy(_preset(word))


def wrapped(kind: str, inner: dict[str, Any]) -> dict[str, Any]:
    """The wrapper ``kind`` around copies of one mixer."""
    config = MIXERS.get(kind).smallest()
    made = plain(config)
    for name, count in inner_fields(config).items():
        made[name] = inner if count is None else [inner] * count
    return made


@functools.cache
def _builds(text: str) -> bool:
    try:
        with torch.device("meta"):
            MIXERS.parse(json.loads(text)).build(D)
    except (UserError, ValueError):
        return False
    return True


def builds(mixer: dict[str, Any]) -> bool:
    """The product takes this mixer."""
    return _builds(json.dumps(mixer, sort_keys=True))


def alternatives(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without Annotated and None."""
    if typing.get_origin(annotation) is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Union or isinstance(annotation, type(int | None)):
        return [a for each in typing.get_args(annotation) for a in alternatives(each)]
    return [] if annotation is type(None) else [annotation]


def variants(registry: Registry) -> list[dict[str, Any]]:
    """Every entry of a registry with every choice of its switches that it accepts."""
    made = []
    for kind in registry:
        cls = registry.get(kind)
        switches = {
            name: [True, False] if hint is bool else [*typing.get_args(hint)]
            for name, field in cls.model_fields.items()
            for hint in alternatives(field.annotation)[:1]
            if hint is bool or (typing.get_origin(hint) is Literal and name != "kind")
        }
        for chosen in itertools.product(*switches.values()):
            values = smallest(registry, kind) | dict(zip(switches, chosen, strict=True))
            try:
                made.append(plain(registry.parse(values)))
            except (UserError, ValueError):
                continue
    return made


def all_mixers() -> dict[str, dict[str, Any]]:
    """Every mixer in its smallest form, and every preset."""
    made = {kind: smallest(MIXERS, kind) for kind in MIXERS}
    return made | {f"preset {word}": preset(word) for word in presets()}


def fixed(model: dict[str, Any], mask: str, documents: list[dict[str, Any]]) -> Case:
    """A case that nobody drew."""
    base = {"kind": "lm", "d_model": D}
    base |= {"mask": mask} if mask not in ("causal", "window") else {}
    return {"model": base | model, "mask": mask, "seed": 0, "documents": documents}


def layers(*mixers: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A backbone of these mixers, without feed-forwards if ``settings`` name none.

    Of mixers that attend to a memory: the decoder of a backbone that makes it.
    """
    words = [f"m{i}" for i in range(len(mixers))]
    made = {"kind": "stack", "pattern": " ".join(words)}
    made["mixers"] = dict(zip(words, mixers, strict=True))
    made |= {FFNS.name: None} | settings
    read = {name for mixer in mixers if builds(mixer) for name in memories_of(mixer)}
    if not read:
        return made
    (maker,) = (kind for kind in BACKBONES if makes(kind) >= read)
    return smallest(BACKBONES, maker) | {"decoder": made}


def memories_of(mixer: dict[str, Any]) -> set[str]:
    """Names of the memories that a mixer attends to."""
    with torch.device("meta"):
        return memories_read(MIXERS.parse(mixer).build(D))


def makes(backbone: str) -> set[str]:
    """Names of the memories that a backbone makes."""
    with torch.device("meta"):
        layer = BACKBONES.get(backbone).smallest().build(D)
    return {n.removeprefix(MEMORIES) for n in layer.caps.publishes if n.startswith(MEMORIES)}


# ---- models ----


class Refused(Exception):
    """The product refuses this composition when its config is read or built."""


def build(case: Case) -> Model:
    """The model of a case, every parameter away from its special initial value (zeros, ones).

    Raises:
        Refused: the config is refused by one clear line.
    """
    if any("item" in d for d in case["documents"]) and ITEM not in case["model"].get(
        "adapters", {}
    ):
        raise Refused("documents with items need an adapter")
    torch.default_generator.manual_seed(7)  # torch.manual_seed asks every kind of device
    try:
        model = validate(LmConfig, case["model"], "case").build(VOCABULARY)
    except (UserError, ValueError) as error:
        if not str(error).strip() or "\n" in str(error).strip():
            lines = str(error).strip().splitlines()
            if not lines or any(not line.startswith("case: ") for line in lines):
                raise AssertionError(f"not refused by a clear line: {error!r}") from error
        raise Refused(str(error)) from error
    init_weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double()
