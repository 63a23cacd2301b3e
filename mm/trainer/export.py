"""The saved model of a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.data.chat.template import ChatTemplate
from mm.model.by_module import build_empty
from mm.model.folder import save_tensors
from mm.model.linears.lora import adapter_tensors
from mm.model.model import LmConfig
from mm.model.slices import Lazy
from mm.run import Run
from mm.tokenizers.load import tokenizer_folder
from mm.trainer.begin_weights import load_weights, require_fit
from mm.trainer.callbacks.base import Training
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.format import Snapshot
from mm.trainer.held_out import Best, chosen_figure
from mm.trainer.stage import build, make_module, stage_result
from mm.trainer.stage_model import model_of
from mm.trainer.warm_start import ADAPTERS
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")


def export_chosen(trainer: Training, last: Snapshot) -> None:
    """`export` with the weights that `Run.export` asks for. Main rank."""
    weights = chosen_weights(trainer.run, last, trainer.held_out.best)
    export(trainer.run, trainer.vocabulary, weights, trainer.step)


def export(
    run: Run, vocabulary: Vocabulary | None, weights: Mapping[str, Tensor], step: int
) -> None:
    """Save the model with full fp32 ``weights`` of ``step`` as ``<run folder>/model``.

    Of a language model one tensor at a time is in memory.
    """
    config, cpu = model_of(run, -1), torch.device("cpu")
    streamed: dict[str, Any] = {}
    if isinstance(config, LmConfig):
        module = build_empty(lambda: build(config, vocabulary=vocabulary), cpu)
        require_fit(module, weights, "the trained model")
        streamed["tensors"] = weights
    else:
        module = make_module(config, vocabulary, run.seed, cpu)
        load_weights(module, weights, "the trained model")
    final, part = run.folder / "model", run.folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    saving: Any = module.eval()
    # Of a tokenizer's run folder the tokenizer alone: not its checkpoints, logs and samples.
    tokenizers = {modality: tokenizer_folder(path) for modality, path in run.tokenizers.items()}
    saving.save_pretrained(part, vocabulary=vocabulary, tokenizers=tokenizers, **streamed)
    if (template := ChatTemplate.load(run.folder)) is not None:
        template.save(part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    if names := adapter_tensors(module):
        save_tensors(run.folder / ADAPTERS, {name: weights[name] for name in names})
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
