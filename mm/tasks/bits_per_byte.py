"""Bits per byte: how many bits the model needs for each raw byte of held-out data, by modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.data.batching.document import of_array
from mm.data.modalities.base import modality_of_value, raw_modality
from mm.data.transforms.chunk import window
from mm.decoders.base import is_fixed
from mm.decoders.generate import Generator
from mm.decoders.raws import writable_modalities
from mm.errors import UserError
from mm.registry import TASKS
from mm.specs import Segment, TokenSpec
from mm.tasks.base import Figures, Task, open_split, spread
from mm.tasks.chance import uniform_nats
from mm.tasks.check import require_modalities
from mm.vocabulary import Vocabulary


@TASKS.register("bits_per_byte")
class BitsPerByte(Task):
    """Nats of the code stream, summed, over ln 2 x raw bytes.

    Text: UTF-8 bytes, the span's end included. Image and audio: bits of the CODE stream (the
        tokenizer is lossy, so this
    is no lossless compression rate) for each raw byte: pixels x channels, or 16-bit PCM samples.
    Chance: every code of the modality equally likely (of the codebook whose turn it is), ends of
        free length likewise.
    """

    kind: Literal["bits_per_byte"] = "bits_per_byte"
    data: Annotated[Path, Field(description="packed raw data that is measured on")]
    split: Annotated[str, Field(description="split that is reported")] = "test"
    modalities: Annotated[
        tuple[str, ...], Field(description="default: all of the vocabulary that the split has")
    ] = ()
    given: Annotated[
        dict[str, str],
        Field(
            description="modality -> what stands before its span: `null` (the null condition), "
            "`none` (nothing), or a modality; default: none for text and bytes, else null"
        ),
    ] = {}
    limit: Annotated[
        int | None, Field(ge=1, description="samples of each modality at most, evenly spread")
    ] = None
    max_tokens: Annotated[
        int,
        Field(
            ge=8, description="a longer span is scored in windows of this many ids; as in training"
        ),
    ] = 254
    overlap: Annotated[
        float, Field(ge=0, lt=1, description="share of a window that is context of the next one")
    ] = 0.5

    @property
    def about(self) -> str:
        return "_".join(self.modalities)

    @classmethod
    def smallest(cls) -> BitsPerByte:
        return cls(data=Path("my_run/data"), split="val")

    def evaluate(self, generator: Generator, *, seed: int = 0) -> Figures:
        """Bits per byte, nats per token, chance and counts of each modality; ``seed`` is not used.

        Nothing is sampled.
        """
        shards = open_split(self.data, self.split, generator.tokenizers)
        known = writable_modalities(generator.vocabulary.ranges, generator.tokenizers)
        wanted = self.modalities or known
        figures: Figures = {}
        for modality in wanted:
            raw = raw_modality(modality).kind
            where = shards.each(raw)
            if not where:
                if self.modalities:
                    raise UserError(
                        f"{self.data}: no sample of split '{self.split}' has '{modality}'"
                    )
                continue
            _require_ids(modality, generator.vocabulary)
            chosen = [where[k] for k in spread(len(where), self.limit)]
            values = [  # a segment of an interleaved sample is measured alone
                shards[i].values if member == raw else {raw: shards.value(i, member)}
                for i, member in chosen
            ]
            figures |= self._measure(generator, modality, values)
        return figures

    def check(self, vocabulary: Vocabulary | None, tokenizers: Mapping[str, Any]) -> None:
        before = [m for m in self.given.values() if m not in ("none", "null")]
        require_modalities((*self.modalities, *before), vocabulary, tokenizers)
        shards = open_split(self.data, self.split)
        for modality in self.modalities:
            _require_ids(modality, vocabulary)
        ranges = vocabulary.ranges if vocabulary is not None else None
        known = writable_modalities(ranges, tokenizers) if ranges is not None else [*tokenizers]
        wanted = self.modalities or tuple(known)
        missing = [m for m in wanted if not len(shards.having(raw_modality(m).kind))]
        if self.modalities and missing or len(missing) == len(wanted):
            raise UserError(
                f"{self.data}: no sample of split '{self.split}' has "
                f"{' or '.join(missing) or 'a modality with a tokenizer'}"
            )

    def _measure(self, generator: Generator, modality: str, values: Sequence[Any]) -> Figures:
        own = raw_modality(modality)
        raw = own.kind
        before = self.given.get(modality, "none" if own.is_text else "null")
        values = [
            v
            for v in values
            if (isinstance(v[raw], bytes) or own.n_bytes(v[raw]))
            and (before in ("none", "null") or before in v)
        ]
        if not values:
            raise UserError(
                f"{self.data}: no sample of split '{self.split}' has '{modality}' after '{before}'"
            )
        spec = generator.vocabulary.spec(modality)
        spans = generator.encode(modality, [v[raw] for v in values])
        conditions: list[list[Segment]]
        if before == "none":
            conditions = [[] for _ in values]
        elif before == "null":
            conditions = [[Segment(modality, role="condition")] for _ in values]
        else:
            codes = generator.encode(before, [v[raw_modality(before).kind] for v in values])
            of = generator.vocabulary.spec(before)
            conditions = [[of_array(of, found)._replace(role="condition")] for found in codes]
        documents = [
            [*condition, piece]
            for condition, span in zip(conditions, spans, strict=True)
            for piece in windows(Segment(modality, span), spec, self.max_tokens, self.overlap)
        ]
        scores = [score[modality] for score in generator.nll(documents)]
        nats, places = sum(s[0] for s in scores), sum(s[1] for s in scores)
        n_bytes = input_bytes(generator, modality, [v[raw] for v in values], spans)
        uniform = sum(uniform_nats(len(span), spec) for span in spans)
        return {
            f"{modality}_bits_per_byte": nats / math.log(2) / n_bytes,
            f"{modality}_bits_per_byte_chance": uniform / math.log(2) / n_bytes,
            f"{modality}_nats_per_token": nats / places,
            f"{modality}_tokens": places,
            f"{modality}_bytes": n_bytes,
            f"{modality}_n": len(values),
        }


def _require_ids(modality: str, vocabulary: Vocabulary | None) -> None:
    """Raise UserError for a modality of values, which no number of bits says."""
    if vocabulary is not None and vocabulary.spec(modality).continuous:
        ids = [s.modality for s in vocabulary.ranges if not s.continuous]
        raise UserError(
            f"bits_per_byte: '{modality}' has values in place of ids, so it has no bits; set "
            f"modalities to some of: {', '.join(ids) or 'none here'}"
        )


def input_bytes(
    generator: Generator, modality: str, raws: Sequence[Any], spans: Sequence[np.ndarray]
) -> int:
    """Bytes of what the tokenizer read: an image scaled to its grid, a recording at its rate."""
    tokenizer, own = generator.tokenizer(modality), raw_modality(modality)
    if not own.is_text and tokenizer.reads_files:
        return sum(map(len, spans))
    if is_fixed(tokenizer.spec) and isinstance(raws[0], np.ndarray):
        decoded = generator.decode(modality, spans[:1])[0]
        return modality_of_value(decoded).n_bytes(decoded) * len(raws)
    return sum(own.n_bytes(raw, tokenizer) for raw in raws)


def windows(span: Segment, spec: TokenSpec, max_tokens: int, overlap: float) -> list[Segment]:
    """Cut a span at frame borders so that every id is scored exactly once.

    Its length is free; the end is scored once, too.

    A window begins with the last ``overlap`` share of the one before: context that is not scored
    again.
    """
    n = len(span.ids)
    if is_fixed(spec) or n <= max_tokens:
        return [span]
    frame = spec.n_codebooks
    size = max(1, max_tokens // frame) * frame
    stride = max(1, round(size * (1 - overlap) / frame)) * frame
    out, scored = [], 0
    for start in range(0, n, stride):
        piece = window(span, start, min(n, start + size))
        known = scored - start
        targets = np.array(piece.ids if piece.targets is None else piece.targets)
        targets[:known] = -1
        out.append(piece._replace(targets=targets))
        scored = min(n, start + size)
        if scored == n:
            break
    return out
