"""Typed configuration.

Frozen pydantic models, YAML with a one-parent `base:`, and `a.b=c` overrides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mm.errors import UserError, did_you_mean

T = TypeVar("T", bound="Config")
SHIPPED = Path(__file__).parent / "configs"


class Config(BaseModel):
    """Base of every config.

    Frozen; an unknown key is an error that suggests the known one. Subclasses own `build`.
    """

    # Keys that had another name: {"old": "new"}. They are refused with the new name.
    renamed: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for key in value:
                if key in cls.renamed:
                    raise ValueError(f"key '{key}' is called '{cls.renamed[key]}' now")
                if key not in cls.model_fields:
                    raise ValueError(
                        f"unknown key '{key}'{did_you_mean(str(key), cls.model_fields)}"
                    )
        return value

    def build(self, *args: Any, **kw: Any) -> Any:
        """Make the thing that this config describes."""
        raise NotImplementedError(f"{type(self).__qualname__} does not build anything")

    @classmethod
    def smallest(cls: type[T]) -> T:
        """The smallest useful instance: the laws of tests/test_contract*.py run over it.

        Default: all defaults.
        """
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, defaults included, with every `kind`."""
        return self.model_dump(mode="json")


def find(path: str | Path, beside: Path | None = None) -> Path:
    """Locate a YAML: as given, beside the file that names it, or among the shipped configs.

    The suffix is optional.
    """
    given = Path(path)
    shipped = Path(*given.parts[1:]) if given.parts and given.parts[0] == "configs" else given
    for candidate in [given, *([beside / given] if beside else []), SHIPPED / shipped]:
        for name in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if name.is_file():
                return name
    everything = [str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.rglob("*.yaml")]
    raise UserError(f"no config '{path}'{did_you_mean(str(shipped.with_suffix('')), everything)}")


def read(
    path: str | Path, beside: Path | None = None, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Read a YAML and merge it over its `base:`; a null removes a key of the base.

    Raises UserError on bad YAML or a cycle.
    """
    file = find(path, beside).resolve()
    if file in seen:
        raise UserError(
            f"{file.name}: 'base' goes in a circle: {' -> '.join(p.name for p in (*seen, file))}"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: the top level must be 'key: value' pairs")
    base = values.pop("base", None)
    return merge(read(base, file.parent, (*seen, file)), values) if base else values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; lists and a mapping of another `kind` replace, null removes."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        same_kind = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind")
        )
        if value is None and key in out:
            del out[key]
        else:
            out[key] = merge(old, value) if same_kind else value  # type: ignore[arg-type]
    return out


def override(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=c` (list places by number: `stages.0.budget.steps=10`); the value is YAML."""
    for text in assignments:
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise UserError(f"override '{text}' is not of the form key.sub=value")
        node: Any = values
        *parents, last = path.lstrip("-").split(".")
        for i, word in enumerate([*parents, last]):
            key: Any = word
            if isinstance(node, list):
                if not word.isdigit() or int(word) >= len(node):
                    raise UserError(
                        f"override '{text}': '{word}' is not a place of a list of {len(node)}"
                    )
                key = int(word)
            elif not isinstance(node, dict):
                raise UserError(
                    f"override '{text}': '{'.'.join(parents[:i])}' holds a plain value, no '{word}'"
                )
            if i == len(parents):
                node[key] = yaml.safe_load(raw)
                break
            below = node.get(key, {}) if isinstance(node, dict) else node[key]
            # `mixer: attention` is short for its kind
            node[key] = {"kind": below} if isinstance(below, str) else below
            node = node[key]
    return values


def validate(cls: type[T], values: Mapping[str, Any], origin: str) -> T:
    """Build ``cls`` from plain values. Raises UserError: one line a fault (origin, path, why)."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{origin}: {where + ': ' if where else ''}{message}")
        raise UserError("\n".join(dict.fromkeys(lines))) from error


def load(path: str | Path, cls: type[T], overrides: Iterable[str] = ()) -> T:
    """Read, merge, override and validate one YAML file. Raises UserError."""
    return validate(cls, override(read(path), overrides), str(path))


def dump(config: Config) -> str:
    """The resolved config as YAML, in declaration order."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)
