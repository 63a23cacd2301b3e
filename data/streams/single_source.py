"""What streams over the documents of one source share: fields, shards, transforms, plan."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from mm.config import Config
from mm.data.shards.members import member_modality
from mm.data.shards.reader import ShardSet
from mm.data.streams.base import Stream, TokenStreamConfig, rank_rows
from mm.data.streams.packed import PackedSource
from mm.data.streams.shuffle import generator, key_of
from mm.data.transforms.compose import chain
from mm.specs import Segment
from mm.vocabulary import Vocabulary


class DocumentsConfig(TokenStreamConfig):
    """Base of the configs whose stream reads one source."""

    source: PackedSource


C = TypeVar("C", bound=DocumentsConfig)


class DocumentStream(Stream, Generic[C]):
    """Batches of the documents of one source. Subclasses add `prepare` and what `Stream` asks."""

    def __init__(
        self,
        config: C,
        vocabulary: Vocabulary | None,
        transform: Any,
        seed: int,
        rank: int,
        world: int,
    ):
        self.config, self.seed = config, seed
        self.own_rows = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        self.shards: ShardSet = config.source.build()
        assert self.shards.vocabulary is not None
        self.vocabulary = vocabulary or self.shards.vocabulary
        self.vocabulary.require(self.shards.specs, str(config.source.path))
        own = config.source.transform
        self.transform = chain(config.transform if own is None else own, transform)
        named = transform if isinstance(transform, (Config, dict, str)) else None
        plan = {
            "seed": seed,
            "batch_size": config.batch_size,
            "source": [self.shards.split, len(self.shards), self.shards.fingerprint],
            "transform": key_of(config.transform, own, named) % 2**32,
            **self.prepare(),
        }
        super().__init__(plan, config.prefetch)

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Set the rest up; returns what else the order depends on."""

    def segments(self, i: int) -> list[Segment]:
        """Sample ``i`` as it stands in the shards."""
        return [Segment(member_modality(m), ids) for m, ids in self.shards.tokens(i).items()]

    def apply_transforms(self, segments: list[Segment], *draw: int | str) -> list[Segment] | None:
        """After the transforms, which draw from ``(seed, *draw)``; None: they filter it out."""
        if not self.transform.parts:
            return segments
        return self.transform(segments, generator(self.seed, *draw))
