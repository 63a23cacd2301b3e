"""What is learnt of a document, for the eye. L tokens of one document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mm.data.batching.document import DocumentTokens, document_tokens
from mm.data.chat.loss import sample_segments
from mm.data.modalities.base import table
from mm.data.shards.reader import ShardSet
from mm.errors import UserError
from mm.specs import Encoded, ModalityTokenizer, Segment
from mm.tokenizers.load import load_tokenizers
from mm.vocabulary import Vocabulary

STOP = "■"  # the end of a text segment, where it is learnt: it stops a turn
Tokenizers = Mapping[str, ModalityTokenizer]


def learnt_tokens(document: DocumentTokens) -> np.ndarray:
    """Which tokens some place is to predict, (L,) bool."""
    return np.append(False, document.weights[:-1] > 0)[: len(document.ids)]


def learnt_runs(
    segments: Sequence[Segment], vocabulary: Vocabulary, tokenizers: Tokenizers
) -> list[tuple[str, bool]]:
    """A document as texts, each with whether its tokens are learnt; media are named by size."""
    document = document_tokens([s for s in segments if not s.part], vocabulary)
    learnt, out = learnt_tokens(document), []
    kind = lambda t: (int(document.modality[t]), bool(learnt[t]))
    for (number, own), places in groupby(range(len(learnt)), kind):
        if number == 0:  # a null condition
            continue
        modality = vocabulary.modalities[number - 1]
        r, ids = vocabulary.range(modality), document.ids[list(places)]
        codes = ids[(ids != r.begin) & (ids != r.end)]
        if table().raw.get(modality) != "text":
            said = f"[{modality}: {len(codes)} tokens]" if len(codes) else ""
        else:
            said = decode_text(tokenizers[modality], codes - r.first)
            said += STOP if own and r.end in ids else ""
        if said:
            out.append((said, own))
    return out


def decode_text(tokenizer: ModalityTokenizer, codes: np.ndarray) -> str:
    """Text of codes (L,), whatever the tokenizer gives."""
    if not len(codes):
        return ""
    value = tokenizer.decode([Encoded(np.asarray(codes, np.int32))])[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def inspect_loss(
    root: Any, tokenizers: Any, split: str | None = None, sample: int = 0, n: int = 3
) -> list[dict[str, Any]]:
    """What is learnt of ``n`` samples of packed shards, see `learnt_runs`.

    Raises UserError on raw shards, and without their tokenizers.
    """
    shards = ShardSet.open(root, split or "train")
    words = shards.vocabulary
    if words is None:
        raise UserError(f"{root}: raw shards have no loss; pack them with --tokenizers DIR")
    if tokenizers is None:
        raise UserError(f"--loss shows tokens: add --tokenizers DIR, those that {root} was made by")
    opened = load_tokenizers(tokenizers)
    specs = [t.spec for t in opened.values() if t.spec.modality in words.modalities]
    words.require(specs, "--tokenizers")
    out = []
    for i in range(sample, min(sample + n, len(shards))):
        found = learnt_runs(sample_segments(shards, i, words), words, opened)
        out.append({"key": shards.key(i), "runs": found})
    shards.close()
    return out


def colour_runs(runs: Sequence[tuple[str, bool]], plain: bool = False) -> Any:
    """A `rich` text: what is learnt green; where there is no colour, between ⟦ and ⟧."""
    from rich.text import Text

    out = Text()
    for said, own in runs:
        said = f"⟦{said}⟧" if own and plain else said
        out.append(said, style="bold green" if own else "dim")
    return out
