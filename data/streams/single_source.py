"""Streams over the documents of one source."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import Field

from mm.data.shards.reader import ShardSet
from mm.data.streams.documents import DocumentStream, TokenSource, TokenStreamConfig


class SingleSourceConfig(TokenStreamConfig):
    """Base of the configs whose stream reads one source."""

    source: Annotated[TokenSource, Field(description="token shards")]

    @property
    def token_sources(self) -> tuple[TokenSource, ...]:
        return (self.source,)

    def held_out(self, split: str = "val") -> Self | None:
        source = self.source.held_out(split)
        if source is None:
            return None
        return self.model_copy(update={"source": source, "prefetch": 0})


C = TypeVar("C", bound=SingleSourceConfig)


class SingleSourceStream(DocumentStream[C]):
    """Batches of the documents of one source."""

    @property
    def shards(self) -> ShardSet:
        return self.sources[0]

    def source_plan(self) -> dict[str, Any]:
        """What the order depends on of the source."""
        shards = self.shards
        return {
            "source": [shards.split, len(shards), shards.fingerprint],
            "transform": self.transform_keys[0],
        }
