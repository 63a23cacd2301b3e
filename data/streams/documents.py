"""What streams of token documents share: sources, vocabulary, transforms, rows of a rank, plan."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import numpy as np
from pydantic import Field, model_validator

from mm.config import Config
from mm.data.batching.borders import segment_lengths
from mm.data.batching.codebooks import CODES
from mm.data.batching.collate import Declared
from mm.data.chat.loss import sample_segments
from mm.data.shards.manifest import split_samples
from mm.data.shards.reader import ShardSet
from mm.data.shards.remote import Location
from mm.data.streams.base import Stream, rank_rows
from mm.data.streams.blocks import Sketch, sketch_of
from mm.data.streams.shuffle import Reseeded, key_of
from mm.data.streams.survey import Drawn, survey_documents
from mm.data.transforms.any_to_any import AnyToAny
from mm.data.transforms.compose import chain
from mm.errors import UserError
from mm.launch import environment
from mm.registry import TransformField
from mm.specs import Segment, Transform
from mm.vocabulary import Vocabulary

Positive = Annotated[float, Field(gt=0)]
Weight = Positive | dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]]


class TokenSource(Config):
    """One folder of token shards, or its URL."""

    path: Annotated[Location, Field(description="folder of token shards, or its URL")]
    split: Annotated[str, Field(description="split that is read")] = "train"
    weight: Annotated[
        Weight,
        Field(
            description="relative to the other sources; {samples drawn: weight} is linear between "
            "its points"
        ),
    ] = 1.0
    transform: Annotated[
        tuple[TransformField, ...] | None, Field(description="instead of the stage's own")
    ] = None

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

    def held_out(self, split: str) -> TokenSource | None:
        """The same source with another split; None where it has none, or is that split."""
        if split == self.split or not split_samples(self.path, split):
            return None
        weight = max(self.weight.values()) if isinstance(self.weight, dict) else self.weight
        return self.model_copy(update={"split": split, "weight": weight})


BYTES_A_PLACE = 24  # ids, targets, weight, position, document, modality


class TokenStreamConfig(Config):
    """Base of the configs of streams of token documents."""

    # True where the rows of a step go on with documents of the step before
    continues_documents: ClassVar[bool] = False

    batch_size: Annotated[
        int, Field(gt=0, description="rows of one optimizer step over all processes")
    ] = 8
    micro_batch_size: Annotated[
        int | None,
        Field(gt=0, description="rows of one process at a time, of batch_size's; default all"),
    ] = None
    transform: Annotated[
        tuple[TransformField, ...],
        Field(description="before the objective's own"),
    ] = ()
    prefetch: Annotated[int, Field(ge=0, description="steps made ahead")] = 2

    @model_validator(mode="after")
    def _fits_memory(self) -> TokenStreamConfig:
        """Refuse a step whose rows alone take more memory than there is."""
        have = environment.memory_bytes()
        for key, n_bytes in (("seq_len", BYTES_A_PLACE), ("max_documents", 4)):
            need = self.batch_size * getattr(self, key, 0) * n_bytes
            if need > have:
                raise ValueError(
                    f"batch_size {self.batch_size} x {key} {getattr(self, key)} takes "
                    f"{need / 2**30:,.0f} GiB a step, this machine has {have / 2**30:,.0f}: "
                    f"lower batch_size or {key}"
                )
        return self

    @property
    @abstractmethod
    def token_sources(self) -> tuple[TokenSource, ...]:
        """Where the documents come from."""

    @property
    @abstractmethod
    def stream(self) -> type[Any]:
        """Class of the stream, made with this config and the arguments of `build`."""

    @abstractmethod
    def held_out(self, split: str = "val") -> TokenStreamConfig | None:
        """The same stream over another split of its sources; None when no source has it."""

    def build(
        self,
        *,
        vocabulary: Vocabulary | None = None,
        transform: Any = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Any:
        """Open the shards.

        Args:
            vocabulary: the model's; default that of the first source.
            transform: the objective's: config, dict, kind, Transform, or a sequence of these.
            seed: of the order.
            rank: this process of ``world``.
        Raises:
            UserError: shards are missing or of another vocabulary, or sizes do not divide.
        """
        return self.stream(self, vocabulary, transform, seed, rank, world)


C = TypeVar("C", bound=TokenStreamConfig)


ZEROS = np.broadcast_to(np.int32(0), 1 << 40)  # codes without their memory


@lru_cache(maxsize=4096)
def _outlined(modality: str, n: int, inline: bool) -> Segment:
    """A segment of ``n`` codes of which nothing else is known."""
    return Segment(modality, ZEROS[:n], inline=inline)


class DocumentStream(Stream, Generic[C]):
    """Batches of token documents. Subclasses add `prepare` and what `Stream` asks for.

    Args:
        config: as resolved.
        vocabulary: the model's; default that of the first source.
        transform: the objective's, after those of the config.
        seed: of the order.
        rank: this process of ``world``.

    Attributes:
        sources: `ShardSet` of each source.
        transforms: `Chain` of each source.
        transform_keys: hash of the transforms of each source, for the plan.
        own_rows: global row numbers of this rank's micro-batches.
    """

    def __init__(
        self,
        config: C,
        vocabulary: Vocabulary | None,
        transform: Any,
        seed: int,
        rank: int,
        world: int,
    ):
        self.config, self.seed, self._generator = config, seed, Reseeded()
        self.own_rows = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        given = config.token_sources
        self.sources = [source.build() for source in given]
        first = self.sources[0].vocabulary
        assert first is not None
        self.vocabulary = vocabulary or first
        for source, shards in zip(given, self.sources, strict=True):
            self.vocabulary.require(shards.specs, str(source.path))
        own = [config.transform if s.transform is None else s.transform for s in given]
        self.transforms = [chain(parts, transform) for parts in own]
        self.declared = self._declare()
        named = transform if isinstance(transform, (Config, dict, str)) else None
        self.transform_keys = [
            key_of(config.transform, source.transform, named) % 2**32 for source in given
        ]
        plan = {"seed": seed, "batch_size": config.batch_size, **self.prepare()}
        super().__init__(plan, config.prefetch)

    def _declare(self) -> Declared:
        """What every batch has: of all transforms, so that all ranks run alike."""
        values = {spec.modality for spec in self.vocabulary.ranges if spec.continuous}
        own = [part for chain in self.transforms for part in chain.parts]
        tasks = [task for part in own if isinstance(part, AnyToAny) for task in part.tasks]
        gather = lambda names: tuple(sorted({name for each in names for name in each}))
        return Declared(
            gather(part.makes_parts for part in own),
            gather(part.makes_fields for part in own),
            tuple(sorted(values & {name for task in tasks for name in task.targets})),
            gather(part.makes_labels for part in own),
            tuple(sorted(self._delays(own))),
        )

    def _delays(self, own: Sequence[Transform]) -> dict[str, tuple[int, ...]]:
        """How the transforms lay codebooks out. Raises UserError where a vocabulary differs."""
        found: dict[str, tuple[int, ...]] = {}
        for m, delays in ((m, d) for part in own for m, d in part.makes_codebooks.items()):
            if len(delays) != (n := self.vocabulary.spec(m).n_codebooks):
                raise UserError(
                    f"transform delay: '{m}' has {n} codebooks, and delays.{m} names {len(delays)}"
                )
            if found.setdefault(m, delays) != delays:
                raise UserError(f"transform delay: two sources lay '{m}' out in two ways")
        return found

    def require_heads(self, heads: Mapping[str, Any]) -> None:
        """Raise UserError where no head of the model predicts what the transforms make a target.

        Args:
            heads: configs by name.
        """
        laid = self._delays([part for chain in self.transforms for part in chain.parts])
        said = getattr(heads.get(CODES), "delays", {})
        for m in sorted({*laid, *(m for m in said if m in self.vocabulary.modalities)}):
            if laid.get(m) != said.get(m):
                shown = json.dumps({m: laid.get(m) or said.get(m)})
                raise UserError(
                    f"'{m}' is laid out with delays {list(laid.get(m, ())) or 'none'}, "
                    f"model.heads.{CODES} says {list(said.get(m, ())) or 'none'}: set both alike, "
                    f"such as delays={shown} of the last transform (kind: delay) and of "
                    f"model.heads.{CODES} (kind: parallel or depth)"
                )
        for kind in ("values", "labels"):
            for name in getattr(self.declared, kind):
                if name not in heads:
                    raise UserError(
                        f"'{name}' is predicted ({kind}), and model.heads has none of that name, "
                        f"only {', '.join(heads)}: add model.heads.{name}, or let '{name}' stand "
                        "before the '>' of any_to_any.tasks"
                    )

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Set the rest up; returns what else the order depends on."""

    @abstractmethod
    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        """Why a document is left out, ``filtered`` or ``too_long``; "" where it is not.

        Args:
            raw: as it stands in the shards.
            made: after the transforms; None: they filtered it out.
        """

    @abstractmethod
    def epochs_of(self, steps: int, drawn: Sequence[Drawn]) -> list[float]:
        """Passes over each source that ``steps`` steps make.

        Args:
            drawn: documents of each source that stand for all of it.
        """

    def survey(self, steps: int) -> list[dict[str, Any]]:
        """What ``steps`` steps will see of every source, see `survey_documents`."""
        return survey_documents(self, steps)

    @abstractmethod
    def mend(self, why: str, longest: int) -> str:
        """What to set below ``stages.N.data`` so that documents are not left out for ``why``."""

    def segments(self, source: int, i: int) -> list[Segment]:
        """Sample ``i`` as it stands in the shards."""
        return sample_segments(self.sources[source], i, self.vocabulary)

    def outline(self, source: int, i: int) -> list[Segment]:
        """Sample ``i`` as the index knows it: its codes are all 0, and nothing is read.

        For transforms that look at lengths alone. Not of interleaved shards.
        """
        shards, out = self.sources[source], []
        for spec in shards.specs:
            n = shards.lengths(spec.modality).item(i)
            if n >= 0:
                out.append(_outlined(spec.modality, n, spec.inline))
        return out

    def plan_sample(self, source: int, epoch: int, i: int) -> tuple[list[Segment], Sketch | None]:
        """Sample ``i`` after the transforms, [] where they filter it out, and its sketch if any.

        By its lengths alone where these tell the transforms all; else it is read.
        """
        by_length, plain = self._told[source]
        raw = self.outline(source, i) if by_length else self.segments(source, i)
        made = self.apply_transforms(source, raw, source, epoch, i) or []
        return made, sketch_of(raw, made) if plain else None

    @cached_property
    def _told(self) -> list[tuple[bool, bool]]:
        """Of each source: lengths tell its transforms all; and its codes alone are then missing."""
        out = []
        for shards, transform in zip(self.sources, self.transforms, strict=True):
            parts = transform.parts
            by_length = not shards.interleaved and all(part.by_length for part in parts)
            values = any(spec.continuous for spec in shards.specs)
            out.append((by_length, by_length and not shards.says_loss and not values))
        return out

    def read_sample(
        self, source: int, epoch: int, i: int, sketch: Sketch | None = None
    ) -> list[Segment]:
        """Sample ``i`` after the transforms, [] where they filter it out; quicker by its sketch."""
        if sketch is None:
            raw = self.segments(source, i)
            return self.apply_transforms(source, raw, source, epoch, i) or []
        codes = self.sources[source].tokens(i, {m for m, _ in sketch})
        # Not `_replace`, which takes thrice the time.
        return [Segment(s.modality, codes[m], *s[2:]) if m else s for m, s in sketch]

    @staticmethod
    def count(segments: Sequence[Segment], counts: dict[str, int], *more: str) -> None:
        """Add the tokens of a document to ``tokens/<modality>``, and to counts ``more``."""
        parts = dict.fromkeys([s.part for s in segments])
        for part in parts:
            own = segments if len(parts) == 1 else [s for s in segments if s.part == part]
            for s, length in zip(own, segment_lengths(own), strict=True):
                if s.ids is not None and s.role != "label":
                    for name in (f"tokens/{s.modality}", *more):
                        counts[name] += length

    def apply_transforms(
        self, source: int, segments: list[Segment], *draw: int | str
    ) -> list[Segment] | None:
        """After the transforms, which draw from ``(seed, *draw)``; None: they filter it out."""
        transform = self.transforms[source]
        if not transform.parts:
            return segments
        return transform(segments, self._generator(self.seed, *draw))
