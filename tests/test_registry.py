"""Every registry entry and every YAML file reads back as it was written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT

from mm import config as configs
from mm.cli.schema import resolve
from mm.plug_point import Registry

ENTRIES = [(r.name, kind) for r in Registry.every.values() for kind in r]


@pytest.mark.parametrize(("registry", "kind"), ENTRIES, ids=lambda v: v)
def test_every_registry_entry_registers_its_kind(registry: str, kind: str) -> None:
    table = Registry.every[registry]
    cls = table.get(kind)
    assert cls.model_fields["kind"].default == kind
    assert cls.__doc__ and "build" in dir(cls)
    place = table._modules[kind]
    assert importlib.util.find_spec(place) is not None, place
    smallest = cls.smallest()
    again = table.parse(smallest.to_dict())
    assert (
        again == smallest and type(again) is cls
    )  # what is written into a run folder reads back as it was


YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", YAMLS, ids=lambda f: str(f.relative_to(ROOT / "configs")))
def test_every_yaml_is_valid(file: Path) -> None:
    values = configs.read(file)
    if "stages" not in values and "tokenizer" not in values and "kind" not in values:
        pytest.fail(f"{file.name} is no Run, no tokenizer and no plug point")
    resolved = resolve(str(file))
    assert yaml.safe_load(configs.dump(resolved)) == resolved.to_dict()
    assert file.read_text().startswith("#"), (
        "a config opens with what it is and the command that runs it"
    )
