"""Packed rows of token documents.

The order is a pure function of (seed, sample number), each block of (seed, block).

A block takes a fixed number of samples of every source (by weight), in the order of that source's
own counter-based permutation, transforms each with a generator of its own, and packs the documents
first-fit into rows. Every rank plans all rows and makes batches of its own ones. N samples, B rows
of one micro-batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.collate import document_length, to_batch
from mm.data.order import generator, key_of, permute
from mm.data.shards import ShardSet
from mm.data.stream import Step, Stream, rank_rows
from mm.data.transforms.chunk import window
from mm.data.transforms.compose import Chain, chain
from mm.errors import UserError
from mm.registry import STREAMS, TRANSFORMS
from mm.specs import Segment
from mm.vocabulary import Vocabulary


class PackedSource(Config):
    """One folder of token shards."""

    path: Path
    split: str = "train"
    weight: Annotated[
        float, Field(gt=0, description="share of the samples, relative to the other sources")
    ] = 1.0
    # Instead of the stage's own:
    transform: tuple[TRANSFORMS.field, ...] | None = None  # type: ignore[valid-type]

    def build(self) -> ShardSet:
        shards = ShardSet.open(self.path, self.split)
        if not shards.tokenized:
            raise UserError(
                f"{self.path}: raw shards, not tokens; make them with: mm data pack {self.path} "
                "--out DIR --tokenizers DIR"
            )
        if not len(shards):
            raise UserError(f"{self.path}: split '{self.split}' is empty")
        return shards


@STREAMS.register("packed")
class PackedConfig(Config):
    """Rows of ``seq_len`` places filled with whole documents."""

    kind: Literal["packed"] = "packed"
    sources: tuple[PackedSource, ...] = Field(min_length=1)
    seq_len: Annotated[int, Field(gt=3)] = 256
    batch_size: Annotated[
        int, Field(gt=0, description="rows of one optimizer step over all processes")
    ] = 8
    micro_batch_size: Annotated[int, Field(gt=0)] | None = (
        None  # rows of one process at a time; default all
    )
    max_documents: Annotated[
        int, Field(gt=0, description="documents of one row; shapes depend on it")
    ] = 32
    block_samples: Annotated[int, Field(gt=0, description="samples packed together")] = 1024
    # a single-segment document over seq_len becomes several; otherwise it is left out and counted
    cut: bool = False
    # Before the objective's own:
    transform: tuple[TRANSFORMS.field, ...] = ()  # type: ignore[valid-type]
    prefetch: Annotated[int, Field(ge=0, description="steps made ahead")] = 2

    @classmethod
    def smallest(cls) -> PackedConfig:
        return cls(
            sources=(PackedSource(path=Path("tokens")),),
            seq_len=32,
            batch_size=4,
            max_documents=8,
            block_samples=16,
        )

    def build(
        self,
        *,
        vocabulary: Vocabulary | None = None,
        transform: Any = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> PackedStream:
        """Open the shards.

        Args:
            vocabulary: the model's; default that of the first source.
            transform: the objective's: config, dict, kind, Transform, or a sequence of these.
            seed: of the order.
            rank: this process of ``world``.
        Raises:
            UserError: shards are missing or of another vocabulary, or sizes do not divide.
        """
        return PackedStream(self, vocabulary, transform, seed, rank, world)


class Row(NamedTuple):
    """Documents of one row."""

    documents: list[list[Segment]]
    keys: list[str]
    length: int


class Block(NamedTuple):
    """Rows of one block and what was left out of it."""

    rows: list[Row]
    filtered: int
    too_long: int


class PackedStream(Stream):
    """See `PackedConfig`.

    ``stats`` of the last step: padding_share, documents, tokens by modality, filtered, too_long.
    """

    def __init__(
        self,
        config: PackedConfig,
        vocabulary: Vocabulary | None,
        transform: Any,
        seed: int,
        rank: int,
        world: int,
    ):
        self.config, self.seed = config, seed
        self.mine = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        self.sources = [source.build() for source in config.sources]
        first = self.sources[0].vocabulary
        assert first is not None
        self.vocabulary = vocabulary or first
        for source, shards in zip(config.sources, self.sources, strict=True):
            self.vocabulary.require(shards.specs, str(source.path))
        common = chain(config.transform)
        self.transforms: list[Chain] = [
            Chain(
                (
                    *(common if s.transform is None else chain(s.transform)).parts,
                    *chain(transform).parts,
                )
            )
            for s in config.sources
        ]
        self.counts = shares([s.weight for s in config.sources], config.block_samples)
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._order: dict[tuple[int, int], np.ndarray] = {}
        plan = {
            "seed": seed,
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "cut": config.cut,
            "max_documents": config.max_documents,
            "block_samples": config.block_samples,
            "sources": [
                [shards.split, len(shards), n, shards.fingerprint]
                for shards, n in zip(self.sources, self.counts, strict=True)
            ],
            "transforms": [
                key_of(
                    config.transform,
                    s.transform,
                    transform if isinstance(transform, (Config, dict, str)) else None,
                )
                % 2**32
                for s in config.sources
            ],
        }
        super().__init__(plan, config.prefetch)

    def start(self) -> dict[str, int]:
        return {"step": 0, "block": 0, "row": 0}

    @property
    def epoch(self) -> float:
        """Passes over the source that was seen least, up to the last consumed step's block."""
        block = self._cursor["block"]
        return min(block * n / len(s) for s, n in zip(self.sources, self.counts, strict=True))

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
        for numbers in self.mine:
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
        for r in rows:
            for document in r.documents:
                for s in document:
                    if s.ids is not None:
                        tokens[s.modality] = tokens.get(s.modality, 0) + len(s.ids) + 2
        stats = {
            "padding_share": 1 - used / (self.config.batch_size * self.config.seq_len),
            "tokens": tokens,
            "documents": sum(len(r.documents) for r in rows),
            "filtered": filtered,
            "too_long": too_long,
        }
        return Step(micros, {"step": cursor["step"] + 1, "block": block, "row": row}, stats)

    def _block(self, number: int) -> Block:
        if number not in self._blocks:
            self._blocks[number] = self._plan(number)
            while len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[number]

    def _plan(self, block: int) -> Block:
        """Draw, transform and pack one block; depends on the seed and the number alone."""
        documents: list[tuple[str, list[Segment]]] = []
        filtered = too_long = 0
        for s, (shards, n) in enumerate(zip(self.sources, self.counts, strict=True)):
            transform = self.transforms[s]
            for count in range(block * n, (block + 1) * n):
                epoch, place = divmod(count, len(shards))
                i = int(self._epoch_order(s, epoch)[place])
                segments: list[Segment] | None = [
                    Segment(m, ids) for m, ids in shards.tokens(i).items()
                ]
                if transform.parts:
                    segments = transform(segments, generator(self.seed, s, epoch, i))
                if not segments:
                    filtered += 1
                elif document_length(segments) <= self.config.seq_len:
                    documents.append((shards.key(i), segments))
                elif self.config.cut and len(segments) == 1:
                    documents += [
                        (shards.key(i), piece)
                        for piece in pieces(segments[0], self.config.seq_len - 2)
                    ]
                else:
                    too_long += 1
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

    def _epoch_order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._order:
            n = len(self.sources[source])
            for old in [k for k in self._order if k[0] == source and k[1] < epoch - 1]:
                del self._order[old]
            self._order[key] = permute(np.arange(n), n, key_of(self.seed, "source", source, epoch))
        return self._order[key]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` by weight, by largest remainder, at least one each."""
    exact = [w / sum(weights) * total for w in weights]
    out = [max(1, int(x)) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: exact[i] - int(exact[i]), reverse=True):
        if sum(out) < total:
            out[i] += 1
    return out


def pieces(s: Segment, tokens: int) -> list[list[Segment]]:
    """Cut one segment into documents of at most ``tokens`` codes.

    Only the last one's `end` is a target.
    """
    return [
        [window(s, start, min(start + tokens, len(s.ids)))]
        for start in range(0, len(s.ids), tokens)
    ]


def first_fit(
    documents: Sequence[tuple[str, list[Segment]]], seq_len: int, max_documents: int
) -> list[Row]:
    """Put each document into the first row that has room for it, opening rows as needed."""
    free = np.zeros(max(1, len(documents)), np.int64)
    rows: list[Row] = []
    for key, segments in documents:
        n = document_length(segments)
        at = int(np.argmax(free[: len(rows)] >= n)) if rows else 0
        if not rows or free[at] < n:
            at = len(rows)
            free[at] = seq_len
            rows.append(Row([], [], 0))
        row = rows[at]
        row.documents.append(segments)
        row.keys.append(key)
        rows[at] = row._replace(length=row.length + n)
        free[at] = 0 if len(row.documents) >= max_documents else free[at] - n
    return rows
