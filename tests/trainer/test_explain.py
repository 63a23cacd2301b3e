"""`mm explain`: the step that it shows is the step that was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import start_toys
from trainer_runs import make_run as toy_run
from trainer_runs import rows
from trainer_toys import toys_registered  # noqa: F401

from mm.cli import main
from mm.errors import UserError
from mm.report import build_report
from mm.run import Run
from mm.trainer.explain import explain
from mm.trainer.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight steps on captioned pictures, with checkpoints of steps 3, 6 and 8."""
    root = start_toys.packed(tmp_path_factory.mktemp("explain"))
    kept = {"every": 3, "keep_last": 9}
    made = start_toys.make_run(root, root / "runs", steps=8, checkpoints=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(made)
    return Run.load(made.folder / "config.yaml")


@pytest.mark.parametrize(("step", "begun"), [(2, 0), (5, 3), (6, 3), (8, 3)])
def test_a_step_is_replayed_bit_by_bit_from_any_place(run: Run, step: int, begun: int) -> None:
    before = {p: p.read_bytes() for p in run.folder.glob("*.*") if p.is_file()}
    told = explain(run, step)
    assert told["same_bits"] and told["loss_now"] == rows(run)[step - 1]["loss/total"]
    assert told["from_step"] == begun
    assert before == {p: p.read_bytes() for p in run.folder.glob("*.*") if p.is_file()}
    left = {p.name for p in (run.folder / "explain" / f"step_{step:06d}").iterdir()}
    assert "replay" not in left and "explain.json" in left
    assert sorted(p.name for p in (run.folder / "checkpoints").glob("step_*")) == [
        "step_000003",
        "step_000006",
        "step_000008",
    ]


def test_costs_and_gradients_add_up_to_those_of_the_step(run: Run) -> None:
    told = explain(run, 5)
    row = rows(run)[4]
    total = sum(cost["sum"] for cost in told["samples"])
    mean = total / sum(cost["targets"] for cost in told["samples"])
    assert mean == pytest.approx(row["loss/total"], rel=1e-5)
    for name in ("text", "image"):
        each = [c["by_modality"][name] for c in told["samples"] if name in c["by_modality"]]
        mean = sum(e["loss"] * e["targets"] for e in each) / sum(e["targets"] for e in each)
        assert mean == pytest.approx(row[f"loss/{name}"], rel=1e-5)
    norm = math.hypot(*(layer["step"] for layer in told["gradient"].values()))
    assert norm == pytest.approx(row["optim/grad_norm"], rel=1e-4)
    assert [c["loss"] for c in told["samples"]] == sorted(
        (c["loss"] for c in told["samples"]), reverse=True
    )
    assert set(told["losses"]) == {"4", "5", "6", "7"}  # it and those beside it


def test_samples_are_decoded_for_the_eye_and_in_the_report(run: Run) -> None:
    told = explain(run, 5)
    place = run.folder / "explain" / "step_000005"
    parts = [part for cost in told["samples"] for part in cost.get("parts", ())]
    words = [part["text"] for part in parts if "text" in part]
    assert words and all(text.startswith(("a cat", "a dog")) for text in words)
    pictures = [part["file"] for part in parts if "file" in part]
    assert pictures and all((place / name).suffix == ".png" for name in pictures)
    page = build_report(run.folder).read_text()
    assert "Replayed from step 3, bit by bit as it was" in page
    assert 'id="lineage"' in page and "tokens-tokens" in page and "Seconds of its parts" in page
    assert told["samples"][0]["key"] in page and words[0][:20] in page


def test_the_command(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    assert main.run(["explain", str(run.folder), "--step", "6", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "bit by bit as it was" in said and "greatest change first" in said
    assert json.loads(out.read_text())["step"] == 6
    assert main.run(["explain", str(run.folder), "--step", "9"]) == 2
    assert "has no step 9; it has done 8 steps" in capsys.readouterr().err


def test_the_sample_that_broke_a_step_is_the_first(tmp_path: Path) -> None:
    """A toy whose loss is infinite where one id stands; it has no tokenizer to decode with."""
    run = toy_run(tmp_path, data={"spikes": (3,)}, model={"spike_at": 17})
    train(run)
    with pytest.raises(UserError, match="no step 7"):
        explain(run, 7)
    assert explain(run, 4)["loss_now"] is None
