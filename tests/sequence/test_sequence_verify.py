"""`mm verify` of runs whose processes share rows: agrees where it is right, finds what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_sequence_training import run_of
from trainer_toys import toys_registered  # noqa: F401

from mm import config as configs
from mm.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def verified(tmp_path: Path, *words: str, **change: Any) -> tuple[int, Any]:
    """Exit code and JSON of the command on the toy data's hybrid."""
    imports = ("trainer_toys", *change.pop("imports", ()))
    run = run_of(tmp_path, "run", **change).model_copy(update={"imports": imports})
    file, out = tmp_path / "run.yaml", tmp_path / "out.json"
    file.write_text(configs.dump(run))
    code = main.run(["verify", str(file), *words, "--json", str(out)])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("stage", range(4))
def test_groups_of_two_among_four_agree(stage: int, tmp_path: Path) -> None:
    """Losses, gradients, updates, rows, and a resume bit by bit."""
    code, told = verified(tmp_path, "--processes", "4", stage=stage)
    assert code == 0 and told["agrees"], told


def test_recomputation_agrees(tmp_path: Path) -> None:
    words = ("model.backbone.recompute=full",)
    code, told = verified(tmp_path, "--processes", "2", *words, stage=3)
    assert code == 0 and told["agrees"], told


def test_bf16_agrees(tmp_path: Path) -> None:
    """Of attention and a scan: rounding in a delta rule of this width is over what is allowed."""
    words = ("model.backbone.pattern=attention rg_lru", "engine.precision=bf16")
    code, told = verified(tmp_path, "--processes", "2", *words, stage=2)
    assert code == 0 and told["agrees"], told


def test_states_that_begin_anew_are_found(tmp_path: Path) -> None:
    code, told = verified(tmp_path, "--processes", "2", imports=("sequence_faults",))
    failed = {c["name"]: c["found"] for c in told["checks"] if not c["agrees"]}
    assert code == 2 and "gradient of every parameter" in failed
    assert "rows of data" not in failed and "save and resume" not in failed
