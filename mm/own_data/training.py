"""The backbone's run: data, tasks, model, budget, figures and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.modalities.base import raw_modality
from mm.own_data.look import Found
from mm.own_data.plan import Chosen, plain
from mm.own_data.tokenizers import CELLS, TokenizerPlan

ROW, LONGEST_ROW = 256, 1024  # ids
SAMPLES = 8000  # pairs to train on that are enough without varied copies
COPIES, COPIES_OF_PICTURES = 8, 16  # at most; docs/lab-notes.md has what more of them gave
TEXT_WEIGHT, DROPOUT = 5.0, 0.1  # of few pictures
GRID = {"kind": "sum", "position": {"kind": "grid", "max_cells": CELLS**2}}
PROMPTS = 4  # of each kind
VIEWS, VIEWED = 8, 1000  # of a picture that is measured, and the most of those
Speed = Callable[[Mapping[str, Any], int, int, int], float]  # model, ids, row, rows -> s a step


def few_pictures(found: Found, n_train: int) -> bool:
    """Pictures of classes and nothing else, so few that a class would be learnt by heart."""
    return {*found.modalities} <= {"image", "text"} and bool(found.classes) and n_train < SAMPLES


def tasks(found: Found, names: Mapping[str, str], n_train: int) -> Chosen | None:
    """Which directions are learnt, by weight; None where there is one modality.

    Args:
        names: modality of the source -> modality of its tokens.
        n_train: samples to train on.
    """
    kinds = [names[m] for m in found.modalities]
    if len(kinds) == 1:
        return None
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    text = names.get("text")
    weigh = lambda a, b: 0.7 if found.classes and b == text else 0.3 if found.classes else 0.45
    values = {f"{a}>{b}": weigh(a, b) for a, b in pairs}
    why = "all directions between what a sample has"
    if found.classes:
        why += "; naming the class counts most"
    if few_pictures(found, n_train):  # `a+b`: both cost loss, in this order
        values = {task.replace(f">{text}", f"+{text}"): w for task, w in values.items()}
        why += ", and the picture before it is learnt, too: few class words alone are soon learnt "
        why += "by heart"
    if len(found.pairs) > 1 or (text and not found.classes):
        values |= {kind: 0.1 for kind in kinds}
        why += "; and each alone"
    return Chosen(values, why)


def copies(found: Found, n: int) -> Chosen | None:
    """Varied copies of every training sample; None where there are enough samples, or only text."""
    most = COPIES_OF_PICTURES if few_pictures(found, n) else COPIES
    wanted = min(most, most * SAMPLES // COPIES // max(1, n))
    if wanted < 2 or not {"image", "audio"} & {*found.modalities}:
        return None
    return Chosen(wanted, f"{n:,} samples to train on are few: {wanted - 1} varied copies of each")


def row_length(found: Found, plans: Sequence[TokenizerPlan]) -> tuple[Chosen, bool]:
    """Ids of a row, and whether some documents are longer."""
    longest = max(
        sum(p.longest for p in plans if raw_modality(p.modality).kind in pair)
        for pair in found.pairs
    )
    if len(found.modalities) == 1 and longest > 2 * ROW:
        return Chosen(2 * ROW, f"the longest document has about {longest:,} ids: it is cut"), True
    if longest > LONGEST_ROW:
        why = (
            f"the longest sample has about {longest:,} ids: rows of that length cost too much here"
        )
        return Chosen(LONGEST_ROW, why), True
    if {*found.modalities} == {"image", "text"} and 3 * longest <= ROW:  # all about as long
        mean = sum(p.mean for p in plans)
        return Chosen(
            8 * round(mean * 4 / 8 + 1), "four samples fill it, with little padding"
        ), False
    rounded = max(ROW, -(-longest // 64) * 64)
    return Chosen(rounded, f"the longest sample has about {longest:,} ids"), False


def train_config(
    found: Found,
    out: Path,
    plans: Sequence[TokenizerPlan],
    names: Mapping[str, str],
    *,
    split: str,
    share: float,
    seconds: float,
    speed: Speed,
    n_train: int,
    copies: int,
) -> dict[str, Any]:
    """The Run YAML of the backbone.

    Args:
        split: what the figures are measured on.
        share: of train that becomes val.
        seconds: what is left of the budget for this training.
        n_train: samples to train on, and ``copies`` of each.
    """
    row, too_long = row_length(found, plans)
    batch = 8
    mean = sum(p.mean * n for p in plans for pair, n in found.pairs.items()
               if raw_modality(p.modality).kind in pair)  # fmt: skip
    per_document = min(row.value, mean / found.samples)
    few = few_pictures(found, n_train)
    model = model_of_few_pictures() if few else model_config(plans)
    ids = 16 + sum(p.n_ids for p in plans)
    step = speed(plain(model), ids, row.value, batch)
    epoch = max(1, round(copies * n_train * mean / found.samples / (0.95 * row.value * batch)))
    steps = budget(found, step, seconds, epoch, copies)
    data: dict[str, Any] = {
        "kind": "packed",
        "seq_len": row,
        "batch_size": batch,
        "max_documents": max(2, min(32, round(1.5 * row.value / per_document))),
        "sources": [{"path": str(out / "tokens")}],
    }
    objective: dict[str, Any] = {"kind": "next_token"}
    if few:
        weights = {names["text"]: TEXT_WEIGHT}
        objective["weights"] = Chosen(weights, "a class word is few ids beside its picture's")
    directions = tasks(found, names, n_train)
    if directions is not None:
        objective["transform"] = {
            "kind": "any_to_any",
            "condition_dropout": Chosen(0.1, "for guidance: --cfg-scale of mm generate"),
            "tasks": directions,
        }
    if too_long:
        _shorten(data, objective, found, plans, row.value)
    return {
        "name": "first",
        "out": str(out / "runs"),
        "evaluate": Chosen(False, "mm eval is a step of its own"),
        "export": Chosen(
            "best", "small data are learnt by heart in the end: the best on val is kept"
        ),
        "vocabulary": str(out / "tokens" / "vocabulary.json"),
        "tokenizers": {p.modality: str(out / "tokenizers" / p.modality) for p in plans},
        "model": model,
        "stages": [
            {
                "data": data,
                "objective": objective,
                "optimizer": {
                    "kind": "adamw",
                    "lr": 3.0e-3 if few else 2.0e-3,
                    "betas": [0.9, 0.98],
                    "weight_decay": 0.1,
                },
                "schedule": {"shape": "wsd", "warmup": min(100, steps.value // 10), "decay": 0.5},
                "budget": {"steps": steps},
                "tasks": figures(
                    found, out, plans, split, row.value, views(found, split, share) if few else None
                ),
            }
        ],
        "engine": {"zero_stage": 1, "precision": "auto", "grad_clip": 1.0},
        "checkpoints": {"every": max(50, steps.value // 4), "keep_last": 1},
        "callbacks": [
            "progress",
            {
                "kind": "samples",
                "every": Chosen(max(1, steps.value // 4), "four times"),
                "max_tokens": 128,
                "prompts": prompts(found, names, split, share),
            },
        ],
    }


def model_of_few_pictures() -> dict[str, Any]:
    """A small model that sees neighbours in the grid: settings measured in docs/lab-notes.md."""
    width = CELLS + 2
    near = "a convolution that reaches a row of the grid back: a code meets its neighbours"
    return {
        "kind": "lm",
        "d_model": Chosen(128, "few pictures: more passes of a smaller model"),
        "embedder": Chosen(GRID, "which cell of the picture a code stands in"),
        "backbone": {
            "kind": "stack",
            "depth": 6,
            "pattern": Chosen("2*short_conv local_attention", near),
            "mixers": {
                "short_conv": {"conv_size": Chosen(width, f"a row of {CELLS} codes and two")},
                "local_attention": {"heads": 4, "kv_heads": 2},
            },
            "ffn": {"kind": "swiglu", "hidden": 352},
            "block": Chosen(
                {"kind": "prenorm", "dropout": DROPOUT}, "few pictures are learnt by heart without"
            ),
        },
    }


def model_config(plans: Sequence[TokenizerPlan]) -> dict[str, Any]:
    """Griffin's pattern at the width that the figures of docs/results.md were reached with."""
    model: dict[str, Any] = {"kind": "lm", "d_model": 192}
    if any(p.modality == "image" for p in plans):
        model["embedder"] = Chosen(GRID, "which cell of the picture a code stands in")
    why = "cheap on a CPU; or attention, or any words of docs/mixers.md"
    dropout = {"kind": "prenorm", "dropout": 0.1}
    model["backbone"] = {
        "kind": "stack",
        "depth": 6,
        "pattern": Chosen("2*rg_lru local_attention", why),
        "mixers": {"local_attention": {"heads": 6, "kv_heads": 2}},
        "ffn": {"kind": "swiglu", "hidden": 512},
        "block": Chosen(dropout, "small data are learnt by heart without"),
    }
    return model


def budget(found: Found, step: float, seconds: float, epoch: int, copies: int) -> Chosen:
    """Steps that fit the time, but no more passes over the data than pay."""
    fits = max(20, int(seconds / step))
    passes = max(5, 20 // copies) if found.classes else 8
    pays = passes * epoch
    time = f"{step:.2f} s a step on this machine, {epoch} steps a pass"
    if fits <= pays:
        return Chosen(fits, f"what fits the time ({time})")
    return Chosen(pays, f"{passes} passes over the data; the time would hold {fits:,} ({time})")


def _shorten(
    data: dict[str, Any],
    objective: dict[str, Any],
    found: Found,
    plans: Sequence[TokenizerPlan],
    row: int,
) -> None:
    """Documents over a row are cut where they are one run of ids, else their text is shortened."""
    if len(found.modalities) == 1:
        data["cut"] = Chosen(True, "a document over seq_len becomes several, so none is left out")
        return
    others = sum(p.longest for p in plans if not raw_modality(p.modality).is_text)
    text = next((p.modality for p in plans if raw_modality(p.modality).is_text), None)
    if text and others + 64 <= row:
        chunk = {"kind": "chunk", "modality": text, "tokens": row - others - 4, "window": "first"}
        objective["transform"] = Chosen(
            [objective["transform"], chunk], "the beginning of a text that a row cannot hold"
        )


def views(found: Found, split: str, share: float) -> Chosen | None:
    """Views of a picture that is measured, itself one; None where there are too many to measure."""
    if (found.splits.get(split) or found.held_out(share)) > VIEWED:
        return None
    return Chosen(VIEWS, f"also the answer that it and {VIEWS - 1} varied copies give most often")


def figures(
    found: Found,
    out: Path,
    plans: Sequence[TokenizerPlan],
    split: str,
    row: int,
    views: Chosen | None = None,
) -> list[dict[str, Any]]:
    """The tasks of `mm eval`."""
    data, text = (
        str(out / "data"),
        next((p.modality for p in plans if raw_modality(p.modality).is_text), None),
    )
    made: list[dict[str, Any]] = []
    if found.classes and text:
        n = len(found.classes.words)
        for source in ("image", "audio"):
            if source in found.modalities:
                task: dict[str, Any] = {"kind": "recognition", "data": data, "split": split}
                task["sources"] = [source]
                task["to"] = text
                task["classes"] = Chosen(
                    list(found.classes.words), f"{n} of them: the samples' classes"
                )
                if source == "image":
                    task["linear_probe"] = Chosen(
                        True, "what logistic regression on pixels reaches, beside"
                    )
                    if views is not None:
                        task["views"] = views
                made.append(task)
    measure: dict[str, Any] = {"kind": "bits_per_byte", "data": data, "split": split, "limit": 2000}
    measure["max_tokens"] = Chosen(row - 2, "windows as long as in training")
    if found.classes and text and len(plans) > 1:
        measure["modalities"] = [p.modality for p in plans if p.modality != text]
    return [*made, measure]


def prompts(found: Found, names: Mapping[str, str], split: str, share: float) -> Chosen:
    """Prompts that exist: class words or beginnings of texts, and held-out files."""
    kinds, text = [names[m] for m in found.modalities], names.get("text")
    media = [kind for kind in kinds if kind != text]
    words = list((found.classes.words if found.classes else found.starts)[:PROMPTS])
    made: list[dict[str, str]] = []
    if text and not media:
        made = [{text: f"{word}\n", "to": text} for word in words]
    for to in media:
        made += [{text: word, "to": to} for word in words] if text else [{"to": to}] * 2
    for source in media:
        files = found.held_out_files(source, split, share)
        for file in [files[i * len(files) // 4] for i in (1, 3)] if len(files) > 1 else files:
            made += [{source: str(file), "to": to} for to in kinds if to != source]
    return Chosen(made, f"words of the data{', and files of the split ' + split if media else ''}")
