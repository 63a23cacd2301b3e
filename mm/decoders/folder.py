"""Where a model is found: a saved folder, or a run's `model/`, else its newest good checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mm import config as configs
from mm.data.chat.template import ChatTemplate
from mm.errors import UserError
from mm.reading import parse_json
from mm.registry import NetworkField
from mm.vocabulary import Vocabulary


class Loaded(NamedTuple):
    """A model ready to generate, and where its tokenizers are."""

    model: nn.Module
    vocabulary: Vocabulary
    tokenizers: dict[str, Path]
    template: ChatTemplate | None = None  # of its conversations


def load(folder: str | Path, trust_code: bool = False) -> Loaded:
    """Load the model of ``folder``.

    Args:
        trust_code: import what the config of an unfinished run names under `imports:`.
    Raises:
        UserError: no model there, or its vocabulary is missing; names the command that makes one.
    """
    folder = Path(folder)
    for where in (folder, folder / "model"):
        if (where / "config.json").is_file() and (where / "model.safetensors").is_file():
            return _saved(where)
    if not folder.exists():
        raise UserError(f"no such folder: {folder}")
    step = _newest(folder / "checkpoints")
    if step is None or not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: no trained model (no model/, no complete checkpoint); make one with: "
            "mm train CONFIG.yaml"
        )
    return _checkpoint(folder, step, trust_code)


def _saved(where: Path) -> Loaded:
    from mm.model.model import Model

    vocabulary = Vocabulary.load(where / "vocabulary.json")
    beside = {p.name: p for p in sorted((where / "tokenizers").glob("*")) if p.is_dir()}
    return Loaded(Model.from_pretrained(where), vocabulary, beside, ChatTemplate.load(where))


def _checkpoint(run: Path, step: Path, trust_code: bool) -> Loaded:
    """Rebuild the model of an unfinished run: its resolved config, the weights of one step."""
    from mm.model.folder import load_into

    values: dict[str, Any] = configs.read(run / "config.yaml")
    configs.import_modules(values, f"{run}/config.yaml", trust_code)
    if not values.get("vocabulary"):
        raise UserError(
            f"{run}/config.yaml: names no vocabulary; this run trains no language model"
        )
    saved = configs.validate(
        _Saved, {k: values[k] for k in _Saved.model_fields if k in values}, f"{run}/config.yaml"
    )
    vocabulary = Vocabulary.load(saved.vocabulary)
    model = load_into(lambda: saved.model.build(vocabulary), step / "model.safetensors")
    return Loaded(model, vocabulary, dict(saved.tokenizers), ChatTemplate.load(run))


class _Saved(configs.Config):
    """Of a run's config what generation needs."""

    vocabulary: Path
    model: NetworkField
    tokenizers: dict[str, Path] = {}


def _newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose weights match the hash that was written with them."""
    steps = [p for p in checkpoints.glob("step_*") if p.name[5:].isdigit()]
    for step in sorted(steps, key=lambda p: int(p.name[5:]), reverse=True):
        weights, mark = step / "model.safetensors", step / "COMPLETE"
        if weights.is_file() and mark.is_file():
            with weights.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            try:
                if parse_json(mark.read_text()).get(weights.name) == found:
                    return step
            except (ValueError, AttributeError):
                continue
    return None
