"""The saved model of a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.run import Run
from mm.tokenizers.load import tokenizer_folder
from mm.trainer.stage import load_weights, make_module
from mm.vocabulary import Vocabulary


def export(
    run: Run, vocabulary: Vocabulary | None, weights: Mapping[str, Tensor], step: int
) -> None:
    """Save the model with full fp32 ``weights`` of ``step`` as ``<run folder>/model``."""
    module = make_module(run.model, vocabulary, run.seed, torch.device("cpu"))
    load_weights(module, weights, "the trained model")
    final, part = run.folder / "model", run.folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    saving: Any = module.eval()
    # Of a tokenizer's run folder the tokenizer alone: not its checkpoints, logs and samples.
    tokenizers = {modality: tokenizer_folder(path) for modality, path in run.tokenizers.items()}
    saving.save_pretrained(part, vocabulary=vocabulary, tokenizers=tokenizers)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    (run.folder / "model.step").write_text(str(step))
