"""Raw items of one modality, for tokenizer training. Same order law as the packed stream.

G items of one micro-batch, C channels, H x W pixels, N samples of audio.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch, Values
from mm.config import Config
from mm.data.modalities.decode import resample
from mm.data.shards.reader import ShardSet
from mm.data.streams.base import Step, Stream, rank_rows
from mm.data.streams.shuffle import key_of, permute, uniform
from mm.errors import UserError
from mm.registry import STREAMS
from mm.specs import Waveform
from mm.vocabulary import Vocabulary


class Augment(Config):
    """Random affine change of images: ranges are symmetric around "unchanged"."""

    shift: Annotated[float, Field(ge=0, le=0.5, description="of the side")] = 0.0
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1, description="relative")] = 0.0
    flip: Annotated[float, Field(ge=0, le=1, description="probability of a mirror image")] = 0.0

    @property
    def active(self) -> bool:
        return bool(self.shift or self.rotate_deg or self.scale or self.flip)


@STREAMS.register("items")
class ItemsConfig(Config):
    """Batches of raw items.

    `values["image"]` (G, C, H, W) in [0, 1] or `values["audio"]` (G, N) in [-1, 1], float32.
    """

    kind: Literal["items"] = "items"
    path: Path
    split: str = "train"
    modality: Literal["image", "audio"] = "image"
    batch_size: Annotated[
        int, Field(gt=0, description="items of one optimizer step over all processes")
    ] = 32
    micro_batch_size: Annotated[int, Field(gt=0)] | None = (
        None  # items of one process at a time; default all
    )
    size: Annotated[
        int,
        Field(
            gt=0, description="image: side in pixels; the short side is resized, the middle kept"
        ),
    ] = 32
    gray: bool = False  # image: one channel
    augment: Augment = Augment()
    sample_rate: Annotated[int, Field(gt=0, description="audio: Hz")] = 16000
    crop_seconds: Annotated[
        float, Field(gt=0, description="audio: random crop; shorter items are padded with zeros")
    ] = 1.0
    loudness: Literal["none", "peak", "rms"] = (
        "none"  # audio: to 0.95 of full scale, or to -20 dBFS
    )
    repeat: Literal["natural", "unique"] = (
        "natural"  # unique: identical files count once in an epoch
    )
    cache_mb: Annotated[
        float, Field(ge=0, description="decoded items are kept in memory up to this size")
    ] = 2048
    prefetch: Annotated[int, Field(ge=0)] = 2

    @classmethod
    def smallest(cls) -> ItemsConfig:
        return cls(path=Path("shards"), batch_size=4, size=8)

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


class ItemsStream(Stream):
    """See `ItemsConfig`."""

    def __init__(self, config: ItemsConfig, seed: int, rank: int, world: int):
        self.config, self.seed = config, seed
        self.own_rows = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        self.shards = ShardSet.open(config.path, config.split)
        if self.shards.tokenized:
            raise UserError(f"{config.path}: token shards hold no raw items; give the raw shards")
        self.numbers = self.shards.having(config.modality)
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
        self.reader: _Reader = (_Images if config.modality == "image" else _Sounds)(
            config, self.shards, self.numbers, self.members
        )
        plan = {
            "seed": seed,
            "batch_size": config.batch_size,
            "split": config.split,
            "modality": config.modality,
            "items": len(self.numbers),
            "shards": self.shards.fingerprint,
            "settings": key_of(
                config.model_dump_json(exclude={"path", "micro_batch_size", "prefetch", "cache_mb"})
            )
            % 2**32,
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

    def advance(self, cursor: Mapping[str, int]) -> Step:
        first = cursor["step"] * self.config.batch_size
        micros = []
        for rows in self.own_rows:
            counts = np.array([first + r for r in rows], np.int64)
            picked = self._order(counts)
            values = self.reader.batch(picked, counts, key_of(self.seed, "augment"))
            keys = tuple(self.shards.key(int(self.numbers[i])) for i in picked)
            micros.append(Batch.of_values({self.config.modality: values}, keys))
        return Step(micros, {"step": cursor["step"] + 1}, {"items": self.config.batch_size})

    def _order(self, counts: np.ndarray) -> np.ndarray:
        """Item of each global sample number. (G,) int64."""
        n = len(self.numbers)
        out = np.empty(len(counts), np.int64)
        epochs, positions = np.divmod(counts, n)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(positions[here], n, key_of(self.seed, "items", int(epoch)))
        return out

    def _unique(self) -> None:
        """Keep the first of identical files."""
        seen: dict[bytes, int] = {}
        for n, i in enumerate(self.numbers):
            member = self.members[n] if self.members else self.config.modality
            found = self.shards.raw(int(i), member)
            assert found is not None
            seen.setdefault(hashlib.sha256(found[1]).digest(), n)
        kept = sorted(seen.values())
        self.numbers = self.numbers[kept]
        self.members = [self.members[n] for n in kept] if self.members else None


class _Reader(ABC):
    """Decoded items, kept while they fit ``cache_mb``."""

    def __init__(
        self,
        config: ItemsConfig,
        shards: ShardSet,
        numbers: np.ndarray,
        members: Sequence[str] | None = None,
    ):
        self.config, self.shards, self.numbers, self.members = config, shards, numbers, members
        self._kept: dict[int, Any] = {}
        self._room = int(config.cache_mb * 1e6)

    def item(self, i: int) -> Any:
        found = self._kept.get(i)
        if found is None:
            member = self.members[i] if self.members else self.config.modality
            found = self.read(self.shards.value(int(self.numbers[i]), member))
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[i] = found
        return found

    @abstractmethod
    def read(self, raw: Any) -> np.ndarray:
        """Prepare one decoded item: all that is the same in every epoch."""

    @abstractmethod
    def batch(self, items: np.ndarray, counts: np.ndarray, key: int) -> Values:
        """Stack items; all randomness comes from ``counts`` (G,), their global numbers."""


class _Images(_Reader):
    def read(self, raw: np.ndarray) -> np.ndarray:
        return fit_image(raw, self.config.size, self.config.gray)

    def batch(self, items: np.ndarray, counts: np.ndarray, key: int) -> Values:
        stack = np.stack([self.item(int(i)) for i in items])
        images = torch.from_numpy(stack).permute(0, 3, 1, 2).to(torch.float32).div_(255)
        if self.config.augment.active:
            images = affine(images, self.config.augment, counts, key)
        return Values.items(images.contiguous())


class _Sounds(_Reader):
    def read(self, raw: Waveform) -> np.ndarray:
        samples = resample(raw, self.config.sample_rate).samples
        return np.ascontiguousarray(loudness(samples, self.config.loudness), np.float32)

    def batch(self, items: np.ndarray, counts: np.ndarray, key: int) -> Values:
        size = max(1, round(self.config.crop_seconds * self.config.sample_rate))
        out = np.zeros((len(items), size), np.float32)
        length = np.empty(len(items), np.int32)
        where = uniform(key, counts)
        for g, i in enumerate(items):
            samples = self.item(int(i))
            start = int(where[g] * (max(0, len(samples) - size) + 1))
            part = samples[start : start + size]
            out[g, : len(part)], length[g] = part, len(part)
        return Values.items(torch.from_numpy(out), torch.from_numpy(length))


def fit_image(raw: np.ndarray, size: int, gray: bool = False) -> np.ndarray:
    """Resize the short side to ``size`` and keep the middle square.

    ``raw`` uint8 (H, W, 3) -> (size, size, C).
    """
    from PIL import Image

    height, width = raw.shape[:2]
    if (height, width) != (size, size):
        side = min(height, width)  # cropped first: a resampling filter would look past the border
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(raw[top : top + side, left : left + side])
        image = square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
        raw = np.asarray(image)
    if gray:  # ITU-R 601 luma, as Pillow's "L"
        raw = np.rint(raw @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return np.ascontiguousarray(raw)


def affine(images: Tensor, augment: Augment, counts: np.ndarray, key: int) -> Tensor:
    """Shift, turn, scale and mirror a batch.

    (G, C, H, W) float32 -> the same; edges are repeated.
    """
    u = np.stack([uniform(key, counts, draw) for draw in range(1, 6)]) * 2 - 1
    angle = np.deg2rad(augment.rotate_deg) * u[0]
    scale = 1 / (1 + augment.scale * u[1])
    mirror = np.where((u[2] + 1) / 2 < augment.flip, -1.0, 1.0)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    theta = np.stack(
        [
            np.stack([cos * mirror, -sin, 2 * augment.shift * u[3]], -1),
            np.stack([sin * mirror, cos, 2 * augment.shift * u[4]], -1),
        ],
        1,
    )
    grid = torch.nn.functional.affine_grid(
        torch.from_numpy(theta).float(), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, "bilinear", "border", align_corners=False)


def loudness(samples: np.ndarray, mode: str) -> np.ndarray:
    """Scale (N,) samples: "peak" to 0.95, "rms" to -20 dBFS without clipping.

    Silence and "none" stay as they are.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if mode == "none" or peak < 1e-6:
        return samples
    gain = 0.95 / peak
    if mode == "rms":
        gain = min(gain, 0.1 / float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))))
    return samples * np.float32(gain)
