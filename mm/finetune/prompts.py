"""Prompts of the samples: some of the user's held-out values, as files of the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.data.shards.reader import ShardSet
from mm.finetune.base import Base
from mm.finetune.data import Amount, Data
from mm.finetune.learnt import directions_of
from mm.own_data.plan import Chosen
from mm.tasks.base import having, spread

PROMPTS = 4  # of each kind


def prompts_of(base: Base, data: Data, amount: Amount, out: Path) -> Chosen | None:
    """Prompts that exist, each asked for what the data teach; None without raw values.

    Args:
        out: folder of the files of pictures and sounds.
    """
    if data.raw is None or data.found is None:
        return None
    kinds = {kind: names for kind, names in base.kinds.items() if kind in data.found.modalities}
    text = kinds.get("text", [None])[0]
    media = {kind: names for kind, names in kinds.items() if kind != "text"}
    made: list[dict[str, str]] = []
    if text and not media:
        made = [{text: f"{word}\n", "to": text} for word in data.found.starts[:PROMPTS]]
    tasks = directions_of(base, data, amount)
    learnt = tasks.value if tasks is not None else {}
    for kind, names in media.items():
        read = next((m for m in names if base.vocabulary.spec(m).continuous), names[0])
        if f"{read}>{text}" in learnt:
            files = held_out(data.raw, data.split, kind, out)
            made += [{read: str(file), "to": text} for file in files]
        words = data.found.classes.words if data.found.classes else data.found.starts
        drawn = next((m for m in names if f"{text}>{m}" in learnt), None)
        made += [{text: word, "to": drawn} for word in words[: PROMPTS // 2]] if drawn else []
    return Chosen(made, "of the held-out part") if made else None


def held_out(raw: Path, split: str, kind: str, out: Path) -> list[Path]:
    """Some values of a split as files. Raises UserError where the split is not there."""
    shards = ShardSet.open(raw, split=split)
    found = having(shards, (kind,))
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for k in spread(len(found), PROMPTS):
        value: Any = shards.raw(found[k], kind)
        suffix, content = value
        file = out / f"{kind}_{k:05d}.{suffix.rpartition('.')[2]}"
        file.write_bytes(content)
        files.append(file)
    return files
