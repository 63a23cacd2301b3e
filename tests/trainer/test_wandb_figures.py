"""What the W&B mirror makes of tasks' figures: a confusion plot, and the summary of `mm eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_wandb import HELPERS, records
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import trainer_toys
from trainer_runs import make_run
trainer_toys.register()
from mm.cli.eval import mirror_to_tracker
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.log.tracker import Tracker

run = make_run(Path(sys.argv[1]))
run.folder.mkdir()
tracker = Tracker.start(run, run.folder, {"precision": "fp32"})
asked = {"t_confusion": [[3, 1, 0], [0, 2, 1]], "t_classes": ["cat", "dog"], "t_accuracy": 0.7}
tracker.log({f"eval/t/{k}": v for k, v in asked.items()}, 2)
tracker.finish()
snapshot = checkpoint.Snapshot({"step": 2, "tracker": tracker.id}, {})
checkpoint.save(run.folder / "checkpoints", snapshot, 1)
time.sleep(1.1)  # wandb names its folders by the second
mirror_to_tracker(run, run.folder, {"t": {"x_accuracy": 0.75, "x_classes": ["cat"]}})
"""


@pytest.mark.slow  # wandb starts twice
def test_a_confusion_is_a_plot_and_eval_sets_the_summary(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}  # no key anywhere
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(HELPERS)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "tracking is off" not in done.stderr, done.stderr[-3000:]
    folder = make_run(tmp_path).folder / "wandb"
    trained, evaluated = sorted(folder.glob("offline-run-*/run-*.wandb"))
    assert trained.name == evaluated.name  # one run: its id
    history = {
        item.key or ".".join(item.nested_key): item.value_json
        for record in records(trained)
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    assert json.loads(history["eval/t/t_accuracy"]) == 0.7
    (table,) = {k.rpartition(".")[0] for k in history if "t_confusion" in k}
    path = json.loads(history[f"{table}.path"])
    counted = json.loads((trained.parent / "files" / path).read_text())["data"]
    assert ["dog", "(none)", 1] in counted and ["cat", "cat", 3] in counted
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records(evaluated)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["eval/t/x_accuracy"] == 0.75 and "eval/t/x_classes" not in summary
    configs = [record.run.config.update for record in records(evaluated) if record.run.run_id]
    assert not any(item.key == "environment" for config in configs for item in config)
