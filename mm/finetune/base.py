"""The model that is tuned: its config, vocabulary, tokenizers, and the run that made it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.modalities.base import raw_modality
from mm.errors import UserError
from mm.report.find import n_parameters
from mm.run import Run
from mm.trainer.warm_start import TOKENIZERS, WEIGHTS, WORDS, saved_model
from mm.vocabulary import Vocabulary

RECIPE = "configs/finetune/new-modality.yaml"
BARS = ("bar", "reconstruction_bar")  # of a task: the base's, not this run's


class Base(NamedTuple):
    """``folder`` as it was named, ``model`` inside it; ``run`` where it is a run's folder."""

    folder: Path
    model: Path
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    tokenizers: Mapping[str, Path]
    parameters: int
    run: Run | None

    @property
    def kinds(self) -> dict[str, list[str]]:
        """What a sample may hold -> modalities of the vocabulary that are made from it."""
        out: dict[str, list[str]] = {}
        for modality in self.vocabulary.modalities:
            if modality in self.tokenizers:
                out.setdefault(raw_modality(modality).kind, []).append(modality)
        return out

    @property
    def is_adapted(self) -> bool:
        """Whether it is itself a model with adapters."""
        linear = self.config.get("linear")
        return isinstance(linear, Mapping) and linear.get("kind") == "lora"

    @property
    def dense(self) -> dict[str, Any]:
        """`model.linear` without adapters."""
        linear: Any = self.config.get("linear") or {"kind": "dense"}
        if linear["kind"] == "lora":
            linear = linear["base_layer"]
            linear = {"kind": "dense"} if linear["kind"] == "nf4" else linear
        return {k: v for k, v in linear.items() if (k, v) != ("bias", False)}

    def require(self, kinds: Iterable[str], origin: Path) -> None:
        """Raise UserError where data have a modality that the base does not know."""
        for kind in kinds:
            if kind not in self.kinds:
                raise UserError(
                    f"{origin}: has '{kind}', which {self.folder} does not know (it knows "
                    f"{', '.join(self.kinds) or 'nothing that has a tokenizer'}); to add a "
                    f"modality take the recipe {RECIPE}"
                )

    def find(self, path: Path) -> Path | None:
        """A path of the base's config, from here or from where its run was started."""
        parents = [parent / path for parent in self.folder.resolve().parents]
        return next((each for each in (path, *parents) if each.exists()), None)

    def tasks(self) -> list[dict[str, Any]]:
        """The tasks of its run whose data are there, by names that say whose they are."""
        out: list[dict[str, Any]] = []
        for stage in self.run.stages if self.run else ():
            for task in stage.tasks:
                data = getattr(task, "data", None)
                here = self.find(Path(data)) if data else None
                if here is not None:
                    values = {k: v for k, v in task.to_dict().items() if k not in BARS}
                    out.append({**values, "name": f"base.{task.full_name}", "data": str(here)})
        return out

    def sources(self) -> list[dict[str, Any]]:
        """Token shards that its last stage was trained on and that are there, weights kept."""
        data = self.run.stages[-1].data if self.run else None
        out: list[dict[str, Any]] = []
        for source in getattr(data, "sources", ()):
            here = self.find(Path(source.path))
            if here is not None:
                out.append({"path": str(here), "weight": float(source.weight)})
        return out


def open_base(folder: Path, *, trust_code: bool = False) -> Base:
    """Read what is tuned: a run, a saved model, or a folder that `mm import` wrote.

    Raises:
        UserError: there is no saved model, it has no vocabulary, or a tokenizer is missing.
    """
    if not folder.exists():
        raise UserError(f"--model {folder}: no such folder; make it with: mm train, or mm import")
    from mm.model.folder import read_config

    model = saved_model("--model", folder)
    if not (model / WORDS).is_file():
        raise UserError(f"--model {folder}: no {WORDS}, so no model of ids; name one of kind lm")
    vocabulary = Vocabulary.load(model / WORDS)
    tokenizers = {p.name: p for p in sorted((model / TOKENIZERS).glob("*")) if p.is_dir()}
    if not tokenizers:
        raise UserError(
            f"--model {folder}: {model} holds no {TOKENIZERS}, so new data have no ids; name the "
            "run whose config has `tokenizers:`"
        )
    file = folder / "config.yaml"
    run = Run.load(file, trust_code=trust_code) if file.is_file() else None
    parameters = n_parameters(model / WEIGHTS) or 0
    return Base(folder, model, read_config(model), vocabulary, tokenizers, parameters, run)
