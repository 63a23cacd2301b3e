"""JSON and YAML that somebody else may have written or damaged: limits, and one kind of error."""

from __future__ import annotations

import json
from itertools import chain, islice
from typing import Any

import yaml

MAX_DEPTH = 64  # nested lists and mappings; every walk over a config recurses
MAX_PARTS = 1_000_000  # lists and mappings of one level
MAX_YAML_VALUES = 500_000  # of one level: aliases multiply them
MAX_JSON_BYTES = 256_000_000
MAX_YAML_BYTES = 4_000_000  # it is read at about 1 MB a second


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives. Raises ValueError on no JSON, and on what is too large or deep."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if sum(map(text.count, opening)) > MAX_DEPTH:  # type: ignore[arg-type]
        _require_flat(value)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """What `yaml.safe_load` gives.

    Raises ValueError on no YAML, and on what is too large or deep, or grows by its aliases.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} bytes, the limit is {MAX_YAML_BYTES}")
    try:
        value = yaml.load(text, _ShallowLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    _require_flat(value, MAX_YAML_VALUES)
    return value


class _ShallowLoader(yaml.SafeLoader):
    """Stops at the first level that is too deep, before it has read the rest."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:  # a scalar is a node, too
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _require_flat(value: Any, most_values: int | None = None) -> None:
    """Raise ValueError on too many levels, or too many parts or values of one."""
    is_nest = lambda part: isinstance(part, (dict, list))
    level, depth = list(filter(is_nest, [value])), 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if most_values is not None and sum(map(len, level)) > most_values:
            raise ValueError(f"more than {most_values} values: its aliases unfold to too many")
        if len(level) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} lists and mappings")
        inside = chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level)
        level = list(islice(filter(is_nest, inside), MAX_PARTS + 1))
