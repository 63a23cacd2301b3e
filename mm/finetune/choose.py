"""The YAML of a fine-tuning: what is read, learnt, measured and shown, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm.config import override
from mm.finetune.base import Base
from mm.finetune.data import Amount, Data
from mm.finetune.learnt import objective, sources
from mm.finetune.method import Asked, Method
from mm.own_data import training
from mm.own_data.plan import Chosen, plain

MOST_ROWS, STEPS_A_PASS = 16, 20  # rows of a step at most, and steps of a pass at least
STEPS, PASSES, MOST_PASSES = 300, 3, 20
LONGEST = 1024  # ids of a row, where the base does not say
CHECKPOINT = 4  # a run


class Options(NamedTuple):
    """What the user may say: see `mm finetune --help`."""

    method: Asked = "auto"
    minutes: float = 10.0
    replay: float = 0.5
    changes: Sequence[str] = ()


class Said(NamedTuple):
    """The config, annotated with reasons, and steps of a pass over the data."""

    config: dict[str, Any]
    a_pass: int


def config_of(
    base: Base, data: Data, amount: Amount, out: Path, how: Method, options: Options,
    prompts: Chosen | None,
) -> Said:  # fmt: skip
    """The Run YAML of a method.

    Args:
        prompts: of the samples.
    """
    row = row_length(base, amount)
    rows = min(MOST_ROWS, max(1, round(amount.ids / (row.value * STEPS_A_PASS))))
    rows = 1 << (rows.bit_length() - 1)
    again = base.sources() if options.replay else []
    share = options.replay if again else 0.0
    a_pass = max(1, math.ceil(amount.ids / (0.95 * row.value * rows * (1 - share))))
    passes = min(MOST_PASSES, max(PASSES, STEPS // a_pass))
    steps = Chosen(passes * a_pass, f"{passes} passes of {a_pass} steps")
    stage: dict[str, Any] = {
        "data": {
            "kind": "packed",
            "seq_len": row,
            "batch_size": Chosen(rows, f"about {a_pass} steps a pass over {amount.ids:,} ids"),
            "max_documents": max(2, min(64, round(1.5 * row.value / max(1, amount.mean)))),
            "sources": sources(base, data, amount, again, share),
        },
        "objective": objective(base),
        "optimizer": {
            "kind": "adamw",
            "lr": how.lr,
            "betas": [0.9, 0.98],
            "weight_decay": how.weight_decay,
        },
        "schedule": {"shape": "wsd", "warmup": max(1, min(50, steps.value // 10)), "decay": 0.5},
        "budget": {"steps": steps},
        "tasks": tasks(base, data, amount, row.value),
    }
    if amount.longest > row.value and len(amount.modalities) == 1 and not data.is_chat:
        stage["data"]["cut"] = Chosen(True, "a document over seq_len becomes several")
    init: Any = str(base.folder)
    if base.is_adapted:
        merge = Chosen([{"kind": "merge_lora"}], "the base has adapters: they become its weights")
        init = {"path": init, "surgery": merge}
    callbacks: list[Any] = ["progress", "machine"]
    every = max(1, steps.value // CHECKPOINT)
    if prompts is not None:
        show = {"kind": "samples", "at_start": Chosen(True, "what the base says, beside")}
        callbacks.append({**show, "every": every, "max_tokens": 128, "prompts": prompts})
    config: dict[str, Any] = {
        "name": out.name,
        "out": str(out.parent),
        "evaluate": Chosen(False, "mm eval is a step of its own, of the base too"),
        "export": Chosen("best", "small data are learnt by heart in the end: the best on val")
        if amount.held_out
        else Chosen("last", "nothing is held out"),
        "init_from": init,
        **({"model": dict(how.model)} if how.model else {}),
        "stages": [stage],
        "engine": {"zero_stage": 1, "precision": "auto", "grad_clip": 1.0},
        "checkpoints": {"every": max(50, every), "keep_last": 1},
        "callbacks": callbacks,
    }
    changed = override(plain(config), options.changes)
    return Said(keep_reasons(config, changed), a_pass)


def keep_reasons(old: Any, new: Any) -> Any:
    """``new`` with the reasons of ``old`` where nothing changed."""
    if plain(old) == new:
        return old
    if isinstance(old, Chosen) and isinstance(old.value, Mapping) and isinstance(new, Mapping):
        return Chosen(keep_reasons(old.value, new), old.why)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        fresh = lambda value: Chosen(value, "as you said")
        return {k: keep_reasons(old[k], v) if k in old else fresh(v) for k, v in new.items()}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [keep_reasons(a, b) for a, b in zip(old, new, strict=True)]
    return Chosen(new, "as you said")


def row_length(base: Base, amount: Amount) -> Chosen:
    """Ids of a row: the longest sample's, but no more than the base was trained with."""
    known = getattr(base.run.stages[-1].data, "seq_len", None) if base.run else None
    most = known or LONGEST
    longest = f"the longest sample has {amount.longest:,} ids"
    if known and amount.longest <= known:
        return Chosen(known, f"as the base was trained; {longest}")
    if amount.longest > most:
        return Chosen(most, f"{longest}: rows as {'the base has' if known else 'fit a start'}")
    return Chosen(max(training.ROW, -(-amount.longest // 64) * 64), longest)


def tasks(base: Base, data: Data, amount: Amount, row: int) -> Any:
    """Figures on the user's held-out part, then those of the base's own run."""
    made: list[dict[str, Any]] = []
    if data.raw is not None and data.found is not None:
        made = own_tasks(base, data, row)
    elif amount.held_out:
        made = [{"kind": "token_loss", "data": str(data.tokens), "limit": 500}]
    return Chosen([*made, *base.tasks()], "before and after; base.*: what may be forgotten")


def own_tasks(base: Base, data: Data, row: int) -> list[dict[str, Any]]:
    """Accuracy or error rates of what is written, and bits per byte, on the held-out part."""
    assert data.found is not None
    found, made = data.found, []
    here = {"data": str(data.raw), "split": data.split}
    kinds = {kind: names for kind, names in base.kinds.items() if kind in found.modalities}
    text = kinds.get("text", [None])[0]
    media = [names for kind, names in kinds.items() if kind != "text"]
    for names in media if text else ():
        read = next((m for m in names if base.vocabulary.spec(m).continuous), names[0])
        given = {"sources": [read], "to": text, **here}
        if found.classes:
            made.append({"kind": "recognition", **given, "classes": list(found.classes.words)})
        elif found.text is not None:
            made.append({"kind": "text_error", **given, "limit": 500})
    spelt = [text] if text and not (found.classes and media) else []
    written = [m for names in media for m in names if not base.vocabulary.spec(m).continuous]
    modalities = [*spelt, *written]
    measure = {"kind": "bits_per_byte", **here, "limit": 1000, "max_tokens": max(8, row - 2)}
    return [*made, {**measure, "modalities": modalities}] if modalities else made
