"""The backbone's run: data, tasks, model, budget, figures and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.data.modalities.base import raw_modality
from mm.own_data import pictures
from mm.own_data.look import Found
from mm.own_data.plan import Chosen, plain
from mm.own_data.tokenizers import PIXELS, TokenizerPlan

ROW, LONGEST_ROW = pictures.ROW, 1024  # ids
COPIES, COPIES_OF_PICTURES = 8, 16  # at most; docs/lab-notes.md has what more of them gave
TEXT_WEIGHT = 5.0  # of few pictures
PROMPTS = 4  # of each kind


class Work(NamedTuple):
    """What an optimizer step reads: ``rows`` of ``row`` ids out of ``n_ids``.

    ``values``: of pictures by values, see `mm.own_data.timing.step_seconds`.
    """

    n_ids: int
    row: int
    rows: int
    values: pictures.Values | None = None


Speed = Callable[[Mapping[str, Any], Work], float]  # model, work -> seconds of a step


def tasks(found: Found, names: Mapping[str, str]) -> Chosen | None:
    """Which directions are learnt, by weight; None where there is one modality.

    Args:
        names: modality of the source -> modality of its tokens.
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
    if len(found.pairs) > 1 or (text and not found.classes):
        values |= {kind: 0.1 for kind in kinds}
        why += "; and each alone"
    return Chosen(values, why)


def copies(found: Found, n: int) -> Chosen | None:
    """Varied copies of every training sample; None where there are enough samples, or only text."""
    most = COPIES_OF_PICTURES if pictures.few_pictures(found, n) else COPIES
    wanted = min(most, most * pictures.SAMPLES // COPIES // max(1, n))
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
    few = any(p.modality == PIXELS for p in plans)
    written = [p for p in plans if p.modality != PIXELS]
    row, too_long = row_length(found, written)
    batch = 8
    mean = sum(p.mean * n for p in written for pair, n in found.pairs.items()
               if raw_modality(p.modality).kind in pair) / found.samples  # fmt: skip
    shortest = min(row.value, mean)
    work = Work(16 + sum(p.n_ids for p in plans), row.value, batch)
    if few:
        mean, shortest = pictures.mean_ids(plans), pictures.lengths(plans)[0] / 1.5
        work = work._replace(values=pictures.values(plans))
    model = pictures.model() if few else model_config(plans)
    step = speed(plain(model), work)
    epoch = max(1, round(copies * n_train * mean / (0.95 * row.value * batch)))
    passes = pictures.PASSES if few else max(5, 20 // copies) if found.classes else 8
    steps = budget(step, seconds, epoch, passes)
    data: dict[str, Any] = {
        "kind": "packed",
        "seq_len": row,
        "batch_size": batch,
        "max_documents": max(2, min(32, round(1.5 * row.value / shortest))),
        "sources": [{"path": str(out / "tokens")}],
    }
    objective: dict[str, Any] = {"kind": "next_token"}
    if few:
        data["transform"] = pictures.augment(found, plans)
        weights = {names["text"]: TEXT_WEIGHT}
        objective["weights"] = Chosen(weights, "a class word is few ids beside a picture's")
    directions = pictures.directions(names["text"]) if few else tasks(found, names)
    if directions is not None:
        objective["transform"] = {
            "kind": "any_to_any",
            "condition_dropout": Chosen(0.1, "for guidance: --cfg-scale of mm generate"),
            "tasks": directions,
        }
    if too_long:
        _shorten(data, objective, found, written, row.value)
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
                    "lr": pictures.LR if few else 2.0e-3,
                    "betas": [0.9, 0.98],
                    "weight_decay": 0.1,
                },
                "schedule": {"shape": "wsd", "warmup": min(100, steps.value // 10), "decay": 0.5},
                "budget": {"steps": steps},
                **({"ema": pictures.average()} if few else {}),
                "tasks": figures(
                    found,
                    out,
                    plans,
                    split,
                    row.value,
                    pictures.views(found, split, share) if few else None,
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
                "prompts": prompts(found, names, split, share, by_values=few),
            },
        ],
    }


def model_config(plans: Sequence[TokenizerPlan]) -> dict[str, Any]:
    """Griffin's pattern at the width that the figures of docs/results.md were reached with."""
    model: dict[str, Any] = {"kind": "lm", "d_model": 192}
    if any(p.modality == "image" for p in plans):
        model["embedder"] = Chosen(pictures.GRID, "which cell of the picture a code stands in")
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


def budget(step: float, seconds: float, epoch: int, passes: int) -> Chosen:
    """Steps that fit the time, but no more ``passes`` over the data than pay."""
    fits = max(20, int(seconds / step))
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


def figures(
    found: Found,
    out: Path,
    plans: Sequence[TokenizerPlan],
    split: str,
    row: int,
    views: Chosen | None = None,
) -> list[dict[str, Any]]:
    """The tasks of `mm eval`."""
    data, kinds = str(out / "data"), [p.modality for p in plans]
    text = next((kind for kind in kinds if raw_modality(kind).is_text), None)
    made: list[dict[str, Any]] = []
    if found.classes and text:
        n = len(found.classes.words)
        for source in ("image", "audio"):
            if source in found.modalities:
                task: dict[str, Any] = {"kind": "recognition", "data": data, "split": split}
                task["sources"] = [PIXELS if source == "image" and PIXELS in kinds else source]
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
        measure["modalities"] = [kind for kind in kinds if kind not in (text, PIXELS)]
    return [*made, measure]


def prompts(
    found: Found, names: Mapping[str, str], split: str, share: float, *, by_values: bool = False
) -> Chosen:
    """Prompts that exist: class words or beginnings of texts, and held-out files.

    ``by_values``: pictures are read as values.
    """
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
        read = PIXELS if by_values and source == "image" else source
        for file in [files[i * len(files) // 4] for i in (1, 3)] if len(files) > 1 else files:
            made += [{read: str(file), "to": to} for to in kinds if to != source]
    return Chosen(made, f"words of the data{', and files of the split ' + split if media else ''}")
