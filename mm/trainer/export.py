"""The saved model of a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.data.chat.template import ChatTemplate
from mm.model.linears.lora import adapter_tensors, save_adapters
from mm.model.slices import Lazy
from mm.run import Run
from mm.tokenizers.load import tokenizer_folder
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.held_out import Best, chosen_figure
from mm.trainer.stage import load_weights, make_module, stage_result
from mm.trainer.stage_model import model_of
from mm.trainer.warm_start import ADAPTERS
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")


def export(
    run: Run, vocabulary: Vocabulary | None, weights: Mapping[str, Tensor], step: int
) -> None:
    """Save the model with full fp32 ``weights`` of ``step`` as ``<run folder>/model``."""
    module = make_module(model_of(run, -1), vocabulary, run.seed, torch.device("cpu"))
    load_weights(module, weights, "the trained model")
    final, part = run.folder / "model", run.folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    saving: Any = module.eval()
    # Of a tokenizer's run folder the tokenizer alone: not its checkpoints, logs and samples.
    tokenizers = {modality: tokenizer_folder(path) for modality, path in run.tokenizers.items()}
    saving.save_pretrained(part, vocabulary=vocabulary, tokenizers=tokenizers)
    if (template := ChatTemplate.load(run.folder)) is not None:
        template.save(part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    if adapter_tensors(module):
        save_adapters(module, run.folder / ADAPTERS)
    (run.folder / "model.step").write_text(mark(run, step))


def mark(run: Run, step: int) -> str:
    """What ``model.step`` says of the saved model of a run that ended at ``step``."""
    return str(step) if run.export == "last" else f"{step} {run.export}"


def chosen_weights(run: Run, last: Snapshot, best: Best | None) -> Lazy:
    """The weights that `Run.export` asks for: of what the last stage left, or of its best step."""
    if run.export == "last" or best is None or best.step == last.state["step"]:
        return last.tensors("model")
    saved = checkpoint.load(run.folder / "checkpoints", best.step)
    if saved is None:
        log.warning("step %d was best and its checkpoint is gone: the last is exported", best.step)
        return last.tensors("model")
    name, value = chosen_figure(run.stages[-1].best_by, best)
    log.info("exported: step %d, the best %s (%.4g)", best.step, name, value)
    return stage_result(run.stages[-1], saved, "model")
