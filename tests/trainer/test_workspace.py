"""The view of W&B: its panels draw what a run writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import start_toys

from mm.cli import main
from mm.run import Run
from mm.trainer.log import metrics, workspace
from mm.trainer.loop import train

# Written by other machines or runs than the one below.
ELSEWHERE = {"perf/mfu", "ranks/slowest_seconds", "eval/.*", "samples", "layers/.*/load_max"}
ELSEWHERE |= {"codebook.*/usage", "codebook.*/dead_codes", "targets/.*_wanted"}


def test_every_panel_draws_something_that_a_run_writes(tmp_path: Path) -> None:
    root = start_toys.packed(tmp_path)
    callbacks = [{"kind": "layers", "every": 1}]
    stage = {"eval_every": 1}
    values = start_toys.values(root, tmp_path, steps=2, callbacks=callbacks, stage=stage)
    values["model"]["backbone"]["pattern"] = "attention gated_deltanet"
    run = Run.model_validate(values | {"model": values["model"]})
    train(run)
    written = {k for row in metrics.read(run.folder / "metrics.jsonl") for k in row}
    for title, panels in workspace.SECTIONS.items():
        for label, keys in panels:
            if ELSEWHERE & set(keys):
                continue
            found = any(re.fullmatch(key, name) for key in keys for name in written)
            assert found, f"{title}: {label}: {keys}"


def test_the_view_is_made_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    made = workspace.make_workspace("me", "mm", "view")
    assert [s.name for s in made.sections] == list(workspace.SECTIONS)
    first = made.sections[0].panels
    assert [p.title for p in first] == [label for label, _ in workspace.SECTIONS["Is it sick"]]
    assert made.sections[1].panels[0].metric_regex == "loss/.*"


def test_the_command_names_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["wandb", "panels"]) == 0
    assert "held-out loss: val/loss" in capsys.readouterr().out
    assert main.run(["wandb", "workspace", "configs/quickstart/backbone.yaml"]) == 2
    assert "--entity NAME" in capsys.readouterr().err
