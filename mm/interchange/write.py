"""`mm export`: a saved model to a folder in Hugging Face's layout.

V ids of the checkpoint, D model.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mm.config import validate
from mm.data.chat.template import END, JINJA, ChatTemplate, template_beside
from mm.errors import UserError
from mm.interchange.check import Report, compare
from mm.interchange.family import Family, Settings
from mm.interchange.read import HEAD, TABLE, TEXT, shapes_of
from mm.interchange.weights import Checkpoint, Planned, write_shards
from mm.model import folder as files
from mm.model.model import LmConfig, Model
from mm.reading import parse_json
from mm.registry import FAMILIES, SURGERIES
from mm.surgery.base import Operated
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.hf import FILE, HfConfig, HfTokenizer
from mm.vocabulary import Vocabulary

log = logging.getLogger(__name__)
MOST = 5 * 10**9  # bytes of a file of weights
# Settings of training alone, which a checkpoint does not hold.
TRAINING = {"code_init", "recompute", "dropout", "z_loss", "bias_rate", "capacity"}


def export_model(
    folder: str | Path, out: str | Path, *, check: bool = True, most: int = MOST
) -> Report | None:
    """Write a saved model so that `transformers` and what builds on it load it.

    Args:
        folder: of a run, or of a saved model.
        check: compare logits and a greedy continuation with `transformers` before it is written.
        most: bytes of one file.
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
    family, config = fitting(lm)
    tokenizer = own_tokenizer(folder, vocabulary)
    tokens = tokenizer.config
    config |= {
        "architectures": [family.architecture],
        "model_type": family.kind,  # type: ignore[attr-defined]
        "vocab_size": tokens.vocab_size,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if len(tokens.eos) == 1 else tokens.eos or None,
        "pad_token_id": None,
    }
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        aliases = parse_json((file.metadata() or {}).get(files.ALIASES, "{}"))
        names = [*file.keys(), *aliases]
        given = Checkpoint(dict.fromkeys(names, file), folder)
        read = lambda name: given[aliases.get(name, name)]
        kind = given.dtype(TABLE)
        config["dtype"] = str(kind).removeprefix("torch.")
        plan = plan_of(family, lm, vocabulary, tokens, read)
        plan = [p._replace(dtype=kind) for p in plan]
        with files.whole(out) as part:
            write_shards(part, plan, most)
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (part / FILE).write_bytes(tokenizer.source)
            for name, content in tokenizer.beside.items():
                (part / name).write_bytes(content)
            write_template(part, ChatTemplate.load(folder), tokenizer)
            return compare(folder, part, lambda model: fold_model(model, tokens)) if check else None


def merge(folder: Path, lm: LmConfig, vocabulary: Vocabulary, out: Path) -> None:
    """Write a saved model whose adapters are part of their matrices."""
    before = Operated(lm, files.load_tensors(folder / "model.safetensors"), vocabulary)
    after = SURGERIES.parse("merge_lora").apply(before, None)
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


def fitting(lm: LmConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config, read back, gives ``lm``, and that config.

    Raises UserError naming the key in which the nearest family differs.
    """
    if list(lm.heads) != ["tokens"] or lm.heads["tokens"].kind != "softmax":
        raise UserError("model.heads: only one `softmax` head named 'tokens' has an equal")
    if lm.adapters:
        raise UserError(f"model.adapters: {', '.join(lm.adapters)} has no equal in a text model")
    nearest: tuple[int, str] | None = None
    for kind in FAMILIES:
        family = FAMILIES.parse(kind)
        assert isinstance(family, Family)
        try:
            config = family.config(lm)
            back = validate(LmConfig, family.model(Settings(config, kind)), kind)
        except (UserError, ValueError, AttributeError, TypeError, KeyError):
            continue  # not even the same kinds of layers
        faults = differences(meaning(lm), meaning(back))
        if not faults:
            return family, config
        if nearest is None or len(faults) < nearest[0]:
            nearest = len(faults), f"nearest is '{kind}', but {faults[0]}"
    why = nearest[1] if nearest else f"none of {', '.join(FAMILIES)} has such layers"
    raise UserError(f"no model of Hugging Face's is like this one: {why}")


def meaning(lm: LmConfig) -> dict[str, Any]:
    """The settings that change what a model computes, layer by layer."""
    values = lm.to_dict()
    stack: Any = lm.backbone
    backbone = values["backbone"]
    if hasattr(stack, "words"):
        mixers = [stack.mixer(word).to_dict() for word in stack.words()]
        for mixer in mixers:
            H, G, K = stack.mixer(stack.words()[0]).sizes(lm.d_model)
            mixer |= {"heads": H, "kv_heads": G, "head_dim": K}
            if mixer.get("query_scale") == K**-0.5:
                mixer["query_scale"] = None
        blocks = [stack.blocks.get(word, stack.block).to_dict() for word in stack.words()]
        for key in ("pattern", "depth", "mixers", "block", "blocks"):
            backbone.pop(key, None)
        backbone |= {"layers": mixers, "wiring": blocks}
        ffn = backbone.get("ffn") or {}
        if ffn.get("kind") == "swiglu":
            ffn["hidden"] = ffn["hidden"] or -(-8 * lm.d_model // 96) * 32
    scale = values["embedder"].get("scale")
    values["embedder"]["scale"] = lm.d_model**0.5 if scale is None else scale
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


def own_tokenizer(folder: Path, vocabulary: Vocabulary) -> HfTokenizer:
    """The text tokenizer of an imported model. Raises UserError where it is another."""
    place = folder / "tokenizers" / TEXT
    tokenizer = load_tokenizer(place) if place.is_dir() else None
    if not isinstance(tokenizer, HfTokenizer) or vocabulary.modalities != (TEXT,):
        raise UserError(
            f"{folder}: only a model of text alone, whose tokenizer came by `mm import`, can be "
            f"exported; this one has: {', '.join(vocabulary.modalities) or 'nothing'}"
        )
    return tokenizer


def plan_of(
    family: Family, lm: LmConfig, vocabulary: Vocabulary, tokens: HfConfig, read: Any
) -> list[Planned]:
    """What is written, tensor by tensor; ``read``: our tensor of a name."""
    table, head, _ = family.table
    tied: Any = lm.heads["tokens"]
    shapes, V = shapes_of(lm, vocabulary), tokens.vocab_size
    dtype = read(TABLE).dtype
    size = (V, lm.d_model)
    fold = lambda name: fold_rows(read(name), tokens, name == TABLE, tied.tied)
    plan = [Planned(table, size, dtype, lambda: fold(TABLE))]
    if not tied.tied:
        plan.append(Planned(head, size, dtype, lambda: fold(HEAD)))
    for line in family.entries(lm):
        on_meta = line.part.split(meta(shapes[line.ours]))
        for i, name in enumerate(line.theirs):
            make = lambda line=line, i=i: line.part.split(read(line.ours))[i]
            plan.append(Planned(name, tuple(on_meta[i].shape), dtype, make))
    return plan


def meta(shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape, without values."""
    return torch.empty(shape, device="meta")


def fold_rows(table: Tensor, tokens: HfConfig, embeds: bool, tied: bool) -> Tensor:
    """A checkpoint's rows of ours; what training did to begin and end goes to its own ids.

    Begin counts where it is read, end where it is written. Where one row is both and tied, what is
    written counts.
    """
    begin, end, rows = table[-tokens.vocab_size - 2], table[-tokens.vocab_size - 1], None
    own = table[-tokens.vocab_size :]
    first = next(iter(tokens.eos), None)
    starts = tokens.bos if tokens.bos is not None else first
    for id, row, counts in ((starts, begin, embeds), (first, end, tied or not embeds)):
        if id is not None and counts and not own[id].equal(row):
            rows = own.clone() if rows is None else rows
            rows[id] = row
    return own if rows is None else rows


def fold_model(model: Model, tokens: HfConfig) -> None:
    """`fold_rows` of a built model."""
    head: Any = model.heads["tokens"]
    with torch.no_grad():
        for weight, embeds in ((model.embedder.weight, True), (head.weight, False)):
            weight[-tokens.vocab_size :] = fold_rows(weight, tokens, embeds, head.tied)
