"""`init_from`: a new run that begins with the weights of another run's saved model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm import config as configs
from mm.errors import UserError
from mm.model.folder import load_tensors
from mm.run import Run
from mm.trainer.checkpoint.format import Snapshot
from mm.vocabulary import Vocabulary

WEIGHTS, WORDS, TOKENIZERS = "model.safetensors", "vocabulary.json", "tokenizers"


def resolve(run: Run) -> Run:
    """The run with the vocabulary and tokenizers of what it begins from, where it names none.

    A run that was begun has them in its own config.yaml: what it began from is not read again.

    Raises:
        UserError: it is this run's own folder, or nothing is saved there.
    """
    if run.init_from is None:
        return run
    own, given = run.folder.resolve(), run.init_from.resolve()
    if own in (given, *given.parents):
        raise UserError(
            f"init_from: {run.init_from} is the folder of this run itself; to go on with it leave "
            "init_from out, to begin a new one give it another name: name=..."
        )
    written = run.folder / "config.yaml"
    if written.is_file():
        values = configs.read(written)
        vocabulary = values.get("vocabulary")
        words = Path(vocabulary) if vocabulary else None
        tokenizers = {m: Path(path) for m, path in (values.get("tokenizers") or {}).items()}
    else:
        folder = model_folder(run)
        words = folder / WORDS if (folder / WORDS).is_file() else None
        beside = sorted((folder / TOKENIZERS).glob("*"))
        tokenizers = {path.name: path for path in beside if path.is_dir()}
    words = run.vocabulary or words
    return run.model_copy(
        update={"vocabulary": words, "tokenizers": {**tokenizers, **run.tokenizers}}
    )


def model_folder(run: Run) -> Path:
    """The saved model that ``init_from`` names, or that of the run it names. Raises UserError."""
    assert run.init_from is not None
    for folder in (run.init_from / "model", run.init_from):
        if (folder / WEIGHTS).is_file():
            return folder
    trained = (run.init_from / "checkpoints").is_dir()
    why = "its training has not ended: mm train it to its end" if trained else "name a run folder"
    raise UserError(f"init_from: {run.init_from} holds no saved model ({WEIGHTS}); {why}")


def begin(
    run: Run, vocabulary: Vocabulary | None, saved: Snapshot | None
) -> tuple[Snapshot | None, dict[str, Any] | None]:
    """What a run begins with, and what is written of it: its checkpoint, else ``init_from``."""
    if saved is not None:
        return saved, saved.state.get("init_from")
    if run.init_from is None:
        return None, None
    warm = WarmStart(run, vocabulary)
    return warm, warm.facts


class WarmStart(Snapshot):
    """A saved model as what the first stage begins with.

    A longer vocabulary is taken where the old one is its beginning: ids that are new begin as in
    a fresh model.

    Args:
        run: with ``init_from``.
        vocabulary: of the run.
    Raises:
        UserError: the vocabularies do not fit.
    """

    def __init__(self, run: Run, vocabulary: Vocabulary | None):
        folder = model_folder(run)
        super().__init__({"stage": -1}, {"model": load_tensors(folder / WEIGHTS)})
        self.origin = str(folder)
        self.mend = f"init_from takes a model of the same config: set model: as {folder} has it"
        self.old = self.new = vocabulary
        if vocabulary is not None and (folder / WORDS).is_file():
            self.old = old = Vocabulary.load(folder / WORDS)
            if not old.is_prefix_of(vocabulary):
                raise UserError(
                    f"init_from: the vocabulary {run.vocabulary} does not begin with that of "
                    f"{folder} ({', '.join(old.modalities)}), so its ids would mean something "
                    f"else; pack the data with: mm data pack SRC --out DIR --tokenizers ... "
                    f"--vocabulary {folder / WORDS}"
                )
            self.new_modalities = vocabulary.modalities[len(old.modalities) :]
        mark = folder.parent / "model.step"  # the step, and `best` where that was exported
        with (folder / WEIGHTS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.facts: dict[str, Any] = {
            "folder": str(folder),
            "step": int(mark.read_text().split()[0]) if mark.is_file() else None,
            "sha256": digest,
        }

    def fit(self, module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tables of one row an id get the fresh rows of ``module`` for ids that are new."""
        out, own = dict(weights), module.state_dict()
        if self.old is None or self.new is None or not self.new_modalities:
            return out
        had, has = self.old.size, self.new.size
        for name, tensor in weights.items():
            fresh = own.get(name)
            if fresh is not None and fresh.dim() and tensor.shape == (had, *fresh.shape[1:]):
                if len(fresh) == has:
                    out[name] = torch.cat([tensor, fresh[had:].to(tensor)])
        return out
