"""docs/mixers.md against the registries, the presets, the files, and the papers that they cite."""

from __future__ import annotations

import re

import pytest
from laws import ROOT

import mm.mask
from mm import config as yaml_config
from mm.kernels.op import Op
from mm.model.backbones.stack import presets
from mm.plug_point import Registry
from mm.registry import BACKBONES, MIXERS, OBJECTIVES, POSITIONS, TRANSFORMS

TEXT = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")
HEADER = "| name | how | file | state | paper |"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and line != HEADER
]
NAMED = re.compile(r"`(\w+):(\w+)(?:\(([\w, ]+)\))?`")
KINDS: dict[str, Registry] = {
    "mixer": MIXERS, "position": POSITIONS, "backbone_kind": BACKBONES,
    "transform": TRANSFORMS, "objective": OBJECTIVES,
}  # fmt: skip
BACKBONE_FILES = sorted(p.stem for p in (ROOT / "configs" / "backbone").glob("*.yaml"))


def named(what: str) -> set[str]:
    return {name for row in ROWS for found, name, _ in NAMED.findall(row[1]) if found == what}


@pytest.mark.parametrize(
    ("what", "exist"),
    [
        ("mixer", list(MIXERS)),
        ("position", list(POSITIONS)),
        ("backbone_kind", list(BACKBONES)),
        ("preset", presets()),
        ("backbone", BACKBONE_FILES),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_page_names_what_exists_and_all_of_it(what: str, exist: list[str]) -> None:
    assert named(what) == set(exist)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_a_row_names_exists(row: list[str]) -> None:
    _, how, files, state, papers = row
    texts = []
    for file in files.split(", "):
        assert (ROOT / file).is_file(), file
        texts.append((ROOT / file).read_text(encoding="utf-8"))
    assert re.match(r"(done|partial: .+)", state), state
    found = NAMED.findall(f"{how} {state}")
    assert found
    for what, name, settings in found:
        if what in KINDS:
            fields = KINDS[what].get(name).model_fields
            assert set(filter(None, settings.split(", "))) <= set(fields), (name, settings)
        elif what in ("preset", "backbone"):
            folder = {"preset": "mixer", "backbone": "backbone"}[what]
            kind = yaml_config.read(f"{folder}/{name}")["kind"]
            assert kind in (MIXERS if what == "preset" else BACKBONES)
            texts.append((ROOT / "configs" / folder / f"{name}.yaml").read_text(encoding="utf-8"))
        elif what == "mask":
            assert issubclass(getattr(mm.mask, name), mm.mask.Mask)
        else:
            assert what == "kernel" and __import__(f"mm.kernels.{name}") and name in Op.every
    cited = " ".join(texts)
    for paper in papers.split(", "):
        assert paper == "-" or re.search(rf"arXiv:{paper}(v\d)?\b", cited), (
            f"arXiv:{paper} is cited neither in {files} nor in the presets of the row"
        )
