"""`distil`: the divergences by hand, and a small model that learns from a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from start_toys import packed, values
from torch.distributions import Categorical, kl_divergence
from trainer_runs import losses, rows, torchrun

from mm.errors import UserError
from mm.objectives.distil import divergence
from mm.run import Run
from mm.trainer.loop import train


def test_divergences_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = Categorical(logits=s / 2), Categorical(logits=t / 2)
    torch.testing.assert_close(divergence(s, t, "forward", 2.0), 4 * kl_divergence(q, p))
    torch.testing.assert_close(divergence(s, t, "reverse", 2.0), 4 * kl_divergence(p, q))
    m = Categorical(probs=0.3 * q.probs + 0.7 * p.probs)
    mixed = 0.3 * kl_divergence(q, m) + 0.7 * kl_divergence(p, m)
    torch.testing.assert_close(divergence(s, t, "jensen_shannon", 2.0, 0.3), 4 * mixed)
    for kind in ("forward", "reverse", "jensen_shannon"):
        assert float(divergence(s, s, kind).abs().max()) < 1e-12
        assert float(divergence(s, t, kind).min()) > 0
    hard = torch.tensor([[0.0, 40.0, 0.0]]), torch.tensor([[200.0, 0.0, -200.0]])
    assert all(torch.isfinite(divergence(*hard, kind)).all() for kind in ("reverse", "forward"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data and ``runs/teacher`` of two layers, trained."""
    root = packed(tmp_path_factory.mktemp("distil"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        train(run_of(root, root / "runs", "teacher", 30, depth=2))
    return root


def run_of(root: Path, out: Path, name: str, steps: int, depth: int = 1, **stage: Any) -> Run:
    made = values(root, out, name, steps=steps, stage=stage)
    made["model"]["backbone"]["depth"] = depth
    return Run.model_validate(made)


def distilled(root: Path, out: Path, name: str, **objective: Any) -> Run:
    asked = {"kind": "distil", "teacher": str(root / "runs" / "teacher"), **objective}
    depth = asked.pop("depth", 1)
    return run_of(root, out, name, asked.pop("steps", 20), depth, objective=asked)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_a_student_comes_near_its_teacher(root: Path, tmp_path: Path, kind: str) -> None:
    run = distilled(
        root, tmp_path, kind, divergence=kind, alpha=1.0, hidden={"hidden.1": "hidden.2"}
    )
    with pytest.raises(UserError, match=r"objective\.hidden: hidden\.1 of the model has none"):
        train(run)
    train(distilled(root, tmp_path, kind, divergence=kind, alpha=1.0, hidden={"hidden": "hidden"}))
    found = rows(run)
    for name in ("distil_text", "distil_image", "hidden"):
        assert found[-1][f"loss/{name}"] < 0.7 * found[0][f"loss/{name}"], name


def test_the_teachers_own_weights_are_at_no_distance(root: Path, tmp_path: Path) -> None:
    """So without hard targets nothing moves; held-out losses are those of `next_token`."""
    same = {"depth": 2, "alpha": 1.0, "steps": 1}
    run = distilled(root, tmp_path, "same", **same)
    run = Run.model_validate(run.to_dict() | {"init_from": str(root / "runs" / "teacher")})
    values_ = run.to_dict()
    values_["stages"][0]["eval_every"] = 1
    values_["stages"][0]["optimizer"]["lr"] = 1e-12  # Adam would take a whole step of rounding
    train(Run.model_validate(values_))
    (found,) = (row for row in rows(run) if "loss/distil_text" in row)
    assert abs(found["loss/distil_text"]) < 1e-6 and found["optim/grad_norm"] < 1e-5
    values_["stages"][0]["objective"] = {"kind": "next_token"}
    plain = Run.model_validate(values_ | {"name": "plain"})
    train(plain)
    (other,) = (row for row in rows(plain) if "val/loss" in row)
    (row,) = (row for row in rows(run) if "val/loss" in row)
    assert row["val/loss"] == pytest.approx(other["val/loss"], rel=1e-3)


def test_without_a_teacher_the_model_is_held_near_where_it_began(
    root: Path, tmp_path: Path
) -> None:
    run = distilled(root, tmp_path, "near", teacher=None, steps=3, depth=2)
    train(run)
    found = [row["loss/distil_text"] for row in rows(run)]
    assert abs(found[0]) < 1e-6 < found[-1]


def test_a_teacher_of_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    from mm.data.pack.job import pack

    one = {"text": root / "tokenizers" / "text"}
    pack(root / "data", tmp_path / "tokens", tokenizers=one, progress=False)
    made = distilled(root, tmp_path, "run").to_dict()
    made["stages"][0]["data"]["sources"][0]["path"] = str(tmp_path / "tokens")
    made |= {"vocabulary": str(tmp_path / "tokens" / "vocabulary.json"), "tokenizers": {}}
    with pytest.raises(UserError, match=r"stages\.0\.objective\.teacher: .* is not that of"):
        train(Run.model_validate(made))


@pytest.mark.slow
def test_stage_3_of_two_processes_gives_the_losses_of_stage_1(root: Path, tmp_path: Path) -> None:
    """Losses made of a head's distribution: its weights are there for the backward."""
    runs = []
    for stage in (1, 3):
        made = distilled(root, tmp_path, f"stage-{stage}", steps=4, hidden={"hidden": "hidden"})
        engine = {"zero_stage": stage, "precision": "fp32"}
        runs.append(Run.model_validate(made.to_dict() | {"engine": engine}))
    torchrun(2, runs)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
