"""Raw items of one modality, for tokenizer training, in an order as that of the packed stream.

G items of one micro-batch, C channels, H x W pixels, N samples of audio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mm.batch import Batch, Values
from mm.config import Config
from mm.data.modalities.base import Modality, get_modality, modalities
from mm.data.modalities.image import Augment
from mm.data.shards.manifest import split_samples
from mm.data.shards.reader import ShardSet
from mm.data.streams.base import Step, Stream, rank_rows
from mm.data.streams.classes import Classes, OfClass
from mm.data.streams.shuffle import key_of, permute
from mm.errors import UserError
from mm.registry import STREAMS
from mm.vocabulary import Vocabulary


@STREAMS.register("items")
class ItemsConfig(Config):
    """Batches of raw items.

    `values["image"]` (G, C, H, W) in [0, 1] or `values["audio"]` (G, N) in [-1, 1], float32.
    """

    kind: Literal["items"] = "items"
    path: Annotated[Path, Field(description="folder of packed raw data")]
    split: Annotated[str, Field(description="split that is read")] = "train"
    modality: Annotated[
        str,
        Field(
            description="modality of the items",
            json_schema_extra=lambda s: s.update(enum=_with_items()),
        ),
    ] = "image"
    options: Annotated[
        dict[str, Any], Field(description="settings of the modality, such as image's max_pixels")
    ] = {}
    batch_size: Annotated[
        int, Field(gt=0, description="items of one optimizer step over all processes")
    ] = 32
    micro_batch_size: Annotated[
        int | None, Field(gt=0, description="items of one process at a time; default all")
    ] = None
    size: Annotated[
        int,
        Field(
            gt=0, description="image: side in pixels; the short side is resized, the middle kept"
        ),
    ] = 32
    gray: Annotated[bool, Field(description="image: one channel")] = False
    augment: Annotated[Augment, Field(description="image: random shifts, turns and mirrors")] = (
        Augment()
    )
    sample_rate: Annotated[int, Field(gt=0, description="audio: Hz")] = 16000
    crop_seconds: Annotated[
        float, Field(gt=0, description="audio: random crop; shorter items are padded with zeros")
    ] = 1.0
    loudness: Annotated[
        Literal["none", "peak", "rms"],
        Field(description="audio: peak to 0.95 of full scale, or rms to -20 dBFS"),
    ] = "none"
    repeat: Annotated[
        Literal["natural", "unique"],
        Field(description="unique: identical files count once in an epoch"),
    ] = "natural"
    cache_mb: Annotated[
        float, Field(ge=0, description="decoded items are kept in memory up to this size")
    ] = 2048
    prefetch: Annotated[int, Field(ge=0, description="steps made ahead")] = 2

    @model_validator(mode="after")
    def _can_be_batched(self) -> ItemsConfig:
        try:
            self.reader()
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    def reader(self) -> Modality:
        """The modality with the settings of this stream. Raises UserError on an unknown one."""
        found = get_modality(self.modality, self.options)
        if not found.has_items:
            raise UserError(f"no items of '{self.modality}'; there are: {', '.join(_with_items())}")
        return found

    @classmethod
    def smallest(cls) -> ItemsConfig:
        return cls(path=Path("shards"), batch_size=4, size=8)

    def held_out(self, split: str = "val") -> ItemsConfig | None:
        """The same stream over another split, without augmentation; None when there is none."""
        if split == self.split or not split_samples(self.path, split):
            return None
        changed = {"split": split, "augment": Augment(), "prefetch": 0}
        return self.model_copy(update=changed)

    def build(
        self,
        *,
        vocabulary: Vocabulary | None = None,
        transform: Any = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> ItemsStream:
        """Open the shards; ``vocabulary`` and ``transform`` are for token streams, not used here.

        Raises:
            UserError: no such shards, the modality is missing, or sizes do not divide.
        """
        return ItemsStream(self, seed, rank, world)


def _with_items() -> list[Any]:
    return [m.kind for m in modalities() if m.has_items]


class ItemsStream(Stream):
    """See `ItemsConfig`. Row r of step k reads item k R + r of the order."""

    counted = ("items",)

    def __init__(self, config: ItemsConfig, seed: int, rank: int, world: int):
        self.config, self.seed = config, seed
        self.own_rows = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        self.shards = ShardSet.open(config.path, config.split)
        if self.shards.tokenized:
            raise UserError(f"{config.path}: token shards hold no raw items; give the raw shards")
        self.numbers: Sequence[int] | np.ndarray | OfClass = self._having(config.modality)
        if not len(self.numbers):
            have = [m for m in self.shards.modalities if len(self.shards.having(m))]
            raise UserError(
                f"{config.path}: split '{config.split}' has no raw '{config.modality}'; it has: "
                f"{', '.join(have) or 'nothing'}"
            )
        # Which of the values of its sample each item is; None: the only one
        self.members: list[str] | None = None
        if self.shards.interleaved:
            each = self.shards.each(config.modality)
            self.numbers, self.members = np.array([i for i, _ in each]), [m for _, m in each]
        if config.repeat == "unique":
            self._unique()
        self.reader = ItemReader(config, self.shards, self.numbers, self.members)
        aside = {"path", "micro_batch_size", "prefetch", "cache_mb"}
        if not config.options:
            aside.add("options")
        plan = {
            "seed": seed,
            "batch_size": config.batch_size,
            "split": config.split,
            "modality": config.modality,
            "items": len(self.numbers),
            "shards": self.shards.fingerprint,
            "settings": key_of(config.model_dump_json(exclude=aside)) % 2**32,
        }
        super().__init__(plan, config.prefetch)

    def __len__(self) -> int:
        """Items in an epoch."""
        return len(self.numbers)

    def start(self) -> dict[str, int]:
        return {"step": 0}

    @property
    def epoch(self) -> float:
        return self._cursor["step"] * self.config.batch_size / len(self.numbers)

    def survey(self, steps: int) -> list[dict[str, Any]]:
        """What ``steps`` steps will see of the items, as `survey_documents` says it."""
        c, n = self.config, len(self.numbers)
        figures = {
            "source": str(c.path),
            "split": c.split,
            "samples": n,
            "bytes": self.shards.n_bytes,
            "epochs": steps * c.batch_size / n,
            "left_out": {},
            "modalities": {
                c.modality: {"samples": n, "bytes": self.shards.bytes_of(c.modality), "used": 1.0}
            },
            "tasks": {},
        }
        return [figures]

    def advance(self, cursor: Mapping[str, int]) -> Step:
        first = cursor["step"] * self.config.batch_size
        micros = []
        for rows in self.own_rows:
            counts = np.array([first + r for r in rows], np.int64)
            picked = self._order(counts)
            values = self.reader.batch(picked, counts, key_of(self.seed, "augment"))
            keys = tuple(self.shards.key(int(self.numbers[i])) for i in picked)
            micros.append(Batch.of_values({self.config.modality: values}, keys))
        own = sum(map(len, self.own_rows))
        return Step(micros, {"step": cursor["step"] + 1}, {"items": own})

    def _order(self, counts: np.ndarray) -> np.ndarray:
        """Item of each global sample number. (G,) int64."""
        n = len(self.numbers)
        out = np.empty(len(counts), np.int64)
        epochs, positions = np.divmod(counts, n)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(positions[here], n, key_of(self.seed, "items", int(epoch)))
        return out

    def _having(self, modality: str) -> range | OfClass:
        """Samples that have a modality, ascending."""
        n = len(self.shards)
        if self.shards.totals.get(modality, (0, 0))[0] == n:
            return range(n)
        lengths = self.shards.lengths(modality)
        return OfClass(Classes(n, 2, lambda first, stop: lengths[first:stop] >= 0), 1)

    def _unique(self) -> None:
        """Keep the first of identical files."""
        seen: dict[bytes, int] = {}
        for n in range(len(self.numbers)):
            i = self.numbers[n]
            member = self.members[n] if self.members else self.config.modality
            found = self.shards.raw(int(i), member)
            assert found is not None
            seen.setdefault(hashlib.sha256(found[1]).digest(), n)
        kept = sorted(seen.values())
        self.numbers = [int(self.numbers[n]) for n in kept]
        self.members = [self.members[n] for n in kept] if self.members else None


class ItemReader:
    """Prepared items by number, kept in memory while they fit ``cache_mb``."""

    def __init__(
        self,
        config: ItemsConfig,
        shards: ShardSet,
        numbers: Sequence[int] | np.ndarray | OfClass,
        members: Sequence[str] | None = None,
    ):
        self.config, self.shards, self.numbers, self.members = config, shards, numbers, members
        self.modality = config.reader()
        self._kept: dict[int, np.ndarray] = {}
        self._room = int(config.cache_mb * 1e6)

    def item(self, i: int) -> np.ndarray:
        found = self._kept.get(i)
        if found is None:
            member = self.members[i] if self.members else self.config.modality
            value = self.shards.value(int(self.numbers[i]), member)
            found = self.modality.item(value, self.config)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[i] = found
        return found

    def batch(self, items: np.ndarray, counts: np.ndarray, key: int) -> Values:
        """Stack items ``items`` (G,); all that is random comes from ``key`` and ``counts`` (G,)."""
        made = [self.item(int(i)) for i in items]
        return self.modality.stack(made, counts, key, self.config)
