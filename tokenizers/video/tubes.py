"""Video as tubes: patches of pixels over a few frames, values in place of ids for an adapter.

F, H, W frames, height and width; T, R, C tubes in time, rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, TokenSpec, Video
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of
from mm.tokenizers.patches import from_patches, to_patches


class VideoTubes(ConfigTokenizer):
    """Videos to uint8 values (T, R, C, frames * patch * patch * 3), and back.

    Frames are taken at ``fps`` of them a second, so that the first axis of a tube's position is its
    time. Source: Arnab et al. 2021, ViViT (arXiv:2103.15691), section 3.2, tubelet embedding.
    """

    def __init__(self, config: VideoTubesConfig):
        self.config = config
        side = max(1, config.size // config.patch)
        self.spec = TokenSpec(
            config.modality,
            0,
            grid=(max(1, config.max_tubes // side**2), side, side),
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=3 * config.frames * config.patch**2,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Tubes of each `Video`, in the order of time, row, column.

        A side is scaled to ``size`` at most and to whole patches, the last frame is repeated to a
        whole tube, and of a video of more than ``max_tubes`` frames are left out evenly.

        Raises:
            UserError: something is no video.
        """
        return [Encoded(values=self._tubes(raw)) for raw in raws]

    def _tubes(self, raw: Any) -> np.ndarray:
        frames = np.asarray(getattr(raw, "frames", None))
        if not isinstance(raw, Video) or frames.dtype != np.uint8 or frames.ndim != 4:
            raise UserError(f"video tubes: expected a Video, got {type(raw).__name__}")
        c = self.config
        p, n = c.patch, c.frames
        rows, columns = self._shape(*frames.shape[1:3])
        moments = max(1, round(len(frames) / raw.rate * c.fps))
        tubes = min(math.ceil(moments / n), max(1, c.max_tubes // (rows * columns)))
        seconds = np.arange(min(moments, tubes * n)) * max(1.0, moments / (tubes * n)) / c.fps
        index = np.minimum((seconds * raw.rate + 0.5).astype(int), len(frames) - 1)
        index = np.append(index, np.repeat(index[-1:], tubes * n - len(index)))
        x = torch.from_numpy(frames[index]).permute(0, 3, 1, 2)
        if x.shape[2:] != (rows * p, columns * p):
            x = torch.nn.functional.interpolate(
                x.float(), (rows * p, columns * p), mode="bilinear", antialias=True
            )
            x = x.round().clamp(0, 255).to(torch.uint8)
        return to_patches(x.permute(0, 2, 3, 1).numpy(), (n, p, p))

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a frame."""
        p = self.config.patch
        scale = min(1.0, self.config.size / max(height, width))
        most = max(1, math.isqrt(self.config.max_tubes))
        rows, columns = (min(most, max(1, round(x * scale / p))) for x in (height, width))
        return rows, columns

    def decode(self, codes: Sequence[Encoded]) -> list[Video]:
        """Videos of ``fps`` frames a second; of no values one grey frame."""
        return [self._video(code.values) for code in codes]

    def _video(self, values: Any) -> Video:
        p, n = self.config.patch, self.config.frames
        if values is None or np.size(values) == 0:
            return Video(np.full((1, p, p, 3), 127, np.uint8), self.config.fps)
        values = np.asarray(values, np.uint8)
        if values.ndim == 2:
            values = values[:, None, None]
        return Video(from_patches(values, (n, p, p), (3,)), self.config.fps)


@TOKENIZERS.register("video_tubes")
class VideoTubesConfig(Config):
    """Pixels of tubes; nothing is trained."""

    kind: Literal["video_tubes"] = "video_tubes"
    modality: Annotated[str, Field(description="of the vocabulary")] = "video"
    fps: Annotated[float, Field(gt=0, le=1000, description="frames that are taken a second")] = 2.0
    frames: Annotated[int, Field(gt=0, le=64, description="of a tube")] = 2
    patch: Annotated[int, Field(gt=0, le=1024, description="pixels of a tube's side")] = 16
    size: Annotated[
        int, Field(gt=0, le=2**14, description="longest side; larger frames are scaled down")
    ] = 128
    max_tubes: Annotated[
        int, Field(gt=0, le=2**20, description="of one video; frames of a longer one are left out")
    ] = 1024

    def fit(self, videos: Iterable[Any] = ()) -> VideoTubes:
        """Nothing to learn."""
        return self.build()

    def build(self, folder: str | Path | None = None) -> VideoTubes:
        """Make it; its folder holds nothing but this config."""
        return VideoTubes(self)

    @classmethod
    def smallest_tokenizer(cls) -> VideoTubes:
        """An instance for the laws."""
        return cls(patch=4, size=8, max_tubes=16).build()

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws."""
        rng = np.random.default_rng(0)
        shapes = ((4, 8, 8), (3, 8, 16), (1, 5, 7), (30, 4, 4), (9, 40, 9))
        return [Video(rng.integers(0, 256, (*s, 3)).astype(np.uint8), 2.0) for s in shapes]
