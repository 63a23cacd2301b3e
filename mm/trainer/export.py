"""The saved model of a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm.trainer.stage import load_weights, make_module

if TYPE_CHECKING:
    from mm.trainer.loop import Trainer


def export(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """Save the model from its full fp32 weights as ``<run folder>/model``; the main rank does."""
    if not trainer.is_main:
        return
    run, folder = trainer.run, trainer.folder
    module = make_module(run.model, trainer.vocabulary, run.seed, torch.device("cpu"))
    load_weights(module, weights, "the trained model")
    part = folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    saving: Any = module.eval()
    saving.save_pretrained(part, vocabulary=trainer.vocabulary, tokenizers=dict(run.tokenizers))
    shutil.rmtree(folder / "model", ignore_errors=True)
    part.rename(folder / "model")
    (folder / "model.step").write_text(str(trainer.step))
