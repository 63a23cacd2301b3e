"""`mm import` and `mm export --format peft`: adapters as a folder that PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.config import validate
from mm.errors import UserError
from mm.interchange.check import Report, compare
from mm.interchange.peft import (
    BASE_MARK,
    CONFIG,
    TENSORS,
    base_mark,
    base_marks,
    from_peft,
    to_peft,
)
from mm.model import folder as files
from mm.model.model import LmConfig
from mm.model.weight_files import few_names, has_weights
from mm.reading import parse_json
from mm.vocabulary import Vocabulary

PICKLE = "adapter_model.bin"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / CONFIG).is_file()


def export_adapter(
    folder: str | Path, out: str | Path, *, base: Path | None = None, check: bool = True
) -> Report | None:
    """Write the adapters of a model so that PEFT loads them.

    Args:
        folder: of a run of ``linear: lora``, or of its saved model.
        base: the checkpoint in Hugging Face's layout that they are for; its path is written down,
            and logits with both are compared with PEFT's.
        check: whether that is done.
    Raises:
        UserError: there are no adapters, or more than adapters was trained.
    """
    folder, out = Path(folder), Path(out)
    run, folder = folder, files.model_folder(folder)
    lm, tensors, vocabulary = read_model(folder)
    if lm.linear.kind != "lora":
        raise UserError(f"{run}: its linear is '{lm.linear.kind}', so that it has no adapters")
    require_same_base(run, tensors)
    config, named = to_peft(lm, tensors, vocabulary, str(base) if base is not None else None)
    with files.whole(out) as part:
        metadata = {"format": "pt", BASE_MARK: base_mark(tensors)}
        save_file(named, part / TENSORS, metadata=metadata)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if base is None or not check:
            return None
        return compare(folder, base, adapter=part)


def require_same_base(run: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a run that moved more than its adapters, where what it began with is still there."""
    told = run / "init_from.json"
    if not told.is_file():
        return
    begun = parse_json(told.read_bytes()).get("model", {})
    before = Path(begun.get("folder", ""))
    if not has_weights(before):
        return
    old, new = base_marks(files.load_tensors(before)), base_marks(tensors)
    if moved := sorted(name for name in old.keys() & new.keys() if old[name] != new[name]):
        raise UserError(
            f"{run}: {few_names(moved)} trained besides its adapters, which an adapter's file does "
            "not hold; write the whole model with: mm export --format hf"
        )


def import_adapter(folder: str | Path, base: str | Path, out: str | Path) -> None:
    """Write the model of ``base`` with the adapter of ``folder`` upon it as a saved model.

    Raises:
        UserError: the adapter does not fit, by name; nothing is written then.
    """
    folder, base = Path(folder), files.model_folder(Path(base))
    lm, weights, vocabulary = read_model(base)
    config, tensors = put_adapter(folder, lm, weights, vocabulary, base)
    places = {path.name: path for path in (base / "tokenizers").glob("*") if path.is_dir()}
    files.save_model(out, config.to_dict(), tensors, vocabulary, places)


def put_adapter(
    folder: Path, lm: LmConfig, weights: Mapping[str, Tensor], vocabulary: Vocabulary, base: Path
) -> tuple[LmConfig, dict[str, Tensor]]:
    """Config and tensors of a base with the adapter of ``folder`` upon it. Raises UserError."""
    config, adapters = read_adapter(folder, lm, weights, vocabulary, base)
    inside = {name.rsplit(".", 1)[0] for name in adapters}
    return config, {_below(name, inside): t for name, t in weights.items()} | adapters


def read_adapter(
    folder: Path, lm: LmConfig, weights: Mapping[str, Tensor], vocabulary: Vocabulary, base: Path
) -> tuple[LmConfig, dict[str, Tensor]]:
    """The base's config with adapters, and their tensors. Raises UserError naming what is wrong."""
    try:
        config = parse_json((folder / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not valid JSON ({error}); copy it again") from None
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).exists():
            raise UserError(f"{folder / PICKLE}: a pickle can run code and is not opened")
        raise UserError(f"{file}: is missing; copy the folder again")
    try:
        with safe_open(file, framework="pt") as opened:
            given = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            mark = (opened.metadata() or {}).get(BASE_MARK)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({str(error)[:160]}); copy it again") from None
    try:
        made = from_peft(config, given, lm, weights, vocabulary, str(folder))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG}: damaged ({str(error)[:160]}); copy it again") from None
    if mark is not None and lm.linear.kind == "dense" and mark != base_mark(weights):
        name = config.get("base_model_name_or_path") or "its own"
        raise UserError(
            f"{folder}: it was trained on the weights of another base ({name}) than {base}, of the "
            "same shape; name that one"
        )
    return made


def read_model(folder: Path) -> tuple[LmConfig, dict[str, Tensor], Vocabulary]:
    """Config, tensors and vocabulary of a saved language model. Raises UserError."""
    values: dict[str, Any] = files.read_config(folder)
    if values.get("kind") != "lm":
        raise UserError(f"{folder}: a saved '{values.get('kind')}', not a language model")
    lm = validate(LmConfig, values, str(folder / "config.json"))
    tensors = files.load_tensors(folder)
    return lm, tensors, Vocabulary.load(folder / "vocabulary.json")


def _below(name: str, inside: set[str]) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.base.{last}" if path in inside else name
