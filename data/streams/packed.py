"""Packed rows of token documents.

Row r of every step is the next row of stream r, whatever process reads it; stream r is the rows of
its blocks, one of every round of `batch_size` blocks. A block takes samples of every source (by
weight, see `mm.data.streams.mixing`), in the order of that source's own keyed bijection, and packs
their documents into rows by their lengths, which stand in the index: nothing is read. A row's
samples are read, and transformed each with a generator of its own, when its step is made.

N samples, B rows of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mm.data.batching.borders import document_length, is_main, part_lengths
from mm.data.batching.collate import to_batch
from mm.data.shards.manifest import split_samples
from mm.data.shards.remote import is_url
from mm.data.streams import mixing, stats
from mm.data.streams.base import Step
from mm.data.streams.blocks import Block, Document, block_of, first_fit, lay_rows
from mm.data.streams.documents import DocumentStream, TokenSource, TokenStreamConfig, Weight
from mm.data.streams.order import SourceOrder
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.survey import Drawn
from mm.data.transforms.chunk import window
from mm.errors import UserError
from mm.registry import STREAMS
from mm.specs import Segment

SURVEYED = 1024  # documents that are packed to tell the epochs
PROBE = 256  # samples of a source that tell its mean tokens after the transforms
BLOCK_ROWS = 128  # rows that a block fills, about, where the config does not say its samples
HOPELESS = 8192  # samples in a row that give no document


@STREAMS.register("packed")
class PackedConfig(TokenStreamConfig):
    """Rows of ``seq_len`` tokens filled with whole documents."""

    kind: Literal["packed"] = "packed"
    sources: Annotated[
        tuple[TokenSource, ...], Field(min_length=1, description="token shards with their weights")
    ]
    seq_len: Annotated[int, Field(gt=3, description="tokens of a row")] = 256
    part_len: Annotated[
        int | None,
        Field(gt=3, description="tokens of a row of a second sequence; default seq_len"),
    ] = None
    max_documents: Annotated[
        int, Field(gt=0, description="documents of one row; shapes depend on it")
    ] = 32
    block_samples: Annotated[
        int | None,
        Field(
            gt=0,
            le=10**8,
            description="samples packed together; default: what fills about 128 rows",
        ),
    ] = None
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
        part = -(-samples // self.batch_size)  # about one pass over the split is one round
        changed = {
            "sources": tuple(found),
            "block_samples": max(len(found), min(self.block_samples or SURVEYED, part)),
            "modality_tokens": None,  # the split may lack one of them
            "prefetch": 0,
        }
        return self.model_copy(update=changed)


class PackedStream(DocumentStream[PackedConfig]):
    """See `PackedConfig`.

    ``stats`` of the last step: epoch, padding_share, documents, tokens by modality, filtered,
    too_long; and those of the run so far that `mm.data.streams.stats.summarize` names (a sample is
    a document here).
    """

    def prepare(self) -> dict[str, Any]:
        config, sources = self.config, range(len(self.sources))
        self.counted = stats.names_with_sums(
            ("documents", "used", "places", "block_ppm", "rejects/filtered", "rejects/too_long")
            + tuple(f"tokens/{m}" for m in self.vocabulary.modalities)
            + tuple(f"{group}/{s}" for group in ("source", "samples") for s in sources)
        )
        means = [self._mean_tokens(s) for s in sources]
        self.block_samples = config.block_samples or self._filling(means)
        self.mix = mixing.plan(
            [s.weight for s in config.sources],
            self.block_samples,
            config.weights,
            config.modality_tokens,
            means,
        )
        windows = [config.window_samples * self._windowed(s) for s in sources]
        self._orders = [
            SourceOrder(self.seed, s, len(shards), shards.shard_sizes, window)
            for s, (shards, window) in enumerate(zip(self.sources, windows, strict=True))
        ]
        self._blocks: dict[int, tuple[int, Block]] = {}  # own row -> its block by number
        plan: dict[str, Any] = {
            "order": "row streams",
            "seq_len": config.seq_len,
            **({"part_len": self.part_len} if self.declared.parts else {}),
            "cut": config.cut,
            "max_documents": config.max_documents,
            "block_samples": self.block_samples,
            "sources": [
                [shards.split, len(shards), n, shards.fingerprint]
                for shards, n in zip(self.sources, self.mix.drawn_before(1), strict=True)
            ],
            "transforms": self.transform_keys,
            "mix": key_of(self.mix.at.tolist(), self.mix.shares.tolist()) % 2**32,
        }
        return plan | ({"window": windows} if any(windows) else {})

    def start(self) -> dict[str, int]:
        """``block/r``: blocks that row stream r is done with; ``row/r``: its row in the next."""
        own = [r for numbers in self.own_rows for r in numbers]
        return {"step": 0, **{f"{k}/{r}": 0 for r in own for k in ("block", "row")}}

    @property
    def epoch(self) -> float:
        """Passes over the source that was seen least, by the own row that is behind."""
        behind = min(n for key, n in self._cursor.items() if key.startswith("block/"))
        seen = self.mix.drawn_before(behind * self.config.batch_size)
        return min(n / len(s) for s, n in zip(self.sources, seen, strict=True))

    def advance(self, cursor: Mapping[str, int]) -> Step:
        config = self.config
        after = {"step": cursor["step"] + 1}
        counts = {name: 0 for name in self.counted if not name.startswith(stats.SEEN)}
        micros = []
        for numbers in self.own_rows:
            rows, keys = [], []
            for r in numbers:
                row = self._next_row(r, cursor, after, counts)
                rows.append([self._read(document, counts) for document in row])
                keys += [self.sources[d.source].key(d.sample) for d in row]
                counts["documents"] += len(row)
                counts["used"] += sum(d.length for d in row)
            counts["places"] += len(rows) * config.seq_len
            most = config.max_documents * len(rows)
            batch = to_batch(
                rows, self.vocabulary, config.seq_len, most, keys, self.declared, self.part_len
            )
            micros.append(batch)
        seen = stats.accumulate(cursor, counts)
        return Step(micros, {**after, **seen}, stats.with_sums(counts, seen))

    def summarize(self, counts: Mapping[str, int]) -> dict[str, Any]:
        rows = max(1, counts["places"] // self.config.seq_len)
        seen = self.mix.drawn_before(counts["block_ppm"] / 1e6 / rows * self.config.batch_size)
        return {
            "epoch": min(n / len(s) for s, n in zip(self.sources, seen, strict=True)),
            "padding_share": stats.padding_share(counts),
            "tokens": {m: n for m, n in stats.in_group(counts, "tokens").items() if n},
            "documents": counts["documents"],
            **stats.in_group(counts, "rejects"),
            **stats.summarize(counts),
        }

    def _next_row(
        self, r: int, cursor: Mapping[str, int], after: dict[str, int], counts: dict[str, int]
    ) -> list[Document]:
        """The row of stream ``r`` at ``cursor``; writes where the next one is to ``after``."""
        turn, row = cursor[f"block/{r}"], cursor[f"row/{r}"]
        filtered = too_long = 0
        while True:
            block = self._block(r, turn)
            if row == 0:
                filtered, too_long = filtered + block.filtered, too_long + block.too_long
            if row < len(block.rows):
                break
            turn, row = turn + 1, 0
            if not block.rows and filtered + too_long >= max(HOPELESS, 8 * self.block_samples):
                raise UserError(
                    f"data: {filtered + too_long} samples in a row gave no document "
                    f"({filtered} filtered by transforms, {too_long} longer than seq_len "
                    f"{self.config.seq_len}): raise data.seq_len, set data.cut=true or add a "
                    "chunk transform"
                )
        counts["rejects/filtered"] += filtered
        counts["rejects/too_long"] += too_long
        last = row + 1 == len(block.rows)
        after[f"block/{r}"], after[f"row/{r}"] = (turn + 1, 0) if last else (turn, row + 1)
        counts["block_ppm"] += round(1e6 * (turn + (row + 1) / len(block.rows)))
        return block.rows[row]

    def _block(self, r: int, turn: int) -> Block:
        """Block number ``turn`` of row stream ``r``."""
        number = block_of(self.seed, r, turn, self.config.batch_size)
        if r not in self._blocks or self._blocks[r][0] != number:
            self._blocks[r] = (number, self.plan_block(number))
        return self._blocks[r][1]

    def plan_block(self, number: int) -> Block:
        """Draw and pack one block; depends on the seed and the number alone."""
        documents: list[Document] = []
        filtered = too_long = 0
        begin, end = self.mix.drawn_before(number), self.mix.drawn_before(number + 1)
        for s, order in enumerate(self._orders):
            epochs, samples = order(np.arange(begin[s], end[s]))
            for epoch, i in zip(epochs.tolist(), samples.tolist(), strict=True):
                made, sketch = self.plan_sample(s, epoch, i)
                why = self.fate(made, made)
                filtered, too_long = filtered + (why == "filtered"), too_long + (why == "too_long")
                if not why:
                    lengths = self._lengths(document_length(made))
                    more = self._part_lengths(made)
                    documents += [
                        Document(s, epoch, i, p, n, more, sketch) for p, n in enumerate(lengths)
                    ]
        key = key_of(self.seed, "block", number)
        rows = lay_rows(
            documents, self.config.seq_len, self.config.max_documents, key, self.part_len
        )
        return Block(rows, filtered, too_long)

    def _read(self, d: Document, counts: dict[str, int]) -> list[Segment]:
        """The segments of a planned document, which are counted."""
        made = self.read_sample(d.source, d.epoch, d.sample, d.sketch)
        n = document_length(made)
        if n > self.config.seq_len:
            made = piece(made[0], d.part, self.config.seq_len - 2)
            n = document_length(made)
        if n != d.length:
            shards = self.sources[d.source]
            raise UserError(
                f"{shards.root}/{shards.split}: sample '{shards.key(d.sample)}' has {n} tokens and "
                f"was planned with {d.length}: a transform that is not a function of its segments "
                f"and generator, or a damaged index; run: mm data verify {shards.root}"
            )
        counts[f"samples/{d.source}"] += 1
        self.count(made, counts, f"source/{d.source}")
        return made

    def _mean_tokens(self, source: int) -> dict[str, float]:
        """Mean tokens of one sample by modality, as they will stand in a row.

        From the manifest where nothing changes them, else from the first samples of an order.
        """
        shards, n = self.sources[source], len(self.sources[source])
        if not self.transforms[source].parts and self.config.cut and not shards.interleaved:
            return {m: (t + 2 * c) / n for m, (c, t) in shards.totals.items()}
        total: dict[str, float] = {}
        picked = permute(np.arange(min(n, PROBE)), n, key_of("probe", source))
        for i in picked.tolist():
            segments, _ = self.plan_sample(source, 0, i)
            if self.fate(segments, segments):
                continue
            for s in segments:
                if s.ids is not None and is_main(s):
                    total[s.modality] = total.get(s.modality, 0.0) + len(s.ids) + 2
        return {m: t / len(picked) for m, t in total.items()}

    def _filling(self, means: Sequence[Mapping[str, float]]) -> int:
        """Samples that fill about `BLOCK_ROWS` rows, by the weights that the run begins with."""
        weights = [mixing.value_at(s.weight, 0) for s in self.config.sources]
        tokens = [w * sum(mean.values()) for w, mean in zip(weights, means, strict=True)]
        mean = max(1.0, sum(tokens) / max(1e-12, sum(weights)))
        a_row = min(self.config.seq_len / mean, self.config.max_documents)
        return max(16, len(means), round(BLOCK_ROWS * a_row))

    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        n = document_length(made or ())
        if not made or not n:
            return "filtered"
        if max(self._part_lengths(made), default=0) > self.part_len:
            return "too_long"
        fits = n <= self.config.seq_len
        return "" if fits or (self.config.cut and len(made) == 1) else "too_long"

    @property
    def part_len(self) -> int:
        """Tokens of a row of a second sequence."""
        return self.config.part_len or self.config.seq_len

    def _part_lengths(self, made: list[Segment]) -> tuple[int, ...]:
        """Tokens of a document's second sequences, in the order of `Declared.parts`."""
        if not self.declared.parts:
            return ()
        lengths = part_lengths(made)
        return tuple(lengths.get(name, 0) for name in self.declared.parts)

    def _lengths(self, n: int) -> list[int]:
        """Tokens of the documents that a sample of ``n`` becomes: one, or pieces of a segment."""
        size = self.config.seq_len - 2
        if n <= self.config.seq_len:
            return [n]
        return [min(size, n - 2 - start) + 2 for start in range(0, n - 2, size)]

    def epochs_of(self, steps: int, drawn: Sequence[Drawn]) -> list[float]:
        """From packing a few blocks of the drawn documents by their lengths."""
        config, rng = self.config, np.random.default_rng(37)
        size = min(self.block_samples, SURVEYED)
        blocks, rows = max(1, SURVEYED // size), 0
        for _ in range(blocks):
            lengths: list[int] = []
            for n, found in zip(self.mix.drawn_before(1), drawn, strict=True):
                left_out = max(0.0, 1 - float(found.weight.sum()))
                p = np.append(found.weight, left_out)
                chosen = rng.choice(len(p), round(n * size / self.block_samples), p=p / p.sum())
                kept = [found.segments[k] for k in chosen if k < len(found.segments)]
                lengths += [
                    n for segments in kept for n in self._lengths(document_length(segments))
                ]
            longest = np.sort(np.array(lengths, np.int64))[::-1]
            rows += len(first_fit(longest, config.seq_len, config.max_documents))
        per_block = rows / blocks * self.block_samples / size
        if not rows:
            return [0.0 for _ in self.sources]
        whole, part = divmod(steps * config.batch_size / per_block, 1)
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


def piece(s: Segment, part: int, tokens: int) -> list[Segment]:
    """Part number ``part`` of a segment that is cut into documents of at most ``tokens`` codes.

    Only the last one's `end` is a target.
    """
    return [window(s, part * tokens, min((part + 1) * tokens, len(s.ids)))]
