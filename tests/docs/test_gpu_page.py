"""docs/how-to/gpu.md against the code: ops, mixers of many launches, predictions."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from laws import ROOT

pytest.importorskip("triton")

from mm.kernels.op import Op
from mm.plan.fake_card import fake_card
from mm.plan.fake_cuda import fake_cuda

MIXERS = (ROOT / "docs" / "mixers.md").read_text(encoding="utf-8")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_page  # pyright: ignore[reportMissingImports]

    gpu_page.import_kernels()
    return gpu_page


def rows(page: ModuleType, name: str) -> list[list[str]]:
    """Cells of a table of the page, without its head."""
    found = page.block(name).search(page.PAGE.read_text(encoding="utf-8"))
    assert found, f"no table {name}"
    return [line.strip("| ").split(" | ") for line in found[2].splitlines()[2:]]


def test_the_table_of_ops_says_what_is_chosen(page: ModuleType) -> None:
    """Every op of mm.kernels; what it picks, takes and refuses, without its launches."""
    ours = {name for name, op in Op.every.items() if op.__module__.startswith("mm.kernels.")}
    assert {op for op, _ in page.calls().values()} == ours
    found = {}
    with fake_cuda(), fake_card():
        for name, (op, call) in page.calls().items():
            taken, dtypes, refused, other = page.choice(Op.every[op], call)
            found[name] = [f"`{taken}`", dtypes, refused, f"`{other}`" if other else "–"]
    said = {r[0]: [r[1], r[3], r[5], r[6].partition(":")[0]] for r in rows(page, "ops")}
    assert said == found


def test_mixers_of_many_launches_are_marked(page: ModuleType) -> None:
    listed = {row[0].strip("`") for row in rows(page, "mixers")} - {"not counted"}
    marked = [
        set(re.findall(r"`(?:mixer|preset):(\w+)", line))
        for line in MIXERS.splitlines()
        if line.startswith("| ") and "small scale only" in line
    ]
    assert listed <= set().union(*marked)
    assert all(row & listed for row in marked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ops", "mixers"])
def test_the_tables_are_what_their_command_writes(page: ModuleType, name: str) -> None:
    made = [line.strip("| ").split(" | ") for line in page.TABLES[name]()[2:]]
    assert made == rows(page, name)


@pytest.mark.slow
def test_predictions_are_what_their_command_writes(page: ModuleType) -> None:
    """Of the first model, which takes half a minute; all take five."""
    from gpu_predictions import CARDS, MODELS  # pyright: ignore[reportMissingImports]
    from gpu_predictions import rows as made_rows  # pyright: ignore[reportMissingImports]

    made = list(map(list, made_rows(list(MODELS)[:1], CARDS)))
    assert made and made == rows(page, "predictions")[: len(made)]
