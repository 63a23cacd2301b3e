"""Signals to a run: save, exit 75, and go on there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import trainer_toys as toys
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.decoders.generate import Generator
from mm.faults.inject import AtPhase
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import INTERRUPTED, Trainer, train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("phase", ["data", "step", "save", "report", "held_out"])
def test_a_signal_in_every_phase_saves_and_exits_75(
    tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    keys = {"eval_every": 2}
    run = make_run(tmp_path, steps=6, checkpoints={"every": 2}, stage_keys=keys)
    fault = AtPhase({"phase": phase, "step": 2}, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        Trainer(run, [fault]).fit()
    assert stopped.value.code == INTERRUPTED and fault.done
    at = checkpoint.newest(run.folder / "checkpoints").state["step"]
    assert at == len(rows(run)) and 2 <= at <= 3
    assert train(run)["resumed_from"] == at
    whole = make_run(tmp_path, "whole", stage_keys=keys)
    train(whole)
    assert losses(run) == losses(whole)
    assert losses(run, "val/loss") == losses(whole, "val/loss")


@pytest.mark.parametrize("phase", ["start", "stage"])
def test_a_signal_at_the_start_exits_75_at_once(tmp_path: Path, phase: str) -> None:
    """While the run is opened, or networks are built and data indexed: no step is taken."""
    run = make_run(tmp_path, steps=4, checkpoints={"every": 2})
    for steps in (0, 2):
        fired: list[int] = []

        def act(fired: list[int] = fired) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            fired.append(1)

        with pytest.raises(SystemExit) as stopped:
            Trainer(run, [AtPhase({"phase": phase}, act)]).fit()
        assert stopped.value.code == INTERRUPTED and not fired
        if steps == 0:
            assert not (run.folder / "metrics.jsonl").is_file() or not rows(run)
            train(make_run(tmp_path, steps=2, checkpoints={"every": 2}))
    assert train(run)["resumed_from"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_is_a_trainer_exits_75(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm.cli import main as cli

    (tmp_path / "early_signal.py").write_text(
        f"import os\nos.kill(os.getpid(), {int(number)})\nraise RuntimeError('went on')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text("name: early\nimports: [early_signal]\nmodel: {kind: toy_lm}\nstages: []\n")
    before = signal.getsignal(number)
    assert cli.run(["train", str(config)]) == INTERRUPTED
    assert signal.getsignal(number) == before


def test_a_signal_in_the_evaluation_leaves_it_and_the_next_start_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(Generator, "from_pretrained", toys.load_saved)
    monkeypatch.setattr(toys.ToyTaskConfig, "act", wait)
    run = make_run(tmp_path, steps=2, stage_keys={"tasks": ["toy_task"]})
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train(run)
    assert stopped.value.code == INTERRUPTED and time.monotonic() - begun < 20
    monkeypatch.setattr(toys.ToyTaskConfig, "act", None)
    out = train(run)
    assert out["new_steps"] == 0 and out["eval/toy_task_toys/chance"] == 0.5
    assert "eval/toy_task_toys/chance" not in train(run)  # now there is nothing to do
