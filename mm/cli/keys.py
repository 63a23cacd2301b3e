"""The keys of a run's YAML, with type, default and meaning, from the config classes themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from rich.text import Text

from mm.cli.schema import definition
from mm.config import Config
from mm.errors import UserError, did_you_mean
from mm.plug_point import Registry, load_plugins
from mm.run import Run

ANY = "*"  # a place of a list, or a key of a mapping
LONG = 40  # characters of a default


class Key(NamedTuple):
    """One key; of a plug point for one kind of it, such as ``stages.*.optimizer.lr`` of adamw."""

    path: str
    kind: str
    type: str
    default: str
    what: str


def list_keys(pattern: str | None = None) -> list[Key]:
    """Keys of a Run that fit ``pattern``; kinds that have a key alike share a line.

    Args:
        pattern: None: all but those of kinds. A path, with ``*`` for anything:
            ``stages.*.optimizer*``. One word alone is a part of the last name: ``lr``.
    Raises:
        UserError: no key fits.
    """
    load_plugins()
    wanted = _wanted(pattern) if pattern else None
    found: dict[Key, list[str]] = {}
    names: set[str] = set()
    for key in walk(wanted):
        names.add(key.path.rsplit(".", 1)[-1])
        if wanted is None or _fits(key.path, wanted):
            found.setdefault(key._replace(kind=""), []).append(key.kind)
    if not found:
        hint = did_you_mean(str(pattern).rpartition(".")[2], names)
        close = hint if "did you mean" in hint else "; all of them: mm config keys"
        raise UserError(f"no key fits '{pattern}'{close}")
    return [key._replace(kind=", ".join(kinds)) for key, kinds in found.items()]


def show(keys: Iterable[Key]) -> list[Text]:
    """A line for each key: what it is called, takes and means, and whose it is."""
    lines = []
    for key in keys:
        of = f" ({key.kind})" if key.kind else ""
        default = key.default if key.default == "required" else f"= {key.default}"
        lines.append(
            Text.assemble(
                (key.path, "bold"), f"  {key.type} {default}", (f"  {key.what}", "dim"), of
            )
        )
    return lines


def find_key(path: str, kinds: Mapping[str, str]) -> Key:
    """One key. Raises KeyError where there is none.

    Args:
        path: as in a YAML, such as ``stages.0.data.seq_len``.
        kinds: kind that is taken of each plug point on the way.
    """
    wanted = _wanted(path)
    fitting = [key for key in walk(wanted, kinds) if key.path == wanted]
    if not fitting:
        raise KeyError(path)
    return fitting[0]._replace(path=path)


def walk(wanted: str | None = None, kinds: Mapping[str, str] | None = None) -> Iterator[Key]:
    """Every key of a Run; of kinds only what may fit ``wanted``, as their import takes time."""
    body, nested = _schema(Run, "Run")
    yield from _walk(body, "", "", nested, (), wanted, kinds)


def _walk(
    body: Mapping[str, Any],
    prefix: str,
    kind: str,
    definitions: dict[str, Any],
    inside: tuple[str, ...],
    wanted: str | None,
    kinds: Mapping[str, str] | None,
) -> Iterator[Key]:
    for name, of in body.get("properties", {}).items():
        if name == "kind":
            continue
        path = prefix + name
        needed = name in body.get("required", ())
        default = "required" if needed else json.dumps(of.get("default"), ensure_ascii=False)
        short = default if len(default) <= LONG else f"{default[: LONG - 4]} ..."
        yield Key(path, kind, type_of(of), short, " ".join(of.get("description", "").split()))
        for target, suffix in _below(of):
            place = f"{path}{suffix}."
            if target not in Registry.every:
                nested = definitions[target]
                yield from _walk(nested, place, kind, definitions, inside, wanted, kinds)
            elif target not in inside and wanted is not None and _may_fit(place, wanted):
                registry = Registry.every[target]
                chosen = [kinds[target]] if kinds and target in kinds else list(registry)
                for one in chosen:
                    cls, own = _schema(registry.get(one), f"{target}.{one}")
                    yield from _walk(cls, place, one, own, (*inside, target), wanted, kinds)


@cache
def _schema(cls: type[Config], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Schema of a config class, and of the models nested in it."""
    nested: dict[str, Any] = {}
    return definition(cls, name, nested), nested


def _below(of: Mapping[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    """(definition or plug point, what stands between) of everything that a field may hold."""
    if "$ref" in of:
        yield of["$ref"].removeprefix("#/$defs/"), suffix
    for word in ("anyOf", "oneOf", "allOf"):
        for part in of.get(word, ()):
            yield from _below(part, suffix)
    for inner in (of.get("items"), of.get("additionalProperties")):
        if isinstance(inner, Mapping):
            yield from _below(inner, f"{suffix}.{ANY}")


def type_of(of: Mapping[str, Any]) -> str:
    """The type of a field in words."""
    if "$ref" in of:
        return of["$ref"].removeprefix("#/$defs/").rpartition(".")[2]
    if "enum" in of:
        return ", ".join(map(str, of["enum"]))
    for word in ("anyOf", "oneOf", "allOf"):
        if word in of:
            return " or ".join(dict.fromkeys(map(type_of, of[word])))
    kind = str(of.get("const", of.get("type", "anything")))
    if kind == "array":
        return f"list of {type_of(of.get('items', {}))}"
    if kind == "object" and isinstance(of.get("additionalProperties"), Mapping):
        return f"mapping to {type_of(of['additionalProperties'])}"
    return {"object": "mapping", "string": "text", "integer": "whole number"}.get(kind, kind)


def _wanted(pattern: str) -> str:
    """A pattern with places of lists as ``*``."""
    return ".".join(ANY if word.isdigit() else word for word in pattern.split("."))


def _fits(path: str, wanted: str) -> bool:
    if re.fullmatch(r"\w+", wanted):
        return wanted in path.rpartition(".")[2]
    return fnmatchcase(path, wanted)


def _may_fit(prefix: str, wanted: str) -> bool:
    """True where a key below ``prefix`` may fit: its words fit those that the pattern has."""
    if "." not in wanted:
        return True
    for have, want in zip(prefix.rstrip(".").split("."), wanted.split("."), strict=False):
        if not fnmatchcase(have, want) and want != ANY:
            return False
        if want.endswith(ANY) and want != ANY:
            return True
    return True
