"""The average of saved models or checkpoints, as one saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.errors import UserError
from mm.model import folder as files
from mm.model.slices import Lazy, Slices
from mm.trainer.checkpoint.check import MARK
from mm.vocabulary import Vocabulary

WEIGHTS = "model.safetensors"


def average_weights(n: int, decay: float | None) -> list[float]:
    """Shares of ``n`` sources, oldest first, of sum 1: equal, or those of a moving average.

    With ``decay`` d the average begins as the first source, and each later one takes ``1 - d``.
    """
    if decay is None:
        return [1 / n] * n
    return [(1 - decay if i else 1.0) * decay ** (n - 1 - i) for i in range(n)]


def average_models(
    sources: Sequence[Path], out: Path, shares: Sequence[float]
) -> dict[str, Tensor]:
    """Write the weighted mean of models as a saved model, and return it.

    Sums are taken in float64; each tensor keeps its precision. What is no float is the last one's.

    Args:
        sources: runs, saved models, or folders of checkpoints (``RUN/checkpoints/step_N``).
        out: what is written.
        shares: one a source.
    Raises:
        UserError: a source has another config, vocabulary, or other tensors than the first.
    """
    places = [place_of(source) for source in sources]
    first, model = places[0]
    values, words = files.read_config(model), Vocabulary.load(model / "vocabulary.json")
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for number, ((file, folder), share) in enumerate(zip(places, shares, strict=True)):
        if number and folder != model:
            if files.read_config(folder) != values:
                raise UserError(f"{folder}: its config is another than that of {model}")
            if Vocabulary.load(folder / "vocabulary.json") != words:
                raise UserError(f"{folder}: its vocabulary is another than that of {model}")
        tensors = open_source(file)
        if number:
            _require_alike(file, tensors, first, total)
        for name in tensors:
            tensor = tensors[name]
            kinds.setdefault(name, tensor.dtype)
            if not tensor.is_floating_point():
                total[name] = tensor
            elif number:
                total[name].add_(tensor, alpha=share)
            else:
                total[name] = tensor.double() * share
    done = {name: tensor.to(kinds[name]) for name, tensor in total.items()}
    tokenizers = {path.name: path for path in (model / "tokenizers").glob("*") if path.is_dir()}
    files.save_model(out, values, _tied(done, dict(open_source(first))), words, tokenizers)
    return done


def place_of(source: Path) -> tuple[Path, Path]:
    """The weights of a source, and the saved model that has its config. Raises UserError.

    Of a checkpoint its folder, of a saved model its file (`open_source`).
    """
    if (source / MARK).is_file():  # a checkpoint
        model = source.parent.parent / "model"
        if not (model / "config.json").is_file():
            raise UserError(f"{source}: its run has no saved model yet: mm train it to its end")
        return source, model
    model = files.model_folder(source)
    if not (model / "config.json").is_file():
        raise UserError(f"{source}: no run, no saved model and no checkpoint")
    return model / WEIGHTS, model


def open_source(place: Path) -> Lazy:
    """Weights of a checkpoint's folder, or of a file. Raises UserError."""
    return Slices(place).tensors("model") if place.is_dir() else files.open_tensors(place)


def _require_alike(file: Path, tensors: Lazy, first: Path, there: dict[str, Tensor]) -> None:
    there_too = {name: tuple(t.shape) for name, t in there.items()}
    odd = sorted(n for n in {*tensors, *there} if tensors.shapes.get(n) != there_too.get(n))
    if odd:
        raise UserError(f"{file}: '{odd[0]}' is another tensor than in {first}")


def _tied(tensors: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of one tensor are names of one again."""
    seen: dict[int, str] = {}
    return {n: tensors[seen.setdefault(t.data_ptr(), n)] for n, t in before.items()}
