"""`mm launch local --rehearse N`: the run's own steps as rank 0 of N, and nothing left of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from machines import environment, mm, toy_run
from typer.testing import CliRunner

from mm.cli.launch import app
from mm.errors import UserError
from mm.launch import rehearse as child
from mm.launch.launcher import Job
from mm.plan.measured import measure_run

WIDE = ("model.d=256",)  # what the steps keep is much more than what surrounds them


def rehearse(file: Path, processes: int, *words: str) -> tuple[dict, str]:
    """Figures, and what was printed."""
    told = file.parent / "told.json"
    words = ("--rehearse", str(processes), "--json", str(told), *words)
    code, said = mm("launch", "local", str(file), *words, cwd=file.parent)
    assert code == 0, said
    return json.loads(told.read_text()), said


@pytest.mark.slow
def test_a_rehearsal_tells_and_leaves_nothing(tmp_path: Path) -> None:
    file = toy_run(tmp_path, stage=2)
    before = sorted(tmp_path.iterdir())
    found, said = rehearse(file, 4, *WIDE)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "told.json"])
    assert found["processes"] == 4 and found["zero_stage"] == 2 and found["steps"] == 5
    assert found["shapes"] == [{"ids": [2, 12, 1]}], "8 rows over 4 processes"
    assert 0 < found["tokens"] <= 2 * 12 and found["tokens_of_all"] == 4 * found["tokens"]
    held, n = found["cut"], sum(found["parameters"].values())
    assert held["weights"] == {"rank": 4 * n, "whole": 4 * n}
    assert held["optimizer"]["rank"] == pytest.approx(12 * n / 4, rel=0.01)
    assert held["optimizer"]["whole"] == pytest.approx(12 * n, rel=0.01)
    assert found["step_seconds"] > 0 and found["peak_tensor_bytes"] > 4 * n
    assert "rank 0 of 4 over a fake process group" in said and "ZeRO stage 2" in said
    assert "1 of ids 2 x 12 x 1" in said and "losses are not shown" in said
    assert "loss/" not in said


@pytest.mark.slow
def test_a_config_that_the_run_refuses_is_refused_in_a_line(tmp_path: Path) -> None:
    file = toy_run(tmp_path)
    words = ("launch", "local", str(file), "--rehearse", "2", "vocabulary=no.json")
    before = sorted(tmp_path.iterdir())
    code, said = mm(*words, cwd=tmp_path)
    assert (
        code == 2 and said.startswith("mm: no vocabulary at no.json;") and said.count("\n") == 1
    ), said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rehearse", "3"), "stages.0.data.batch_size: 8 rows do not divide over 3 processes"),
        (("--rehearse", "2", "--dry-run"), "--rehearse and --dry-run: say one of them"),
    ],
)
def test_what_needs_no_step_is_refused_before(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(app, ["local", "configs/quickstart/hybrid.yaml", *words])
    assert isinstance(done.exception, UserError) and message in str(done.exception)


def test_a_child_that_dies_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    job = Job("run.yaml", (), "run", tmp_path / "not" / "there" / "run", {}, tmp_path)
    with pytest.raises(RuntimeError, match="run.yaml as rank 0 of 8: exit code 1"):
        child.rehearse(job, 8, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rehearsal_holds_and_sends_what_two_processes_do(stage: int, tmp_path: Path) -> None:
    file = toy_run(tmp_path, stage=stage)
    runs = [measure_run(file, WIDE, tmp_path / "real.json", 2, environment()) for _ in range(3)]
    found, _ = rehearse(file, 2, *WIDE)
    for real in runs:
        assert found["collectives"] == pytest.approx(real["collectives"], rel=0.01)
    # Gloo's threads let go of a bucket when they are scheduled: one real run in ten holds one more.
    assert found["peak_tensor_bytes"] == pytest.approx(min(r["peak_bytes"] for r in runs), rel=0.05)
    assert found["steps_not_applied"] == 0
