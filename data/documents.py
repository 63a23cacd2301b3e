"""What streams over the documents of one source share: fields, shards, transforms, plan."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field

from mm.config import Config
from mm.data.order import generator, key_of
from mm.data.packed import PackedSource
from mm.data.shards import ShardSet
from mm.data.slots import modality_in
from mm.data.stream import Stream, rank_rows
from mm.data.transforms.compose import chain
from mm.registry import TRANSFORMS
from mm.specs import Segment
from mm.vocabulary import Vocabulary


class DocumentsConfig(Config):
    """Base of the configs whose stream reads one source."""

    source: PackedSource
    batch_size: Annotated[int, Field(gt=0)] = 8
    micro_batch_size: Annotated[
        int, Field(gt=0, description="rows of one process at a time, of batch_size's; default all")
    ] | None = None  # fmt: skip
    transform: tuple[TRANSFORMS.field, ...] = ()  # type: ignore[valid-type]
    prefetch: Annotated[int, Field(ge=0, description="steps made ahead")] = 2

    @property
    @abstractmethod
    def stream(self) -> type[DocumentStream[Any]]:
        """Class of the stream, made with this config and the arguments of `build`."""

    def build(
        self,
        *,
        vocabulary: Vocabulary | None = None,
        transform: Any = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> DocumentStream[Any]:
        """Open the shards; arguments as of `PackedConfig.build`.

        Raises:
            UserError: shards are missing or of another vocabulary, or sizes do not divide.
        """
        return self.stream(self, vocabulary, transform, seed, rank, world)


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
        self.mine = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
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
        return [Segment(modality_in(slot), ids) for slot, ids in self.shards.tokens(i).items()]

    def transformed(self, segments: list[Segment], *draw: int | str) -> list[Segment] | None:
        """After the transforms, which draw from ``(seed, *draw)``; None: they filter it out."""
        if not self.transform.parts:
            return segments
        return self.transform(segments, generator(self.seed, *draw))
