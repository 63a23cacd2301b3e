"""`train` and `freeze` of a stage, and frozen networks that a folder gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from test_stage_border import assert_same, stopped, two_stages
from trainer_runs import Calls, losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.run import Run
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.loop import Trainer, train

EACH = {"every": 1, "keep_last": 9}


def with_stages(run: Run, *changes: dict[str, Any]) -> Run:
    """The run with each stage changed."""
    values = run.to_dict()
    values["stages"] = [s | c for s, c in zip(values["stages"], changes, strict=True)]
    return Run.model_validate(values)


def at(run: Run, step: int, file: str = "model") -> dict[str, torch.Tensor]:
    return toys.load_file(str(run.folder / f"checkpoints/step_{step:06d}/{file}.safetensors"))


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {k for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("zero", [1, *(pytest.param(z, marks=pytest.mark.slow) for z in (0, 2)), 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_keeps_every_bit(tmp_path: Path, zero: int, precision: str) -> None:
    """It takes no gradient and no optimizer state, at every ZeRO stage."""
    engine = {"precision": precision}
    run = make_run(tmp_path, steps=3, stage=zero, checkpoints=EACH, engine=engine)
    run = with_stages(run, {"train": ["up.*", "down.*", "image.weight"], "freeze": ["*.bias"]})
    seen: list[set[str]] = []
    look = lambda t: seen.append({n for n, _ in t.stage.engines["model"].trainable()})
    Trainer(run, [Calls("post_step", look)]).fit()
    wanted = {"up.weight", "down.weight", "image.weight"}
    assert seen == [wanted] * 3
    fresh = make_run(tmp_path, "fresh", steps=1, stage=zero, checkpoints=EACH, engine=engine)
    start: dict[str, torch.Tensor] = {}
    keep = lambda t: start.update(
        {k: v.clone() for k, v in t.stage.engines["model"].weights().items()}
    )
    Trainer(with_stages(fresh, {}), [Calls("on_stage_start", keep)]).fit()
    learned = {k: v for k, v in at(run, 1).items() if k != "seen"}
    assert moved(learned, at(run, 3)) == wanted
    if precision == "fp32":
        assert moved({k: start[k] for k in learned}, at(run, 3)) == wanted
    states = at(run, 3, "model.optimizer")
    assert {k.partition("/")[2] for k in states} == wanted
    said = json.loads((run.folder / "start.json").read_text())
    assert said["trained"]["model"] == sum(learned[k].numel() for k in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_resume_over_a_border_with_other_frozen_parts_is_bitwise(
    tmp_path: Path, zero: int
) -> None:
    parts = ({"freeze": ["embed.*"]}, {"train": ["embed.*", "norm.*"]})
    whole = with_stages(two_stages(tmp_path, "whole", "plain", stage=zero), *parts)
    train(whole)
    for name, data in (("border", ({"signal_at": 2}, {})), ("inside", ({}, {"signal_at": 1}))):
        halves = with_stages(two_stages(tmp_path, name, "plain", data, stage=zero), *parts)
        stopped(halves)
        train(halves)
        assert_same(whole, halves)


def test_patterns_that_fit_nothing_are_refused_with_near_ones(tmp_path: Path) -> None:
    def told(**keys: Any) -> str:
        with pytest.raises(UserError) as error:
            train(with_stages(make_run(tmp_path), keys))
        assert not (tmp_path / "run" / "config.yaml").exists()
        return str(error.value)

    line = told(freeze=["embd.*"])
    assert line == "stages.0.freeze: no parameter is called 'embd.*'; did you mean 'embed.*'?"
    assert "stages.0.train: no parameter is called 'heads.*'" in told(train=["up.*", "heads.*"])
    assert "leave no parameter of 'model' to train" in told(train=["up.*"], freeze=["*"])


def distilled(root: Path, name: str, **change: Any) -> Run:
    objective = {"kind": "toy_teacher", "given": str(root / "teacher")}
    return make_run(root, name, objective=objective, **change)


def test_a_folder_gives_a_frozen_teacher(tmp_path: Path) -> None:
    """It holds its weights, no checkpoint holds it, and another one in its place is refused."""
    train(make_run(tmp_path, "teacher", steps=2))
    given = toys.load_toy(tmp_path / "teacher")
    held: list[dict[str, torch.Tensor]] = []

    def look(trainer: Any) -> None:
        teacher = trainer.stage.frozen["teacher"]
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        held.append({k: v.clone() for k, v in teacher.state_dict().items()})

    whole = distilled(tmp_path, "whole")
    Trainer(whole, [Calls("post_step", look)]).fit()
    assert len(held) == 6 and all(not moved(given, each) for each in held)
    assert not list((whole.folder / "checkpoints").glob("*/teacher*"))
    assert rows(whole)[-1]["loss/near"] > 0
    begun = json.loads((whole.folder / "init_from.json").read_text())
    assert sorted(begun["teacher"]["taken"]) == sorted(given) and begun["teacher"]["step"] == 2

    halves = distilled(tmp_path, "halves", data={"signal_at": 2})
    stopped(halves)
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    train(make_run(tmp_path, "teacher", steps=3))
    with pytest.raises(UserError, match="are not those that this run began with"):
        train(halves)
    shutil.rmtree(tmp_path / "teacher")
    shutil.move(tmp_path / "moved", tmp_path / "teacher")
    train(halves)
    assert_same(whole, halves)


def test_a_frozen_copy_is_the_model_as_the_stage_begins(tmp_path: Path) -> None:
    """Of a later stage, too; a resume finds it in the checkpoint."""
    runs = []
    for name, data in (("whole", {}), ("halves", {"signal_at": 1})):
        run = two_stages(tmp_path, name, "plain", ({}, data), checkpoints=EACH)
        copied = {"objective": {"kind": "toy_teacher", "copied": True}}
        runs.append(with_stages(run, {}, copied))
    train(runs[0])
    stopped(runs[1])
    train(runs[1])
    assert_same(*runs)
    for step in (4, 6):
        learned = {k: v for k, v in at(runs[0], 3).items()}
        assert not moved(learned, at(runs[0], step, "teacher"))
    assert losses(runs[0], "loss/near")[0] == 0


def test_a_network_of_another_runs_checkpoint(tmp_path: Path) -> None:
    """`network:` names it; a critic, for example, which no saved model holds."""
    train(make_run(tmp_path, "gan", steps=2, objective="toy_gan"))
    given = {"path": str(tmp_path / "gan"), "network": "critic"}
    with pytest.raises(UserError, match="only a saved model brings its config"):
        train(make_run(tmp_path, "run", objective={"kind": "toy_teacher", "given": given}))
    from mm.init_from import InitFrom
    from mm.trainer.warm_start import WarmStart

    warm = WarmStart("key", InitFrom.model_validate(given), None, name="critic")
    saved = checkpoint.newest(tmp_path / "gan" / "checkpoints")
    assert saved is not None and not moved(saved.tensors("critic"), warm.tensors("critic"))
    module = toys.ToyCritic()
    assert not moved(warm.fit(module, warm.tensors("critic")), saved.tensors("critic"))
    other = InitFrom.model_validate(given | {"network": "judge"})
    with pytest.raises(UserError, match="has 'judge'"):
        WarmStart("key", other, None)
