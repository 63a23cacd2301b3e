"""What a run says at its end: means of the last steps, held-out figures, where the time went."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_toys import folder
from trainer_runs import make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.cli.tokenizer import next_command
from mm.cli.trained import loss_rows, print_trained
from mm.data.pack.job import pack
from mm.trainer.loop import train


def test_means_of_the_last_part_and_seconds_by_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, steps=30, stage_keys={"eval_every": 10})
    out = train(run)
    summary = out["summary"]
    assert summary["steps"] == 3
    last = [row["loss/text"] for row in rows(run)[-3:]]
    assert summary["means"]["loss/text"] == pytest.approx(sum(last) / 3)
    assert summary["held_out"]["val/loss"] == rows(run)[-1]["val/loss"]
    assert out["best"] == [30, rows(run)[-1]["val/loss"]]
    taken = summary["seconds"]
    assert {"start", "stage", "data", "step", "held_out", "save", "report", "export"} <= set(taken)
    assert 0.9 * out["seconds"] < sum(taken.values()) < 1.1 * out["seconds"]
    print_trained("Trained toys", out)
    said = capsys.readouterr().out
    for words in ("last 3 steps", "held-out", "chance", "best held-out loss", "seconds: "):
        assert words in said
    assert "optim/lr" not in said and "data/" not in said
    print_trained("Trained toys", train(run))
    assert "all 30 steps were done before" in capsys.readouterr().out


def test_losses_stand_beside_held_out_ones_and_chance() -> None:
    means = {"loss/text": 1.5, "loss/total": 2.0, "bits_per_byte/text": 0.5}
    held_out = {
        "val/loss": 3.0,
        "val/text/loss": 2.5,
        "val/text/loss_chance": 6.0,
        "val/text/bits_per_byte": 0.75,
        "val/text/bits_per_byte_chance": 4.0,
    }
    assert loss_rows(means, held_out) == [
        ["text", "1.5", "2.5", "6"],
        ["text, bits per byte", "0.5", "0.75", "4"],
        ["total, as weighted", "2", "3", "–"],
    ]


def test_the_next_command_names_a_split_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    found = {}
    for splits in (("train", "test"), ("train", "val"), ("train",)):
        name = "_".join(splits)
        folder(tmp_path / f"raw_{name}", 2, splits=splits)
        pack(tmp_path / f"raw_{name}", tmp_path / name, progress=False)
        found[name] = next_command(out, tmp_path / name)
    assert found["train_test"].endswith(f"--data {tmp_path / 'train_test'}")
    assert found["train_val"].endswith("--split val")
    assert "--val-share" in found["train"] and "next:" not in found["train"]
    words = next_command(out, tmp_path / "train_val", continuous=True)
    assert "mm data pack" in words and "eval" not in words  # it would be refused
