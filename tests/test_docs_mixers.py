"""docs/mixers.md against the registries, the presets and the files."""

from __future__ import annotations

import re

import pytest
from laws import ROOT

import mm.mask
from mm import config as yaml_config
from mm.kernels.op import Op
from mm.model.backbones.stack import presets
from mm.registry import BACKBONES, MIXERS, OBJECTIVES, POSITIONS, TRANSFORMS, Registry

TEXT = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| id")
]
NAMED = re.compile(r"`(\w+):(\w+)(?:\(([\w, ]+)\))?`")
# Every id of the mixers' list.
IDS = """
    198 274 51 119 219 465 459 444 196 160 174 186 458 70 257 105 460 264 433 183 118 181 211 476
    122 214 410 121 154 407 473 188 197 402 417 20 2 8 31 48 30 124 106 59 68 116 78 25 176 72 189
    511 123 83 133 252 127 156 6 163 142 34 88 149 24 41 108 173 107
"""
KINDS: dict[str, Registry] = {
    "mixer": MIXERS, "position": POSITIONS, "backbone_kind": BACKBONES,
    "transform": TRANSFORMS, "objective": OBJECTIVES,
}  # fmt: skip


def test_every_system_of_the_list_has_a_row() -> None:
    assert set(IDS.split()) <= {row[0] for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_what_a_row_names_exists(row: list[str]) -> None:
    _, _, how, file, state = row
    assert (ROOT / file).is_file(), file
    assert re.match(r"(done|partial: .+|missing)", state), state
    found = NAMED.findall(f"{how} {state}")
    assert found or state == "missing"
    for what, name, settings in found:
        if what in KINDS:
            fields = KINDS[what].get(name).model_fields
            assert set(filter(None, settings.split(", "))) <= set(fields), (name, settings)
        elif what == "preset":
            assert name in presets()
        elif what == "backbone":
            assert yaml_config.read(f"backbone/{name}")["kind"] in BACKBONES
        elif what == "mask":
            assert issubclass(getattr(mm.mask, name), mm.mask.Mask)
        else:
            assert what == "kernel" and __import__(f"mm.kernels.{name}") and name in Op.every
