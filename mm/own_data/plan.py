"""A plan: configs whose every chosen value stands beside its reason, and their commands.

The same reasons go into the YAML as comments and into the table that `mm init` prints.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

WIDE = 96  # characters of what may stand on one line


class Chosen(NamedTuple):
    """A value and why it was taken."""

    value: Any
    why: str


class Step(NamedTuple):
    """Words of a command after ``mm``, and what it is for."""

    words: tuple[str, ...]
    why: str

    @property
    def line(self) -> str:
        return shlex.join(["mm", *self.words])


class Plan(NamedTuple):
    """``configs``: file name -> nested values, of which some are `Chosen`; ``steps`` in order."""

    configs: Mapping[str, Mapping[str, Any]]
    steps: tuple[Step, ...]
    notes: tuple[Chosen, ...]  # what was seen and decided, that is no key of a file

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(file, key, value, reason) of everything that was chosen."""
        out = [("", str(note.value), "", note.why) for note in self.notes]
        for file, values in self.configs.items():
            out += [(file, key, flow(each.value), each.why) for key, each in choices(values)]
        return out


def choices(node: Any, path: str = "") -> Iterator[tuple[str, Chosen]]:
    """(dotted key, choice) of every `Chosen` below ``node``."""
    if isinstance(node, Chosen):
        yield path, node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from choices(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from choices(value, f"{path}.{i}")


def plain(node: Any) -> Any:
    """The values alone, as a config reads them."""
    if isinstance(node, Chosen):
        return plain(node.value)
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain(value) for value in node]
    return node


def flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.dump(
        plain(value),
        Dumper=_OneLine,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=10**9,
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _OneLine(yaml.SafeDumper):
    """Text that has several lines stands in double quotes: else YAML breaks it, too."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _text)


def to_yaml(values: Mapping[str, Any], head: str) -> str:
    """YAML with ``head`` as its first comment, and the reason after every chosen value."""
    first = "".join(f"# {line}\n" for line in head.splitlines())
    return first + "\n".join(_lines(values, "")) + "\n"


def _lines(node: Any, indent: str) -> Iterator[str]:
    pairs = node.items() if isinstance(node, Mapping) else (("-", value) for value in node)
    for key, value in pairs:
        name = "- " if key == "-" else f"{key}: "
        chosen = value if isinstance(value, Chosen) else None
        value = chosen.value if chosen else value
        line = f"{indent}{name}{flow(value)}"
        nested = isinstance(value, (Mapping, list, tuple)) and len(value) > 0
        short = len(line) <= WIDE and next(choices(value), None) is None
        if not nested or short:
            yield line + (f"  # {chosen.why}" if chosen else "")
            continue
        below = list(_lines(value, indent + "  "))
        if chosen:
            yield f"{indent}# {chosen.why}"
        if key == "-":
            yield f"{indent}- {below[0].lstrip()}"
            yield from below[1:]
        else:
            yield f"{indent}{name.rstrip()}"
            yield from below
