"""The average of saved models or checkpoints, as one saved model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mm.errors import UserError
from mm.model import folder as files
from mm.model.slices import Lazy, Slices
from mm.trainer.checkpoint.check import MARK
from mm.vocabulary import Vocabulary


def average_weights(n: int, decay: float | None) -> list[float]:
    """Shares of ``n`` sources, oldest first, of sum 1: equal, or those of a moving average.

    With ``decay`` d the average begins as the first source, and each later one takes ``1 - d``.
    """
    if decay is None:
        return [1 / n] * n
    return [(1 - decay if i else 1.0) * decay ** (n - 1 - i) for i in range(n)]


def average_models(sources: Sequence[Path], out: Path, shares: Sequence[float]) -> None:
    """Write the weighted mean of models as a saved model; one tensor of it is in memory at a time.

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
    given: list[Lazy] = []
    for number, (place, folder) in enumerate(places):
        if number and folder != model:
            if files.read_config(folder) != values:
                raise UserError(f"{folder}: its config is another than that of {model}")
            if Vocabulary.load(folder / "vocabulary.json") != words:
                raise UserError(f"{folder}: its vocabulary is another than that of {model}")
        tensors = open_source(place)
        if number:
            _require_alike(place, tensors, first, given[0])
        given.append(tensors)

    def mean(name: str) -> Tensor:
        begun = given[0][name]
        if not begun.is_floating_point():
            return given[-1][name]
        total = begun.double() * shares[0]
        for tensors, share in zip(given[1:], shares[1:], strict=True):
            total.add_(tensors[name], alpha=share)
        return total.to(begun.dtype)

    tokenizers = {path.name: path for path in (model / "tokenizers").glob("*") if path.is_dir()}
    saved = files.open_tensors(model)  # a checkpoint says no ties, the saved model of its run does
    _require_alike(first, given[0], model, saved)
    files.save_model(out, values, Lazy(saved.shapes, mean), words, tokenizers, saved.like)


def place_of(source: Path) -> tuple[Path, Path]:
    """The folder of weights of a source, and the saved model that has its config.

    Raises UserError.
    """
    if (source / MARK).is_file():  # a checkpoint
        model = source.parent.parent / "model"
        if not (model / "config.json").is_file():
            raise UserError(f"{source}: its run has no saved model yet: mm train it to its end")
        return source, model
    model = files.model_folder(source)
    if not (model / "config.json").is_file():
        raise UserError(f"{source}: no run, no saved model and no checkpoint")
    return model, model


def open_source(place: Path) -> Lazy:
    """Weights of a checkpoint's folder, or of a saved model's. Raises UserError."""
    is_checkpoint = (place / MARK).is_file()
    return Slices(place).tensors("model") if is_checkpoint else files.open_tensors(place)


def _require_alike(file: Path, tensors: Lazy, first: Path, there: Lazy) -> None:
    here, there_too = _stored(tensors), _stored(there)
    odd = sorted(n for n in {*here, *there_too} if here.get(n) != there_too.get(n))
    if odd:
        raise UserError(f"{file}: '{odd[0]}' is another tensor than in {first}")


def _stored(tensors: Lazy) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, one that has several names under its first alone."""
    first = {id(t): name for name, t in reversed([*(tensors.like or {}).items()])}
    return {name: tensors.shapes[name] for name in first.values()}
