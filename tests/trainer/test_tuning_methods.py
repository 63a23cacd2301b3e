"""Ways to tune little of a trained model, through the trainer: what moves, and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from start_toys import packed, values

from mm.model.folder import load_tensors
from mm.model.model import Model
from mm.run import Run
from mm.trainer.loop import train

PATTERN = "gated_deltanet attention"
BIASES = {"kind": "dense", "bias": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed data and ``runs/base``, trained."""
    root = packed(tmp_path_factory.mktemp("tuning"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        base = values(root, root / "runs", "base", steps=2)
        base["model"]["backbone"]["pattern"] = PATTERN
        base["model"]["linear"] = BIASES
        train(Run.model_validate(base))
    return root


def tuned(
    root: Path, out: Path, model: dict[str, Any], *, engine: Any = None, **stage: Any
) -> dict[str, torch.Tensor]:
    """Tensors that a run from ``runs/base`` moved, and those that it added."""
    made = values(root, out, "tuned", steps=2, stage=stage, engine=engine or {}) | {
        "init_from": str(root / "runs" / "base"),
        "vocabulary": None,
        "tokenizers": {},
    }
    base = values(root, out)["model"]
    base["backbone"]["pattern"] = PATTERN
    made["model"] = base | {"linear": BIASES} | model
    run = Run.model_validate(made)
    train(run)
    before = load_tensors(root / "runs/base/model/model.safetensors")
    after = load_tensors(run.folder / "model" / "model.safetensors")
    Model.from_pretrained(run.folder)
    assert before.keys() <= after.keys()
    return {k: t for k, t in after.items() if k not in before or not torch.equal(t, before[k])}


@pytest.mark.parametrize("kind", ["state", "prefix", "prompt"])
@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_beginning_trains_alone(root: Path, tmp_path: Path, kind: str, zero: int) -> None:
    model = {"start": {"kind": kind, "length": 4}}
    made = tuned(root, tmp_path, model, engine={"zero_stage": zero})
    assert made and all(name.startswith("start.leaf_") for name in made)
    assert any(float(t.abs().max()) > 0.01 for t in made.values()), "it moved"


def test_bitfit_is_a_pattern(root: Path, tmp_path: Path) -> None:
    """Zaken et al. 2022 (arXiv:2106.10199): biases alone."""
    made = tuned(root, tmp_path, {}, train=["*.bias"])
    assert made and all(name.endswith(".bias") for name in made)


def test_layers_by_pattern_at_their_own_rates(root: Path, tmp_path: Path) -> None:
    optimizer = {"kind": "adamw", "lr": 1e-3, "rates": {"backbone.layers.1.*": 10.0}}
    made = tuned(root, tmp_path, {}, train=["backbone.*"], optimizer=optimizer)
    assert {name.split(".")[0] for name in made} == {"backbone"}
