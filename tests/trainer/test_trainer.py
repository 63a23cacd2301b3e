"""The trainer in one process: resume, skips, stops, refusals.

Real engines on tiny networks (tests/trainer_toys.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from thinned import only
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.registry import NETWORKS
from mm.run import GuardConfig, Run
from mm.specs import TokenSpec
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.folder import require_space
from mm.trainer.folder import lock
from mm.trainer.loop import INTERRUPTED, Trainer, train

# Each stage once, and stage 3, which cuts the weights, in both kinds of precision.
BY_DEFAULT = ((0, "fp32"), (1, "autocast_bf16"), (2, "bf16"), (3, "autocast_bf16"))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(s, p, marks=() if (s, p) in BY_DEFAULT else pytest.mark.slow)
        for s in range(4)
        for p in ("fp32", "autocast_bf16", "bf16")
    ],
)
def test_resume_is_bit_exact(tmp_path: Path, stage: int, precision: str) -> None:
    """Train 6 = train 3 + resume 3.

    Losses, weights, optimizer states and EMA buffers, with dropout.
    """
    linear = torch.nn.functional.linear
    change: dict[str, Any] = {
        "stage": stage,
        "model": {"dropout": 0.1},
        "engine": {"precision": precision},
    }
    whole = make_run(tmp_path, "whole", **change)
    train(whole)
    halves = make_run(tmp_path, "halves", data={"signal_at": 2}, **change)
    with pytest.raises(SystemExit) as stopped:
        train(halves)
    assert stopped.value.code == INTERRUPTED
    assert [row["step"] for row in rows(halves)] == [1, 2, 3]
    again = train(halves)
    assert again["resumed_from"] == 3 and again["new_steps"] == 3
    assert losses(whole) == losses(halves)
    read, total = [row["tokens/seen"] for row in rows(whole)], 0
    assert [row["tokens/seen"] for row in rows(halves)] == read
    for row, seen in zip(rows(whole), read, strict=True):
        total += round(row["perf/tokens_per_second"] * row["perf/step_seconds"])
        assert seen == total > 0
    for kind in ("model", "model.optimizer"):
        a, b = (
            toys.load_file(str(r.folder / "checkpoints" / "step_000006" / f"{kind}.safetensors"))
            for r in (whole, halves)
        )
        assert a.keys() == b.keys() and len(a) > 5
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert toys.load_toy(whole.folder)["seen"].sum() > 0
    assert torch.nn.functional.linear is linear  # DeepSpeed puts its own there at stage 3


def test_run_folder_and_metric_names(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = train(run)
    assert summary["step"] == 6
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "start.json",
        "checkpoints/latest",
        "model/config.json",
    ):
        assert (run.folder / name).is_file(), name
    row = rows(run)[-1]
    wanted = {
        "step",
        "loss/total",
        "loss/text",
        "loss/image",
        "tokens/text_share",
        "tokens/image_share",
        "bits_per_byte/text",
        "optim/lr",
        "optim/grad_norm",
        "perf/tokens_per_second",
        "perf/step_seconds",
        "data/wait_seconds",
        "codebook/usage",
        "codebook/perplexity",
        "skipped",
    }
    assert wanted <= row.keys()
    assert all(0 <= r["data/wait_seconds"] <= r["perf/step_seconds"] for r in rows(run))
    assert sum(r["perf/step_seconds"] for r in rows(run)) <= summary["seconds"]
    assert row["tokens/text_share"] + row["tokens/image_share"] == pytest.approx(1)
    assert row["bits_per_byte/text"] == pytest.approx(row["loss/text"] / 0.693147 / 2.0, rel=1e-4)
    assert losses(run)[-1] < losses(run)[0]
    described = json.loads((run.folder / "environment.json").read_text())
    assert described["precision"] == "fp32" and "torch" in described["packages"]
    assert Run.load(run.folder / "config.yaml").to_dict() == run.to_dict()


def test_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    train(make_run(tmp_path))
    again = train(make_run(tmp_path))
    assert again["new_steps"] == 0 and len(rows(make_run(tmp_path))) == 6
    longer = train(make_run(tmp_path, steps=8))
    assert longer["resumed_from"] == 6 and longer["new_steps"] == 2
    assert [row["step"] for row in rows(make_run(tmp_path))] == list(range(1, 9))


def test_refuses_another_model_and_another_vocabulary(tmp_path: Path) -> None:
    train(make_run(tmp_path, steps=3))
    with pytest.raises(UserError, match=r"'model\.d' was 16 and is 8"):
        train(make_run(tmp_path, model={"d": 8}))
    run = make_run(tmp_path)
    toys.vocabulary().add(TokenSpec("audio", 5, fingerprint="a")).save(tmp_path / "vocabulary.json")
    with pytest.raises(UserError, match="was trained with vocabulary"):
        train(run)


def test_changed_settings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(make_run(tmp_path, steps=3))
    with caplog.at_level("INFO", "mm.trainer"):
        train(make_run(tmp_path, steps=4, engine={"grad_clip": 0.5}))
    assert "engine.grad_clip: 1.0 -> 0.5" in caplog.text
    assert "resumed" in caplog.text


def test_a_key_that_the_program_learnt_since_the_save_is_no_change(tmp_path: Path) -> None:
    train(make_run(tmp_path, steps=2))
    run = make_run(tmp_path, steps=3)
    saved = checkpoint.newest(run.folder / "checkpoints")
    assert saved is not None
    again = lambda state: checkpoint.Saved(saved.folder, state)
    older = {**saved.state["config"], "model": dict(saved.state["config"]["model"])}
    del older["evaluate"], older["model"]["kind"]
    with pytest.raises(
        UserError, match="model.kind"
    ):  # without its kind it cannot be read: refused
        again({**saved.state, "config": older}).require(run.to_dict(), saved.state["vocabulary"])
    older["model"]["kind"] = run.model.kind
    extra = next(
        k for k, f in type(run.model).model_fields.items() if k != "kind" and not f.is_required()
    )
    older["model"].pop(extra)
    again({**saved.state, "config": older}).require(run.to_dict(), saved.state["vocabulary"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_step_is_skipped_at_every_stage(tmp_path: Path, stage: int) -> None:
    """One bad step changes nothing but the count.

    The weights stay finite and the samples are written out.
    """
    run = make_run(
        tmp_path,
        stage=stage,
        data={"spikes": (2,)},
        model={"spike_at": 17},
        checkpoints={"every": 1, "keep_last": 9},
    )
    train(run)
    row = rows(run)[2]
    assert row["skipped"] == 1 and row["loss/total"] is None and rows(run)[-1]["skipped"] == 1
    before, after = (
        toys.load_file(str(run.folder / f"checkpoints/step_00000{s}/model.safetensors"))
        for s in (2, 3)
    )
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(t.isfinite().all() for t in toys.load_toy(run.folder).values())
    bad = json.loads((run.folder / "skipped.jsonl").read_text())
    assert bad["step"] == 2 and "row0" in bad["keys"]


def test_too_many_skips_stop_the_run(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, data={"spikes": (3, 4)}, model={"spike_at": 17}, engine={"max_skips": 1}
    )
    run = run.model_copy(update={"guard": GuardConfig(max_rollbacks=0)})
    with pytest.raises(UserError, match="2 of the last 100 steps were not finite"):
        train(run)
    assert checkpoint.newest(run.folder / "checkpoints").state["step"] == 3  # the last good one


def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    train(run)
    root = run.folder / "checkpoints"
    file = root / "step_000006" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (root / "step_000009").mkdir()  # a save that was killed
    saved = checkpoint.newest(root)
    assert saved is not None and saved.state["step"] == 3
    assert "does not match its SHA-256" in caplog.text and "did not finish" in caplog.text
    assert train(make_run(tmp_path, steps=7))["resumed_from"] == 3
    assert [row["step"] for row in rows(run)] == list(
        range(1, 8)
    )  # lines after the checkpoint were cut


def test_keeps_the_last_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoints={"every": 1, "keep_last": 2})
    train(run)
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir() if p.is_dir()) == [
        "step_000005",
        "step_000006",
    ]
    assert (run.folder / "checkpoints" / "latest").read_text() == "step_000006"


def test_no_room_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MiB free"):
        require_space(tmp_path, 2**62)


def test_one_process_a_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with lock(run.folder), pytest.raises(UserError, match="trains here already"):
        train(run)


@pytest.mark.parametrize("stage", only([0, 1, 2, 3], 1))
def test_an_objective_with_two_networks(tmp_path: Path, stage: int) -> None:
    """Generator and critic, two micro-batches, a frozen block.

    The same losses at every stage, and resumable.
    """
    run = make_run(tmp_path, stage=stage, objective="toy_gan", data={"micro": 4})
    train(run)
    reference = make_run(tmp_path, "reference", stage=0, objective="toy_gan", data={"micro": 8})
    train(reference)
    for name in ("loss/nll", "loss/critic", "loss/fool"):
        a, b = ([row[name] for row in rows(r)] for r in (run, reference))
        assert a == pytest.approx(b, rel=2e-5), name
    saved = checkpoint.newest(run.folder / "checkpoints")
    assert saved.tensors("critic") and saved.optimizer("critic")
    assert (
        train(make_run(tmp_path, stage=stage, objective="toy_gan", data={"micro": 4}, steps=7))[
            "new_steps"
        ]
        == 1
    )


def test_stages_hand_the_weights_on(tmp_path: Path) -> None:
    one = make_run(tmp_path, steps=3)
    two = one.model_copy(update={"stages": (one.stages[0], one.stages[0]), "name": "two"})
    train(one)
    train(two)
    assert [row["step"] for row in rows(two)] == list(range(1, 7))
    assert losses(two)[:3] == losses(one)
    assert (
        rows(two)[3]["loss/total"] < rows(two)[0]["loss/total"]
    )  # same data again, from trained weights


def test_callbacks_see_every_step_on_the_host(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Spy(Callback):
        def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
            seen.append((step, metrics["loss/total"]))
            with trainer.unsharded() as module:
                assert not module.training and module.embed.weight.numel() > 0

    Trainer(make_run(tmp_path, steps=2, stage=3), [Spy()]).fit()
    assert [s for s, _ in seen] == [1, 2] and all(isinstance(v, float) for _, v in seen)


def test_a_tokenizer_trains_in_the_same_loop_and_shows_reconstructions(tmp_path: Path) -> None:
    """image_vq + vq: loss falls, usage is reported, fixed items are reconstructed as files."""
    run = Run.model_validate(
        {
            "name": "vq",
            "out": tmp_path,
            "model": NETWORKS.get("image_vq").smallest(),
            "stages": [
                {
                    "data": "toy_images",
                    "objective": "vq",
                    "budget": {"steps": 8},
                    "schedule": {"warmup": 0},
                }
            ],
            "callbacks": [{"kind": "samples", "every": 4, "items": 2}],
            "engine": {"precision": "fp32"},
        }
    )
    train(run)
    assert losses(run)[-1] < losses(run)[0]
    row = rows(run)[-1]
    assert 0 < row["codebook/usage"] <= 1 and row["perf/items_per_second"] > 0
    for step in (4, 8):
        names = sorted(p.name for p in (run.folder / "samples" / f"step_{step:06d}").iterdir())
        assert names == ["00_image0.png", "01_image1.png"]
    originals = sorted(p.name for p in (run.folder / "samples" / "prompts").iterdir())
    assert originals == ["00_image.png", "01_image.png"]
    assert (run.folder / "model" / "model.safetensors").is_file()


def test_a_callback_that_cannot_start_is_the_error_that_is_told(tmp_path: Path) -> None:
    """Those before it are ended, it and those after it are not."""
    callbacks = [{"kind": "samples", "prompts": [{"image": "no.png", "to": "text"}]}]
    run = Run.model_validate(make_run(tmp_path).to_dict() | {"callbacks": callbacks})
    with pytest.raises(UserError, match="no.png"):
        train(run)
