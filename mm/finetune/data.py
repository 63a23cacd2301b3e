"""The user's data as the base reads them: which commands pack them, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mm.data.modalities.base import get_modality
from mm.data.shards.manifest import MANIFEST, read_manifest, split_samples
from mm.data.shards.reader import ShardSet
from mm.data.sources.chat import ChatSource
from mm.data.sources.detect import open_source
from mm.errors import UserError
from mm.finetune.base import Base
from mm.own_data import training
from mm.own_data.choose import Options, packing
from mm.own_data.look import Found, look
from mm.own_data.plan import Chosen, Step
from mm.trainer.warm_start import TOKENIZERS, WORDS

SHARE = 0.1  # of conversations that are held out
MEASURED = 64  # samples that the base's tokenizers are tried on


class Data(NamedTuple):
    """``raw`` and ``found`` are None of token shards and of conversations, which become those."""

    raw: Path | None
    tokens: Path
    steps: tuple[Step, ...]
    notes: tuple[Chosen, ...] = ()
    found: Found | None = None
    split: str = "val"
    copies: int = 1
    is_chat: bool = False


class Amount(NamedTuple):
    """Of the training split, in ids of the base: begin and end of every span counted."""

    samples: int
    ids: int
    longest: int
    modalities: tuple[str, ...]
    held_out: int  # samples of the split val

    @property
    def mean(self) -> float:
        return self.ids / self.samples


def read_data(src: Path, base: Base, out: Path) -> Data:
    """Look at ``src`` and say how it is packed into ``out``.

    Raises:
        UserError: nothing to pack, too little to hold any out, a modality or ids that the base does
            not know.
    """
    if (src / MANIFEST).is_file():
        manifest = read_manifest(src)
        if manifest["kind"] == "tokens":
            base.vocabulary.require(ShardSet.open(src).specs, str(src))
            note = Chosen("tokens", f"{src} is packed: figures that need raw values are left out")
            return Data(None, src, (), (note,))
    elif isinstance(open_source(src, None, {}), ChatSource):
        return _conversations(src, base, out)
    found = look(src)
    base.require(found.modalities, src)
    steps: list[Step] = []
    notes: list[Chosen] = []
    if found.kind == "shards" and found.splits.get("val"):
        raw = src
        notes.append(Chosen("val", f"{found.splits['val']:,} samples, as {src} is packed"))
    else:
        found, pack, _, notes = packing(found, Options(out))
        steps.append(pack)
        raw = out / "data"
    splits = read_manifest(raw)["splits"] if raw == src else found.splits
    copies = training.copies(found, len(found.keys))
    words = _to_tokens(raw, base, out)
    why = "every sample to the base's ids"
    if copies is not None:
        words += ["--copies", str(copies.value)]
        why += f"; {copies.why}"
    steps.append(Step(tuple(words), why))
    split = "test" if "test" in splits else "val"
    steps += [_kept(modality, raw, split, base, out) for modality in _lossy(found, base)]
    times = copies.value if copies else 1
    return Data(raw, out / "tokens", tuple(steps), tuple(notes), found, split, times)


def _lossy(found: Found, base: Base) -> list[str]:
    """Modalities of the data that the base reads by codes which lose some of them."""
    kinds = [kind for kind in found.modalities if not get_modality(kind).is_text]
    modalities = [m for kind in kinds for m in base.kinds[kind]]
    return [m for m in modalities if not base.vocabulary.spec(m).continuous]


def _kept(modality: str, raw: Path, split: str, base: Base, out: Path) -> Step:
    """The command that measures what the base's codes keep of the data, for the report."""
    to = out / TOKENIZERS / modality
    words = ("tokenizer", "eval", str(base.model / TOKENIZERS / modality), "--data", str(raw))
    words += ("--split", split, "--limit", str(MEASURED))
    words += ("--out", str(to / "eval"), "--json", str(to / "eval.json"))
    return Step(words, f"what the base's codes keep of the data's {modality}")


def _conversations(src: Path, base: Base, out: Path) -> Data:
    """Conversations become tokens at once: what a template writes depends on the tokenizers."""
    words = [*_to_tokens(src, base, out), "--val-share", str(SHARE)]
    step = Step(tuple(words), "conversations to the base's ids, some held out")
    note = Chosen("conversations", "what the assistant says, and the end of its turns, is learnt")
    return Data(None, out / "tokens", (step,), (note,), is_chat=True)


def _to_tokens(raw: Path, base: Base, out: Path) -> list[str]:
    """Words of the command that turns raw data into ids of the base."""
    words = ["data", "pack", str(raw), "--tokenizers", str(base.model / TOKENIZERS)]
    return [*words, "--vocabulary", str(base.model / WORDS), "--out", str(out / "tokens")]


def amount_of(tokens: Path) -> Amount:
    """What there is to train on. Raises UserError where there is no training split."""
    shards = ShardSet.open(tokens)
    total = np.zeros(len(shards), np.int64)
    modalities = []
    for spec in shards.specs:
        lengths, spans = shards.lengths(spec.modality), shards.segments(spec.modality)
        if (lengths >= 0).any():
            modalities.append(spec.modality)
        total += np.where(lengths >= 0, lengths + 2 * spans, 0)
    if not len(shards) or not total.any():
        raise UserError(f"{tokens}: its split 'train' is empty; give more data")
    val = split_samples(str(tokens), "val")
    return Amount(len(shards), int(total.sum()), int(total.max()), tuple(modalities), val)
