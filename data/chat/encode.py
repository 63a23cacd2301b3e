"""Conversations to tokens while packing, with what of them is learnt."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from mm.data.chat.loss import LOSS
from mm.data.chat.template import TextPart
from mm.data.modalities.base import Modality
from mm.data.pack.encode import Encoder, Item, Result
from mm.data.shards.members import split_ordinal
from mm.data.shards.token_codec import encode_member
from mm.errors import UserError
from mm.reading import parse_json
from mm.specs import Encoded, ModalityTokenizer

TOO_LONG = "too long: "
MOST_PIECES = 64  # of a segment that is encoded as a whole: every prefix of it is, too


def text_bytes(part: TextPart, learnt: Sequence[str]) -> bytes:
    """A text segment on its way to the encoder.

    Args:
        part: of a conversation.
        learnt: members of the sample's media that the assistant wrote.
    """
    values = {"pieces": part.pieces, "end": part.end, "learnt": list(learnt)}
    return json.dumps(values, ensure_ascii=False).encode()


class ChatEncoder(Encoder):
    """An `Encoder` whose texts are parts of conversations.

    A border between what is read and what is written is one between two tokens: a segment whose
    prefix up to there has other tokens alone, as a server reads it, is encoded piece by piece.
    Special tokens that the template wrote are read as such; no message holds any.

    Args:
        tokenizers: as of `Encoder`.
        modalities: as of `Encoder`.
        max_tokens: longer samples are left out; None: none is.
        every: learn all tokens, not those of the assistant alone.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, ModalityTokenizer],
        modalities: Mapping[str, Modality] | None = None,
        max_tokens: int | None = None,
        every: bool = False,
    ):
        super().__init__(tokenizers, modalities)
        texts = [m for m, raw in self.reads.items() if raw == "text"]
        if not texts:
            raise UserError("conversations need a tokenizer of text: --tokenizers DIR with text/")
        self.text = "text" if "text" in texts else texts[0]
        self.reads = {m: raw for m, raw in self.reads.items() if raw != "text"}
        self.pieces = reading_special(self.tokenizers[self.text])
        self.max_tokens, self.every = max_tokens, every

    def note(self, items: Sequence[Item]) -> None:
        super().note(items)
        self.left_out.discard("text")

    def encode(self, items: Sequence[Item]) -> list[Result]:
        """Encode a batch; ``side["loss"]`` of each member says what is learnt of it."""
        texts, media = [], []
        for item in items:
            own = {m: d for m, d in item.raws.items() if split_ordinal(m)[1] == "text"}
            texts.append({m: parse_json(d) for m, d in own.items()})
            media.append({m: d for m, d in item.raws.items() if m not in own})
        spoken = [part for each in texts for part in each.values()]
        ids = self._ids([p for part in spoken for p in prefixes(part)])
        withs = [n for n, raws in enumerate(media) if raws]
        others = dict(
            zip(withs, super().encode([Item(media[n], None) for n in withs]), strict=True)
        )
        out = []
        for n, item in enumerate(items):
            found = others.get(n, Result(None, {}))
            if found.bad or len(found.encoded) < len(media[n]):
                missing = [m for m in media[n] if m not in found.encoded]
                bad = found.bad or f"no tokenizer reads {split_ordinal(missing[0])[1]}"
                out.append(Result(item.rest, {}, bad))
                continue
            learnt = {m for part in texts[n].values() for m in part["learnt"]}
            encoded = {
                split_ordinal(m)[0] + self.text: self._one(part, ids)
                for m, part in texts[n].items()
            } | {m: self._marked(m, code, learnt) for m, code in found.encoded.items()}
            out.append(Result(item.rest, encoded, self._length(encoded)))
        return out

    def _ids(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        todo = list(dict.fromkeys(texts))
        found = self.pieces.encode(todo) if todo else []
        return {t: np.asarray(e.ids, np.int32) for t, e in zip(todo, found, strict=True)}

    def _one(self, part: Mapping[str, Any], ids: Mapping[str, np.ndarray]) -> Encoded:
        codes, borders = self._cut(part, ids)
        learnt = [self.every or own for _, own in part["pieces"]] + [self.every or part["end"]]
        spans: list[list[int]] = []
        for first, stop, own in zip([0, *borders], [*borders, len(codes) + 1], learnt, strict=True):
            if not own or first == stop:
                continue
            if spans and spans[-1][1] == first:
                spans[-1][1] = stop
            else:
                spans.append([first, stop])
        return Encoded(codes, side={LOSS: spans})

    def _cut(
        self, part: Mapping[str, Any], ids: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, list[int]]:
        """Codes of a segment, and where each of its pieces ends."""
        starts = [ids[p] for p in prefixes(part)]
        if starts and all(np.array_equal(starts[-1][: len(s)], s) for s in starts):
            return starts[-1], [len(s) for s in starts]
        pieces = [text for text, _ in part["pieces"]]
        found = self._ids(pieces)
        lengths = np.cumsum([len(found[p]) for p in pieces]).tolist()
        empty = np.empty(0, np.int32)
        return np.concatenate([empty, *(found[p] for p in pieces)]).astype(np.int32), lengths

    def _marked(self, member: str, code: Encoded, learnt: Collection[str]) -> Encoded:
        """An item of media: what the user shows is not learnt."""
        if self.every or member in learnt:
            return code
        return code._replace(side={**code.side, LOSS: []})

    def _length(self, encoded: Mapping[str, Encoded]) -> str:
        n = sum(encode_member(code)[1] + 2 for code in encoded.values())
        if self.max_tokens is None or n <= self.max_tokens:
            return ""
        return f"{TOO_LONG}{n:,} tokens, more than --max-tokens {self.max_tokens}"


def prefixes(part: Mapping[str, Any]) -> list[str]:
    """A segment's text up to the end of each of its pieces; none of one of too many."""
    pieces = [text for text, _ in part["pieces"]]
    return list(accumulate(pieces)) if len(pieces) <= MOST_PIECES else []


def reading_special(tokenizer: Any) -> ModalityTokenizer:
    """The tokenizer that reads special tokens of a text as such; of one without any, itself."""
    if not hasattr(getattr(tokenizer, "config", None), "parse_special"):
        return tokenizer
    config = tokenizer.config.model_copy(update={"parse_special": True})
    return type(tokenizer)(config, tokenizer.source, tokenizer.beside)
