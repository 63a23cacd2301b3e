"""`mm faults` at reduced count: every fault that CPU and gloo allow, in real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.cli import main as cli
from mm.errors import UserError
from mm.faults import run as faults
from mm.faults.bench import Bench
from mm.faults.cases import CASES, Case
from mm.faults.compare import differences


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault_is_survived_with_nothing_lost(bench: Bench, case: object) -> None:
    lost = list(case.tries(bench, True))  # type: ignore[attr-defined]
    assert lost and not any(lost), lost


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("pattern", ["attention", "hybrid"])
def test_kill_and_resume_are_bitwise_with_gradient_accumulation(
    bench: Bench, pattern: str, zero: int
) -> None:
    """6 steps = 3 + kill -9 + 3, text and images, two micro-batches, dropout."""
    config = bench.config(bench.fresh("resume"), zero=zero, pattern=pattern, micro=4)
    fault = {"signal": "SIGKILL", "phase": "step", "step": 4}
    assert bench.train(config, faults={"signal": fault}).codes == [-9]
    assert bench.train(config).codes == [0]
    assert differences(bench.whole(config), bench.folder(config)) == ""


@pytest.mark.slow
def test_micro_batches_are_equal_to_rounding_by_modality(bench: Bench) -> None:
    """1x8 = 2x4 = 8x1: the losses of text and of images, each."""
    model = bench.config("")["model"]
    model["backbone"]["block"]["dropout"] = 0.0  # noise is drawn by micro-batch
    whole = bench.whole(bench.config("", model=model))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/text", "loss/image"} <= rows[0].keys()
    for micro in (4, 1):
        config = bench.config(bench.fresh("micro"), micro=micro, model=model)
        assert bench.train(config).codes == [0]
        assert differences(whole, bench.folder(config), rel=1e-5) == ""


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written after each fault; with --resume the faults that have one are left out."""
    tried: list[str] = []

    def cut(bench: Bench, quick: bool) -> Iterator[str]:
        tried.append("two")
        if len(tried) == 2:
            raise SystemExit(75)
        yield "something"

    def one(bench: Bench, quick: bool) -> Iterator[str]:
        tried.append("one")
        yield ""

    monkeypatch.setattr(faults, "CASES", (Case("one", "fine", one), Case("two", "fine", cut)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which a bench sets
    file = tmp_path / "rows.json"
    command = ["faults", "--json", str(file), "--resume"]
    assert cli.run(command) == 75
    assert [row["fault"] for row in json.loads(file.read_text())] == ["one"]
    assert cli.run([*command, "--write", str(tmp_path / "page.md")]) == 1  # one was not survived
    assert tried == ["one", "two", "two"]
    rows = json.loads(file.read_text())
    assert [(row["survived"], row["lost"]) for row in rows] == [(1, "nothing"), (0, "something")]
    assert "| two | fine | 1 | 0 | something |" in (tmp_path / "page.md").read_text()
    with pytest.raises(UserError, match="was written with all tries"):
        faults.read(file, quick=True)
    file.write_text("{}")
    assert faults.read(tmp_path / "none", quick=True) == []


def test_what_others_wrote_on_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    assert faults.beside(page) == ""
    page.write_text(f"# old\n{faults.DAMAGED}\n\nby hand\n")
    assert faults.beside(page) == f"{faults.DAMAGED}\n\nby hand\n"
    assert faults.DAMAGED in (Path(__file__).parents[2] / "docs/reliability.md").read_text()


def test_the_page_is_made_of_the_rows_and_an_unknown_fault_is_named() -> None:
    row = {"fault": "a | b", "outcome": "c", "tries": 2, "survived": 1, "lost": "x | y"}
    page = faults.markdown([row | {"seconds": 1.0}], quick=True)
    assert "1 of 2 tries survived; not: a | b." in page and "reduced count" in page
    assert (
        "torch " in page
        and "mm faults --quick --write docs/reliability.md" in page
        and "| 2 | 1 | x / y |" in page
    )
    with pytest.raises(UserError, match="no fault 'flod'"):
        faults.select_cases(["flod"])
    assert [c.name for c in faults.select_cases(["soak"])] == [CASES[-1].name]
    assert "faults" in cli.COMMANDS
