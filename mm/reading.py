"""What somebody else may have written or damaged, JSON, YAML, .npy: limits, one kind of error."""

from __future__ import annotations

import json
import re
from itertools import chain, islice
from typing import IO, Any

import yaml

MAX_DEPTH = 64  # nested lists and mappings; every walk over a config recurses
MAX_PARTS = 1_000_000  # lists and mappings of one level
MAX_YAML_VALUES = 500_000  # of one level: aliases multiply them
MAX_JSON_BYTES = 256_000_000
MAX_YAML_BYTES = 4_000_000  # it is read at some MB a second
# libyaml's, ten times as quick; a PyYAML that was built without it has the other alone.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# How JSON, YAML and bytes say half a character: it fits in no file name and no UTF-8.
_HALF = {
    str: re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]"),
    bytes: re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]"),
}


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives.

    Raises ValueError on no JSON, on what is too large or deep, and on half a character.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if sum(map(text.count, opening)) > MAX_DEPTH:  # type: ignore[arg-type]
        _require_flat(value)
    _require_characters(text, value)
    return value


def parse_yaml(text: str | bytes) -> Any:
    """What `yaml.safe_load` gives.

    Raises ValueError on no YAML, on what is too large or deep, or grows by its aliases, and on half
    a character.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{len(text)} bytes, the limit is {MAX_YAML_BYTES}")
    try:
        depth = 0
        for event in yaml.parse(text, _SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > MAX_DEPTH:  # before a tree is made of it
                    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        value = yaml.load(text, _SafeLoader)
    except (yaml.YAMLError, UnicodeError) as error:
        if "maximum nesting depth" in str(error):  # of libyaml, which reads ahead
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
        raise ValueError(" ".join(str(error).split())) from error
    _require_flat(value, MAX_YAML_VALUES)
    _require_characters(text, value)
    return value


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether the first axis runs fastest, and dtype of an .npy; ``file`` stands behind it.

    Nothing is allocated, and a pickle is never opened. Raises ValueError on anything else than
    versions 1.0 and 2.0, on Python objects, and on an axis below 0.
    """
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        version = npy.read_magic(file)
        if version not in readers:
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = readers[version](file)
    except Exception as error:  # numpy evaluates the header as a literal: it may fail in many ways
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"{type(error).__name__}: {said}") from error
    if dtype.hasobject or any(n < 0 for n in shape):
        raise ValueError(f"it says {dtype} {shape}: no numbers that can be read without a pickle")
    return shape, fortran, dtype


def _require_characters(text: str | bytes, value: Any) -> None:
    """Raise ValueError where a text in ``value`` cannot be written as UTF-8."""
    if _HALF[type(text)].search(text) is None:  # type: ignore[arg-type]
        return
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list):
            parts += part
        elif isinstance(part, str) and not part.isascii():
            half = next((c for c in part if "\ud800" <= c <= "\udfff"), None)
            if half is not None:
                raise ValueError(f"half a character (\\u{ord(half):x}), which no text can hold")


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
