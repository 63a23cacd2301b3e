"""Packed rows of token documents.

The order is a pure function of (seed, sample number), each block of (seed, block). A block takes
samples of every source (by weight, see `mm.data.streams.mixing`), in the order of that source's own
counter-based permutation, transforms each with a generator of its own, and packs the documents
first-fit into rows. Every rank plans all rows and makes batches of its own ones.

N samples, B rows of one micro-batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mm.data.batching.collate import document_length, to_batch
from mm.data.shards.reader import split_samples
from mm.data.shards.remote import is_url
from mm.data.streams import mixing
from mm.data.streams.base import Step
from mm.data.streams.documents import DocumentStream, TokenSource, TokenStreamConfig, Weight
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.stats import accumulate, summarize
from mm.data.streams.survey import Drawn
from mm.data.transforms.chunk import window
from mm.errors import UserError
from mm.registry import STREAMS
from mm.specs import Segment

SURVEYED = 1024  # documents that are packed to tell the epochs
PROBE = 256  # samples of a source that tell its mean tokens after the transforms


@STREAMS.register("packed")
class PackedConfig(TokenStreamConfig):
    """Rows of ``seq_len`` tokens filled with whole documents."""

    kind: Literal["packed"] = "packed"
    sources: Annotated[
        tuple[TokenSource, ...], Field(min_length=1, description="token shards with their weights")
    ]
    seq_len: Annotated[int, Field(gt=3, description="tokens of a row")] = 256
    max_documents: Annotated[
        int, Field(gt=0, description="documents of one row; shapes depend on it")
    ] = 32
    block_samples: Annotated[int, Field(gt=0, description="samples packed together")] = 1024
    weights: Annotated[
        Literal["samples", "tokens"], Field(description="what the sources' weights are shares of")
    ] = "samples"
    modality_tokens: Annotated[
        dict[str, Weight] | None,
        Field(description="wanted token shares by modality; the sources are mixed to reach them"),
    ] = None
    shuffle: Annotated[
        Literal["full", "window"] | None,
        Field(
            description="full: over the whole source; window: shard after shard, then within a "
            "window, so that few shards are open; default: window where the source is a URL"
        ),
    ] = None
    window_samples: Annotated[int, Field(gt=0, description="of shuffle: window")] = 8192
    cut: Annotated[
        bool,
        Field(
            description="a single-segment document over seq_len becomes several; otherwise it is "
            "left out and counted"
        ),
    ] = False

    @classmethod
    def smallest(cls) -> PackedConfig:
        return cls(
            sources=(TokenSource(path=Path("tokens")),),
            seq_len=32,
            batch_size=4,
            max_documents=8,
            block_samples=16,
        )

    @property
    def token_sources(self) -> tuple[TokenSource, ...]:
        return self.sources

    @property
    def stream(self) -> type[PackedStream]:
        return PackedStream

    def held_out(self, split: str = "val") -> PackedConfig | None:
        found = [s for source in self.sources if (s := source.held_out(split)) is not None]
        if not found:
            return None
        samples = sum(split_samples(source.path, split) for source in found)
        changed = {
            "sources": tuple(found),
            # about one pass over the split is one block
            "block_samples": max(len(found), min(self.block_samples, samples)),
            "modality_tokens": None,  # the split may lack one of them
            "prefetch": 0,
        }
        return self.model_copy(update=changed)


class Document(NamedTuple):
    """One document and the number of its source."""

    key: str
    segments: list[Segment]
    source: int = 0


class Row(NamedTuple):
    """Documents of one row."""

    documents: list[list[Segment]]
    keys: list[str]
    sources: list[int]
    length: int


class Block(NamedTuple):
    """Rows of one block and what was left out of it."""

    rows: list[Row]
    filtered: int
    too_long: int


class PackedStream(DocumentStream[PackedConfig]):
    """See `PackedConfig`.

    ``stats`` of the last step: padding_share, documents, tokens by modality, filtered, too_long;
    and those of the run so far that `mm.data.streams.stats.summarize` names (a sample is a document
    here).
    """

    def prepare(self) -> dict[str, Any]:
        config = self.config
        probe = config.weights == "tokens" or bool(config.modality_tokens)
        self.mix = mixing.plan(
            [s.weight for s in config.sources],
            config.block_samples,
            config.weights,
            config.modality_tokens,
            [self._mean_tokens(s) for s in range(len(self.sources))] if probe else (),
        )
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._order: dict[tuple[int, int], np.ndarray] = {}
        plan: dict[str, Any] = {
            "seq_len": config.seq_len,
            "cut": config.cut,
            "max_documents": config.max_documents,
            "block_samples": config.block_samples,
            "sources": [
                [shards.split, len(shards), n, shards.fingerprint]
                for shards, n in zip(self.sources, self.counts, strict=True)
            ],
            "transforms": self.transform_keys,
        }
        if self.mix.counts is None:
            plan["mix"] = key_of(self.mix.at.tolist(), self.mix.shares.tolist()) % 2**32
        windows = [config.window_samples * self._windowed(s) for s in range(len(self.sources))]
        if any(windows):
            plan["window"] = windows
        return plan

    def start(self) -> dict[str, int]:
        return {"step": 0, "block": 0, "row": 0}

    @property
    def counts(self) -> list[int]:
        """Samples that the first block takes of each source."""
        return self.mix.drawn_before(1)

    @property
    def epoch(self) -> float:
        """Passes over the source that was seen least, up to the last consumed step's block."""
        seen = self.mix.drawn_before(self._cursor["block"])
        return min(n / len(s) for s, n in zip(self.sources, seen, strict=True))

    def advance(self, cursor: Mapping[str, int]) -> Step:
        block, row = cursor["block"], cursor["row"]
        rows: list[Row] = []
        filtered = too_long = empty = 0
        while len(rows) < self.config.batch_size:
            plan = self._block(block)
            if row == 0:
                filtered, too_long = filtered + plan.filtered, too_long + plan.too_long
            take = plan.rows[row : row + self.config.batch_size - len(rows)]
            rows += take
            row += len(take)
            if row >= len(plan.rows):
                empty = 0 if plan.rows else empty + 1
                if empty >= 8:
                    raise UserError(
                        f"data: {empty} blocks of {self.config.block_samples} samples gave no "
                        "document "
                        f"({plan.filtered} filtered by transforms, {plan.too_long} longer than "
                        "seq_len "
                        f"{self.config.seq_len}): raise data.seq_len, set data.cut=true or add a "
                        "chunk transform"
                    )
                block, row = block + 1, 0
        micros = []
        for numbers in self.own_rows:
            part = [rows[i] for i in numbers]
            micros.append(
                to_batch(
                    [r.documents for r in part],
                    self.vocabulary,
                    self.config.seq_len,
                    self.config.max_documents * len(part),
                    [key for r in part for key in r.keys],
                )
            )
        used = sum(r.length for r in rows)
        tokens: dict[str, int] = {}
        by_source = dict.fromkeys(range(len(self.sources)), 0)
        by_samples = dict.fromkeys(range(len(self.sources)), 0)
        for r in rows:
            for source, document in zip(r.sources, r.documents, strict=True):
                by_samples[source] += 1
                for s in document:
                    if s.ids is not None:
                        tokens[s.modality] = tokens.get(s.modality, 0) + len(s.ids) + 2
                        by_source[source] += len(s.ids) + 2
        seen = accumulate(
            cursor,
            tokens=tokens,
            source=by_source,
            samples=by_samples,
            rejects={"filtered": filtered, "too_long": too_long},
        )
        stats = {
            "padding_share": 1 - used / (self.config.batch_size * self.config.seq_len),
            "tokens": tokens,
            "documents": sum(len(r.documents) for r in rows),
            "filtered": filtered,
            "too_long": too_long,
            **summarize(seen),
        }
        return Step(micros, {"step": cursor["step"] + 1, "block": block, "row": row, **seen}, stats)

    def _block(self, number: int) -> Block:
        if number not in self._blocks:
            self._blocks[number] = self._plan(number)
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _plan(self, block: int) -> Block:
        """Draw, transform and pack one block; depends on the seed and the number alone."""
        documents: list[Document] = []
        filtered = too_long = 0
        begin, end = self.mix.drawn_before(block), self.mix.drawn_before(block + 1)
        for s, shards in enumerate(self.sources):
            for count in range(begin[s], end[s]):
                epoch, position = divmod(count, len(shards))
                i = int(self._epoch_order(s, epoch)[position])
                segments = self._segments(s, epoch, i) or []
                why = self.fate(segments, segments)
                filtered, too_long = filtered + (why == "filtered"), too_long + (why == "too_long")
                if not why:
                    documents += [Document(shards.key(i), d, s) for d in self._cut(segments)]
        order = permute(
            np.arange(len(documents)), len(documents), key_of(self.seed, "block", block)
        )
        rows = first_fit(
            [documents[i] for i in order], self.config.seq_len, self.config.max_documents
        )
        # The rows that were opened last are the emptier ones: spread them over the steps of the
        # block.
        order = permute(np.arange(len(rows)), len(rows), key_of(self.seed, "rows", block))
        return Block([rows[i] for i in order], filtered, too_long)

    def _segments(self, source: int, epoch: int, i: int) -> list[Segment] | None:
        """Sample ``i`` after the transforms; None where they filter it out."""
        return self.apply_transforms(source, self.segments(source, i), source, epoch, i)

    def _mean_tokens(self, source: int) -> dict[str, float]:
        """Mean tokens of one sample by modality, as they will stand in a row.

        From the index where nothing changes them, else from the first samples of the order.
        """
        shards, n = self.sources[source], len(self.sources[source])
        if not self.transforms[source].parts and self.config.cut and not shards.interleaved:
            have = {s.modality: shards.lengths(s.modality) for s in shards.specs}
            return {m: float((v + 2).sum(where=v >= 0)) / n for m, v in have.items()}
        total: dict[str, float] = {}
        picked = permute(np.arange(min(n, PROBE)), n, key_of("probe", source))
        for i in picked:
            segments = self._segments(source, 0, int(i)) or []
            if self.fate(segments, segments):
                continue
            for s in segments:
                if s.ids is not None:
                    total[s.modality] = total.get(s.modality, 0.0) + len(s.ids) + 2
        return {m: t / len(picked) for m, t in total.items()}

    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        if not made:
            return "filtered"
        fits = document_length(made) <= self.config.seq_len
        return "" if fits or (self.config.cut and len(made) == 1) else "too_long"

    def _cut(self, segments: list[Segment]) -> list[list[Segment]]:
        """The documents that a sample becomes: one, or pieces of a single segment."""
        if document_length(segments) <= self.config.seq_len:
            return [segments]
        return pieces(segments[0], self.config.seq_len - 2)

    def epochs_of(self, steps: int, drawn: Sequence[Drawn]) -> list[float]:
        """From packing a few blocks of the drawn documents by their lengths."""
        size, rng = min(self.config.block_samples, SURVEYED), np.random.default_rng(37)
        blocks, rows = max(1, SURVEYED // size), 0
        for _ in range(blocks):
            documents = []
            for s, (n, found) in enumerate(zip(self.counts, drawn, strict=True)):
                left_out = max(0.0, 1 - float(found.weight.sum()))
                p = np.append(found.weight, left_out)
                chosen = rng.choice(
                    len(p), round(n * size / self.config.block_samples), p=p / p.sum()
                )
                kept = [found.segments[k] for k in chosen if k < len(found.segments)]
                documents += [Document("", d, s) for segments in kept for d in self._cut(segments)]
            rows += len(first_fit(documents, self.config.seq_len, self.config.max_documents))
        per_block = rows / blocks * self.config.block_samples / size
        if not rows:
            return [0.0 for _ in self.sources]
        whole, part = divmod(steps * self.config.batch_size / per_block, 1)
        before, after = (self.mix.drawn_before(int(whole) + k) for k in (0, 1))
        return [
            (a + part * (b - a)) / len(shards)
            for a, b, shards in zip(before, after, self.sources, strict=True)
        ]

    def mend(self, why: str, longest: int) -> str:
        if why == "filtered":
            return "give any_to_any a task for them"
        return (
            f"data.cut=true cuts documents of one segment; data.seq_len={longest} takes all; the "
            "transform {kind: chunk, modality: M, tokens: N} takes a window of each"
        )

    def _windowed(self, source: int) -> bool:
        mode = self.config.shuffle
        return mode == "window" or (mode is None and is_url(self.config.sources[source].path))

    def _epoch_order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._order:
            n = len(self.sources[source])
            for old in [k for k in self._order if k[0] == source and k[1] < epoch - 1]:
                del self._order[old]
            own = key_of(self.seed, "source", source, epoch)
            self._order[key] = (
                mixing.window_order(
                    self.sources[source].shard_of(), self.config.window_samples, own
                )
                if self._windowed(source)
                else permute(np.arange(n), n, own)
            )
        return self._order[key]


def pieces(s: Segment, tokens: int) -> list[list[Segment]]:
    """Cut one segment into documents of at most ``tokens`` codes.

    Only the last one's `end` is a target.
    """
    return [
        [window(s, start, min(start + tokens, len(s.ids)))]
        for start in range(0, len(s.ids), tokens)
    ]


def first_fit(documents: Sequence[Document], seq_len: int, max_documents: int) -> list[Row]:
    """Put each document into the first row that has room for it, opening rows as needed."""
    free = np.zeros(max(1, len(documents)), np.int64)
    rows: list[Row] = []
    for key, segments, source in documents:
        n = document_length(segments)
        at = int(np.argmax(free[: len(rows)] >= n)) if rows else 0
        if not rows or free[at] < n:
            at = len(rows)
            free[at] = seq_len
            rows.append(Row([], [], [], 0))
        row = rows[at]
        row.documents.append(segments)
        row.keys.append(key)
        row.sources.append(source)
        rows[at] = row._replace(length=row.length + n)
        free[at] = 0 if len(row.documents) >= max_documents else free[at] - n
    return rows
