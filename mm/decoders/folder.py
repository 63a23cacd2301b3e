"""Where a model is found: a saved folder, or a run's `model/`, else its newest good checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mm import config as configs
from mm.data.chat.template import ChatTemplate
from mm.errors import UserError
from mm.hashes import digest
from mm.model.slices import INDEX, Slices
from mm.model.weight_files import has_weights
from mm.reading import parse_json
from mm.registry import NetworkField
from mm.specs import ModalityTokenizer
from mm.vocabulary import Vocabulary


class Loaded(NamedTuple):
    """A model ready to generate, and where its tokenizers are."""

    model: nn.Module
    vocabulary: Vocabulary
    tokenizers: dict[str, Path]
    template: ChatTemplate | None = None  # of its conversations
    moved: tuple[str, ...] | None = None  # conditions of its second sequence; None: all


def load(folder: str | Path, trust_code: bool = False) -> Loaded:
    """Load the model of ``folder``.

    Args:
        trust_code: import what the config of an unfinished run names under `imports:`.
    Raises:
        UserError: no model there, or its vocabulary is missing; names the command that makes one.
    """
    folder = Path(folder)
    for where in (folder, folder / "model"):
        if (where / "config.json").is_file() and has_weights(where):
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
    model = Model.from_pretrained(where)
    moved = _moved(where.parent / "config.yaml") if model.config.parts else None
    return Loaded(model, vocabulary, beside, ChatTemplate.load(where), moved)


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
    model = load_into(lambda: saved.model.build(vocabulary), step, Slices(step).tensors("model"))
    template, moved = ChatTemplate.load(run), _moved(run / "config.yaml")
    return Loaded(model, vocabulary, dict(saved.tokenizers), template, moved)


def _moved(file: Path) -> tuple[str, ...] | None:
    """Modalities that `to_part` moved in the last stage of a run; None: all conditions."""
    if not file.is_file():
        return None
    stages = configs.read(file).get("stages")
    todo: list[Any] = list(stages[-1:]) if isinstance(stages, list) else []
    while todo:
        node = todo.pop()
        if isinstance(node, dict) and node.get("kind") == "to_part":
            return tuple(node.get("modalities") or ()) or None
        todo += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return None


class _Saved(configs.Config):
    """Of a run's config what generation needs."""

    vocabulary: Path
    model: NetworkField
    tokenizers: dict[str, Path] = {}


def _newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose weights match the hashes that were written with them."""
    steps = [p for p in checkpoints.glob("step_*") if p.name[5:].isdigit()]
    for step in sorted(steps, key=lambda p: int(p.name[5:]), reverse=True):
        try:
            hashes = parse_json((step / "COMPLETE").read_bytes())
            paths = [INDEX, *Slices(step).paths("model")]
            if all(hashes.get(path) == digest(step / path) for path in paths):
                return step
        except (OSError, UserError, ValueError, AttributeError, KeyError):
            continue
    return None


class Tokenizers(Mapping[str, ModalityTokenizer]):
    """Tokenizers by modality, loaded on first use: text to text needs no audio codec."""

    def __init__(self, folders: Mapping[str, Path], vocabulary: Vocabulary):
        self._folders, self._vocabulary = dict(folders), vocabulary
        self._loaded: dict[str, ModalityTokenizer] = {}

    def __getitem__(self, modality: str) -> ModalityTokenizer:
        if modality not in self._loaded:
            from mm.tokenizers.load import load_tokenizer

            folder = self._folders[modality]
            tokenizer = load_tokenizer(folder)
            self._vocabulary.require([tokenizer.spec], str(folder))
            self._loaded[modality] = tokenizer
        return self._loaded[modality]

    def __contains__(self, modality: object) -> bool:  # the inherited one would load it
        return modality in self._folders

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)
