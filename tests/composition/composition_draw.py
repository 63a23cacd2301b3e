"""Random compositions over the registries, and the documents that they read."""

from __future__ import annotations

import random
import typing
from typing import Any, Literal

from composition_cases import EXPRESSION
from composition_configs import (
    ITEM,
    Case,
    D,
    alternatives,
    builds,
    memories_of,
    plain,
    preset,
    registry_of,
    smallest,
    wrapped,
    wrappers,
)

from mm.config import Config
from mm.model.backbones.stack import StackConfig, presets
from mm.plug_point import Registry
from mm.registry import ADAPTERS, BACKBONES, BLOCKS, EMBEDDERS, FFNS, HEADS, MIXERS


def varied(rng: random.Random, cls: type[Config], values: dict[str, Any], times: int) -> None:
    """Set ``times`` settings that are switches, words or optional numbers to other values."""
    options: dict[str, list[Any]] = {}
    for name, field in cls.model_fields.items():
        hints = alternatives(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        made: list[Any] = [None] if optional else []
        for hint in hints:
            if hint is bool:
                made += [True, False]
            elif typing.get_origin(hint) is Literal and name != "kind":
                made += [*typing.get_args(hint)]
            elif hint is int and optional:
                made += [2, 3, 4]
            elif hint is float and optional:
                made += [0.5, 2.0, 8.0]
        if made:
            options[name] = made
    for name in rng.sample(sorted(options), min(times, len(options))):
        values[name] = rng.choice(options[name])


def any_mixer(rng: random.Random, nested: int = 2) -> dict[str, Any]:
    """A random mixer that the product takes; wrappers nest up to ``nested`` deep."""
    for _ in range(8):
        if builds(made := any_of(rng, MIXERS, nested)):
            return made
    return smallest(MIXERS, rng.choice([*MIXERS]))


def any_of(rng: random.Random, registry: Registry, nested: int = 2) -> dict[str, Any]:
    """A random entry of ``registry``, its parts random entries of theirs.

    Mixers nest up to ``nested`` deep.
    """
    if registry is MIXERS:
        kinds, deep = [*MIXERS], wrappers()
        if nested and rng.random() < 0.35:
            kind = rng.choice(deep)
        elif rng.random() < 0.3:
            return preset(rng.choice(presets()))
        else:
            kind = rng.choice([k for k in kinds if k not in deep])
    else:
        kind = rng.choice([*registry])
    cls = registry.get(kind)
    if cls is StackConfig:
        return stack(rng)
    config = cls.smallest()
    values = plain(config)
    for name in cls.model_fields:
        value = getattr(config, name)
        part = registry_of(value)
        many = isinstance(value, list | tuple) and value and registry_of(value[0])
        if part is MIXERS:
            inner = any_mixer(rng, nested - 1)
            if builds(wrapped_in := {**values, name: inner}):
                values = wrapped_in
        elif many is MIXERS:
            values[name] = [any_mixer(rng, nested - 1) for _ in value]
        elif isinstance(value, StackConfig):
            values[name] = with_readers(stack(rng), value)
        elif part is not None and rng.random() < 0.5:
            values[name] = any_of(rng, part, nested)
    if rng.random() < 0.5:
        varied(rng, cls, values, rng.choice([1, 1, 2]))
    return values


def related(rng: random.Random, mixer: dict[str, Any]) -> dict[str, Any]:
    """The same mixer, one that wraps it, or one inside it: layers that may share things."""
    inside = [part for part in mixer.values() if isinstance(part, dict) and builds(part)]
    around = [made for kind in wrappers() if builds(made := wrapped(kind, mixer))]
    return rng.choice([mixer, *inside, *(rng.sample(around, 1) if around else [])])


def stack(rng: random.Random) -> dict[str, Any]:
    words = [f"m{i}" for i in range(rng.choice([1, 1, 2, 2, 3]))]
    made: dict[str, Any] = {"kind": "stack", "pattern": " ".join(words)}
    mixers: dict[str, Any] = {}
    for word in words:
        old = rng.choice([*mixers.values()]) if mixers and rng.random() < 0.4 else None
        mixers[word] = any_mixer(rng) if old is None else related(rng, old)
    made["mixers"] = mixers
    made[FFNS.name] = any_of(rng, FFNS) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        made["block"] = any_of(rng, BLOCKS)
    if rng.random() < 0.2:
        made["blocks"] = {words[0]: any_of(rng, BLOCKS)}
    if rng.random() < 0.2:
        made["recompute"] = rng.choice(["full", "selective"])
    return made


def with_readers(drawn: dict[str, Any], like: StackConfig) -> dict[str, Any]:
    """A drawn stack with the layers of another that attend to a memory of their backbone."""
    for word in like.words():
        if memories_of(mixer := plain(like.mixer(word))):
            drawn["pattern"] += f" {word}"
            drawn["mixers"][word] = mixer
    return drawn


def any_case(seed: int, mask: str | None = None) -> Case:
    """The random composition of a seed."""
    rng = random.Random(seed)
    mask = mask or rng.choice(
        ["causal", "causal", "prefix", "prefix", "full", "window", EXPRESSION]
    )
    backbone = stack(rng) if rng.random() < 0.8 else any_of(rng, BACKBONES)
    model: dict[str, Any] = {"kind": "lm", "d_model": D, "backbone": backbone}
    if mask not in ("causal", "window"):
        model["mask"] = mask
    if rng.random() < 0.3:
        model["embedder"] = any_of(rng, EMBEDDERS)
    items = rng.random() < 0.35
    if items:
        model["adapters"] = {ITEM: any_of(rng, ADAPTERS)}
    if rng.random() < 0.3:
        model["heads"] = {"tokens": any_of(rng, HEADS)}
    if rng.random() < 0.15:
        second = any_of(rng, HEADS)
        reads = [n for n, f in HEADS.get(second["kind"]).model_fields.items()
                 if f.default == "hidden"]  # fmt: skip
        model["heads"] = {"tokens": "softmax", "other": second | {n: "hidden.0" for n in reads}}
    case: Case = {"model": model, "mask": mask, "seed": seed}
    depth = len(backbone["pattern"].split()) if "pattern" in backbone else 0
    if depth and rng.random() < 0.15:
        case["path"] = [rng.randrange(depth) for _ in range(rng.choice([2, 3]))]
    grids = rng.random() < (0.5 if mask in ("full", "prefix") else 0.15)
    bare = rng.random() < 0.2  # nothing is marked: the batch has no such field
    case["documents"] = [
        any_document(rng, "causal" if bare else mask, items, grids)
        for _ in range(rng.choice([2, 3, 4]))
    ]
    return case


def any_document(rng: random.Random, mask: str, items: bool, grids: bool) -> dict[str, Any]:
    length = rng.randint(1, 9)
    made: dict[str, Any] = {"length": length}
    if grids and length >= 4 and rng.random() < 0.7:
        shape = rng.choice([(2, 2), (2, 2), (1, 3), (2, 3)])
        cells = shape[0] * shape[1]
        if cells <= length:
            made["grid"] = [rng.randint(0, length - cells), *shape]
    if mask in ("prefix", EXPRESSION) and rng.random() < 0.7:
        end = rng.randint(1, length)
        if "grid" in made and rng.random() < 0.7:
            end = max(end, made["grid"][0] + made["grid"][1] * made["grid"][2])
        made["blocks"] = [[0, end]]
        if end + 2 < length and rng.random() < 0.5:
            made["blocks"].append([rng.randint(end + 1, length - 1), length])
    if items and length >= 2 and rng.random() < 0.7:
        n = rng.randint(1, min(3, length))
        made["item"] = [rng.randint(0, length - n), n, n + rng.choice([0, 1, 2])]
    return made
