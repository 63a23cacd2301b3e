"""`mm export`: a saved model to a folder in Hugging Face's layout.

V ids of the checkpoint, D model.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import validate
from mm.data.chat.choose import template_beside
from mm.data.chat.template import END, JINJA, ChatTemplate
from mm.errors import UserError
from mm.interchange.check import Report, compare
from mm.interchange.explicit import make_explicit
from mm.interchange.family import Family, Settings
from mm.interchange.ids import Ids, ids_of
from mm.interchange.read import HEAD, PLACES, TABLE, shapes_of
from mm.interchange.weights import Checkpoint
from mm.model import folder as files
from mm.model.model import LmConfig
from mm.model.tensor_file import Planned
from mm.model.weight_files import few_names, open_weights, write_weights
from mm.reading import parse_json
from mm.registry import FAMILIES, SURGERIES
from mm.surgery.base import Operated
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.hf import FILE, ORIGIN, HfTokenizer
from mm.vocabulary import Vocabulary

log = logging.getLogger(__name__)
# Settings of training alone, which a checkpoint does not hold.
TRAINING = {"code_init", "noise", "recompute", "dropout", "z_loss", "bias_rate", "capacity"}


def export_model(
    folder: str | Path, out: str | Path, *, check: bool = True, most: int | None = None
) -> Report | None:
    """Write a saved model so that `transformers` and what builds on it load it.

    Args:
        folder: of a run, or of a saved model.
        check: compare logits and a greedy continuation with `transformers` before it is written.
        most: bytes of one file; default `mm.model.weight_files.MOST`.
    Raises:
        UserError: the model has no equal, by key; nothing is written then.
    """
    folder, out = Path(folder), Path(out)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    values = files.read_config(folder)
    if values.get("kind") != "lm":
        raise UserError(f"{folder}: a saved '{values.get('kind')}', not a language model")
    lm = validate(LmConfig, values, str(folder / "config.json"))
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    if lm.linear.kind in ("lora", "nf4"):
        with tempfile.TemporaryDirectory() as temporary:
            merged = Path(temporary) / "model"
            merge(folder, lm, vocabulary, merged)
            return export_model(merged, out, check=check, most=most)
    require_text(folder, lm, vocabulary)
    lm = make_explicit(lm)
    ids = ids_of(folder, vocabulary)
    origin = parse_json(ids.tokenizer.beside.get(ORIGIN, b"{}"))
    family, config, factor = fitting_scaled(lm, origin.get("model_type"))
    tokenizer, tokens = ids.tokenizer, ids.config
    values_of = [spec.modality for spec in vocabulary.ranges if spec.continuous]
    readers = {m: load_tokenizer(folder / "tokenizers" / m) for m in values_of}
    text = {key: value for key, value in origin.items() if key == PLACES} | {
        "vocab_size": tokens.vocab_size,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if len(tokens.eos) == 1 else tokens.eos or None,
        "pad_token_id": None,
    }
    outer = {key: value for key, value in origin.items() if key in family.origin} | {
        "architectures": [family.architecture],
        "model_type": family.kind,  # type: ignore[attr-defined]
    }
    config = family.finish(config, outer, text, readers)
    stored, aliases = open_weights(folder)
    given = Checkpoint(stored, folder)

    def read(name: str) -> Tensor:
        return given[aliases.get(name, name)]

    kind = given.dtype(TABLE)
    config["dtype"] = str(kind).removeprefix("torch.")
    plan = plan_of(family, lm, vocabulary, ids, read, factor)
    plan = [p._replace(dtype=kind) for p in plan]
    with files.whole(out) as part:
        write_weights(part, plan, most)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / FILE).write_bytes(tokenizer.source)
        for name, content in tokenizer.beside.items():
            if name != ORIGIN:
                (part / name).write_bytes(content)
        write_template(part, ChatTemplate.load(folder), tokenizer)
        for name, values in family.beside(lm, readers, tokenizer.beside).items():
            (part / name).write_text(json.dumps(values, indent=2) + "\n")
        if not check:
            return None
        media = family.media(part, Settings(config, str(part)), readers)
        return compare(folder, part, ids.fold_model, auto=family.auto, media=media)


def merge(folder: Path, lm: LmConfig, vocabulary: Vocabulary, out: Path) -> None:
    """Write a saved model whose adapters are part of their matrices."""
    before = Operated(lm, files.open_tensors(folder), vocabulary)
    surgery: Any = SURGERIES.parse("merge_lora")
    after = surgery.apply(before, None)
    tokenizers = {path.name: path for path in (folder / "tokenizers").iterdir()}
    files.save_model(out, after.config.to_dict(), after.tensors, vocabulary, tokenizers)
    if (template := ChatTemplate.load(folder)) is not None:
        template.save(out)


def write_template(out: Path, template: ChatTemplate | None, tokenizer: HfTokenizer) -> None:
    """The chat template of the training, where it is not the one that the tokenizer brings."""
    if template is None or template.source == template_beside(tokenizer):
        return
    if template.stop == END:
        log.warning("no chat template is exported: a turn ends with a text, which no token says")
        return
    (out / JINJA).write_text(template.source, encoding="utf-8")


def require_text(folder: Path, lm: LmConfig, vocabulary: Vocabulary) -> None:
    """Raise UserError naming each part of a model that no language model of text has."""
    inline = {spec.modality for spec in vocabulary.ranges if spec.inline}
    faults = [f"vocabulary.{name}" for name in vocabulary.modalities[1:] if name not in inline]
    faults += [f"model.adapters.{name}" for name in lm.adapters if name not in inline]
    faults += [
        f"model.heads.{name} ('{head.kind}')"
        for name, head in lm.heads.items()
        if name != "tokens" or head.kind != "softmax"
    ]
    stack: Any = lm.backbone
    if not hasattr(stack, "words"):
        faults.append(f"model.backbone ('{stack.kind}')")
    else:
        families: list[Any] = [FAMILIES.get(kind) for kind in FAMILIES]
        known = {name for family in families for name in family.mixers}
        mixers = {word: stack.mixer(word).kind for word in dict.fromkeys(stack.words())}
        faults += [f"mixers.{w} ('{kind}')" for w, kind in mixers.items() if kind not in known]
    if "tokens" not in lm.heads:
        faults.append("model.heads (none is 'tokens')")
    if not vocabulary.modalities:
        faults.append("vocabulary (no modality)")
    if faults:
        raise UserError(f"{folder}: has no equal in Hugging Face's layout: {'; '.join(faults)}")


def fitting(lm: LmConfig, first: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The first family whose config, read back, gives ``lm``, and that config.

    ``first`` is tried before all others.

    Raises UserError naming the keys in which the nearest family differs.
    """
    nearest: tuple[int, str] | None = None
    stack: Any = lm.backbone
    mixers, refused = {stack.mixer(word).kind for word in stack.words()}, []
    for kind in sorted(FAMILIES, key=lambda kind: kind != first):
        family = FAMILIES.parse(kind)
        assert isinstance(family, Family)
        try:
            config = family.config(lm)
            back = validate(LmConfig, family.model(Settings(config, kind)), kind)
        except UserError as error:
            refused += [f"'{kind}': {error}"] if mixers <= {*family.mixers} else []
            continue
        except (ValueError, AttributeError, TypeError, KeyError):
            continue  # not even the same kinds of layers
        faults = differences(meaning(lm), meaning(back))
        if not faults:
            return family, config
        if nearest is None or len(faults) < nearest[0]:
            # The same key in many layers is one fault.
            each = {re.sub(r"\.\d+\.", ".*.", fault): fault for fault in faults}
            nearest = len(faults), f"nearest is '{kind}', but {few_names([*each.values()], 8)}"
    why = nearest[1] if nearest else "; ".join(refused[:3]) or "none mixes such layers"
    raise UserError(f"no model of Hugging Face's is like this one: {why}")


def fitting_scaled(lm: LmConfig, first: str | None = None) -> tuple[Family, dict[str, Any], float]:
    """`fitting`, and the factor of the embeddings that becomes part of their rows.

    It can where the head has rows of its own.
    """
    given, head = lm.embedder, lm.heads["tokens"]
    try:
        return *fitting(lm, first), 1.0
    except UserError:
        if given.kind != "sum" or head.tied:  # type: ignore[union-attr]
            raise
        plain = lm.model_copy(update={"embedder": given.model_copy(update={"scale": 1.0})})
        return *fitting(plain, first), given.scale


def meaning(lm: LmConfig) -> dict[str, Any]:
    """The settings that change what a model computes, layer by layer."""
    lm = make_explicit(lm)
    values = lm.to_dict()
    stack: Any = lm.backbone
    backbone = values["backbone"]
    words = stack.words()
    for key in ("pattern", "depth", "mixers", "block", "blocks"):
        backbone.pop(key, None)
    for adapter in values["adapters"].values():  # they stand in the file of the processor
        for key in ("mean", "std"):
            adapter.get("inner", {}).pop(key, None)
    backbone["layers"] = [stack.mixer(word).to_dict() for word in words]
    backbone["wiring"] = [stack.blocks.get(word, stack.block).to_dict() for word in words]
    return values


def differences(ours: Any, theirs: Any, path: str = "model") -> list[str]:
    """Keys in which two settings differ, those of training aside."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [k for k in {**ours, **theirs} if k not in TRAINING]
        pairs = [(f"{path}.{k}", ours.get(k), theirs.get(k)) for k in keys]
        return [fault for p, a, b in pairs for fault in differences(a, b, p)]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
        return [fault for p, a, b in pairs for fault in differences(a, b, p)]
    return [] if ours == theirs else [f"{path} is {ours!r}, there {theirs!r}"]


def plan_of(
    family: Family, lm: LmConfig, vocabulary: Vocabulary, ids: Ids, read: Any, factor: float
) -> list[Planned]:
    """What is written, tensor by tensor.

    Args:
        read: our tensor of a name.
        factor: of the embeddings, which the family has none for.
    """
    table, head, _ = family.table
    tied: Any = lm.heads["tokens"]
    shapes, V = shapes_of(lm, vocabulary), ids.config.vocab_size
    dtype = read(TABLE).dtype
    size = (V, lm.d_model)
    fold = lambda name: ids.fold(read(name), name == TABLE, tied.tied)
    rows = lambda: fold(TABLE) if factor == 1.0 else fold(TABLE) * factor
    plan = [Planned(table, size, dtype, rows)]
    if not tied.tied:
        plan.append(Planned(head, size, dtype, lambda: fold(HEAD)))
    for line in family.entries(lm):
        on_meta = line.part.split([meta(shapes[name]) for name in line.own])
        for i, name in enumerate(line.theirs):
            make = lambda line=line, i=i: line.part.split([read(n) for n in line.own])[i]
            plan.append(Planned(name, tuple(on_meta[i].shape), dtype, make))
    return plan


def meta(shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape, without values."""
    return torch.empty(shape, device="meta")
