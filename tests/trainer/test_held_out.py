"""Held-out loss while training: it moves no bit, is one figure whatever the ranks, and comes back.

Real engines on the toys, and real streams for what stands beside the figures.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from data_toys import folder, token_shards
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.data.pack.job import pack
from mm.run import Run
from mm.trainer.loop import train


def held_out(run: Run) -> dict[int, dict[str, float]]:
    """The ``val/`` figures by step."""
    found = {r["step"]: {k: v for k, v in r.items() if k.startswith("val/")} for r in rows(run)}
    return {step: figures for step, figures in found.items() if figures}


EVERY_STEP = {"eval_every": 1, "eval_batches": 2}


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (0, {"model": {"dropout": 0.2}}),
        (2, {"model": {"dropout": 0.2}, "engine": {"precision": "autocast_bf16"}}),
        pytest.param(3, {"model": {"dropout": 0.2}}, marks=pytest.mark.slow),
        (1, {"objective": "toy_gan"}),
        (1, {"objective": "toy_teacher", "stage_keys": {"ema": {"decay": 0.9}}}),
    ],
    ids=["zero0", "zero2", "zero3", "two networks", "averages"],
)
def test_it_moves_no_bit_of_the_training(tmp_path: Path, stage: int, change: Any) -> None:
    """Weights, optimizer and EMA states, codebook statistics, losses: with and without it."""
    keys = change.pop("stage_keys", {}) if "stage_keys" in change else {}
    without = make_run(tmp_path, "without", stage=stage, **change, stage_keys=keys)
    measured = make_run(tmp_path, "measured", stage=stage, **change, stage_keys=keys | EVERY_STEP)
    for run in (without, measured):
        train(run)
    assert list(held_out(measured)) == [1, 2, 3, 4, 5, 6] and not held_out(without)
    assert losses(without) == losses(measured)
    files = sorted((without.folder / "checkpoints" / "step_000006").glob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        a = toys.load_file(str(file))
        b = toys.load_file(str(measured.folder / "checkpoints" / "step_000006" / file.name))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), (file.name, key)


def test_figures_by_modality_beside_chance(tmp_path: Path) -> None:
    run = make_run(tmp_path, stage_keys={"eval_every": 3})
    train(run)
    assert list(held_out(run)) == [3, 6]
    last = held_out(run)[6]
    # every code of the toy's rows is one of 20 or 12 and a row has no begin: `end` is a choice, too
    assert last["val/text/loss_chance"] == pytest.approx(math.log(21))
    assert last["val/image/loss_chance"] == pytest.approx(math.log(13))
    bits = last["val/text/loss"] / math.log(2) / 2.0  # bytes a token: the stream's own ratio
    assert last["val/text/bits_per_byte"] == pytest.approx(bits)
    assert last["val/text/bits_per_byte_chance"] == pytest.approx(math.log2(21) / 2)
    low, high = sorted((last["val/text/loss"], last["val/image/loss"]))
    assert low < last["val/loss"] < high
    assert last["val/loss"] < held_out(run)[3]["val/loss"]


def test_default_is_about_twenty_times_and_cheap(tmp_path: Path) -> None:
    stage = make_run(tmp_path, steps=1000).stages[0]
    default = stage.model_copy(update={"eval_every": None})
    assert default.held_out_every == 50 and default.held_out_batches == 5
    short = default.model_copy(update={"budget": default.budget.model_copy(update={"steps": 7})})
    assert short.held_out_every == 10 and short.held_out_batches == 1  # at the end alone


def test_a_resume_and_a_return_to_a_checkpoint_leave_each_row_once(tmp_path: Path) -> None:
    whole = make_run(tmp_path, "whole", stage_keys=EVERY_STEP)
    train(whole)
    halves = make_run(tmp_path, "halves", data={"signal_at": 3}, stage_keys=EVERY_STEP)
    with pytest.raises(SystemExit):
        train(halves)
    train(halves)
    assert held_out(halves) == held_out(whole)
    back = make_run(tmp_path, "back", data={"spikes": (4,)}, model={"spike_at": 17},
                    engine={"max_skips": 0}, stage_keys=EVERY_STEP)  # fmt: skip
    train(back)
    assert "rollback" in (back.folder / "events.jsonl").read_text()
    assert [row["step"] for row in rows(back)] == [1, 2, 3, 4, 5, 6]
    assert list(held_out(back)) == [1, 2, 3, 4, 5, 6]


def test_without_a_split_one_line_says_how_to_make_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys.ToyStreamConfig, "held_out", lambda self, split: None)
    caplog.set_level("INFO", "mm.trainer")
    run = make_run(tmp_path, steps=2, stage_keys={"eval_every": None})
    train(run)
    said = [r.getMessage() for r in caplog.records if "held-out" in r.getMessage()]
    assert len(said) == 1 and "--val-share" in said[0]
    assert not held_out(run)


def test_a_tokenizer_gives_its_reconstruction_loss(tmp_path: Path) -> None:
    """Without augmentation or codebook dropout, and the EMA codebook is as without it."""
    folder(tmp_path / "raw", 12, splits=("train", "val"))
    pack(tmp_path / "raw", tmp_path / "shards", progress=False)
    made = {}
    for every in (0, 2):
        run = Run.model_validate(
            {
                "name": f"every{every}",
                "out": tmp_path,
                "model": {
                    "kind": "image_vq",
                    "size": 8,
                    "down": [2],
                    "widths": [8],
                    "blocks": [1],
                    "quantizer": {"kind": "vq", "codebook_size": 8},
                },
                "stages": [
                    {
                        "data": {
                            "kind": "items",
                            "path": tmp_path / "shards",
                            "size": 8,
                            "batch_size": 8,
                            "augment": {"shift": 0.2},
                        },
                        "objective": {"kind": "vq", "bypass_steps": 2},
                        "budget": {"steps": 6},
                        "eval_every": every,
                        "eval_batches": 9,
                    }
                ],
                "engine": {"precision": "fp32"},
            }
        )
        train(run)
        made[every] = run
    assert losses(made[0]) == losses(made[2])
    a, b = (toys.load_file(str(r.folder / "model" / "model.safetensors")) for r in made.values())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert list(held_out(made[2])) == [2, 4, 6]
    for figures in held_out(made[2]).values():
        assert set(figures) == {"val/loss", "val/reconstruction/loss"}
        assert figures["val/loss"] == figures["val/reconstruction/loss"] > 0


def test_a_split_that_gives_nothing_is_said_and_the_run_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_shards(tmp_path, 24, val_share=0.3)
    caplog.set_level("INFO", "mm.trainer")
    data = {
        "kind": "packed",
        "sources": [{"path": tmp_path / "tokens"}],
        "seq_len": 8,  # all that the split has is longer
        "batch_size": 4,
    }
    allowed = {"allow_left_out": 1.0, "allow_empty": ["image", "audio"]}
    stage_keys = {"eval_every": 1, "data": data, **allowed}
    run = make_run(tmp_path, steps=2, stage_keys=stage_keys)
    run = run.model_copy(update={"vocabulary": tmp_path / "tokens" / "vocabulary.json"})
    train(run)
    said = [r.getMessage() for r in caplog.records if "held-out" in r.getMessage()]
    assert len(said) == 1 and "8192 longer than seq_len 8" in said[0]
    assert len(losses(run)) == 2
