"""Float arrays as patches along their first axes: values in place of ids, for an adapter to read.

n_1 .. n_k cells of a grid of k axes, C channels: the product of the axes behind those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from mm.config import Config
from mm.data.modalities.base import BadSample, get_modality
from mm.errors import UserError
from mm.registry import TOKENIZERS
from mm.specs import Encoded, FloatArray, TokenSpec
from mm.tokenizers.load import ConfigTokenizer, fingerprint_of
from mm.tokenizers.patches import from_patches, scale_of, to_patches


class ArrayPatches(ConfigTokenizer):
    """`FloatArray` (S_1, .., S_k, ...) to float32 values (n_1, .., n_k, patch * C), and back.

    Every channel is normalised by its mean and standard deviation, in all arrays of the training
    part or in the array itself; an axis that is no whole number of patches ends with its last
    element repeated. Source: patches as places, Dosovitskiy et al. 2020 (arXiv:2010.11929), section
    3.1.
    """

    def __init__(self, config: ArrayPatchesConfig):
        self.config = config
        axes = len(config.patch)
        side = max(1, int(config.max_patches ** (1 / axes) + 1e-9))
        self.spec = TokenSpec(
            config.modality,
            0,
            grid=(side,) * axes if axes > 1 else None,
            continuous=True,
            fingerprint=fingerprint_of(config),
            n_features=math.prod(config.patch) * config.channels,
        )

    def encode(self, raws: Sequence[Any]) -> list[Encoded]:
        """Patches of each array, the last axis of the grid fastest.

        Raises:
            UserError: something is no finite array of the axes and channels, or has more patches
                than ``max_patches``.
        """
        return [self._encode(raw) for raw in raws]

    def _encode(self, raw: Any) -> Encoded:
        c = self.config
        x = c.flat(raw)
        cells = [-(-n // p) for n, p in zip(x.shape, c.patch, strict=False)]
        if math.prod(cells) > c.max_patches:
            raise UserError(
                f"array patches: {'x'.join(map(str, cells))} of them, tokenizer.max_patches is "
                f"{c.max_patches}: raise it, or tokenizer.patch"
            )
        loc, scale = np.array(c.mean or (0.0,)), np.array(c.std or (1.0,))
        side: dict[str, Any] = {"shape": list(_shape(raw))}
        if c.normalise == "item":
            rows = x.reshape(-1, c.channels)
            loc = rows.mean(0)
            scale = scale_of(loc, rows.std(0))
            side |= {"loc": loc.tolist(), "scale": scale.tolist()}
        ends = [(0, n * p - m) for n, p, m in zip(cells, c.patch, x.shape, strict=False)]
        padded = np.pad((x - loc) / scale, [*ends, (0, 0)], mode="edge")
        return Encoded(values=to_patches(padded.astype(np.float32), c.patch), side=side)

    def decode(self, codes: Sequence[Encoded]) -> list[FloatArray]:
        """Arrays of their own shape; without side information of whole patches."""
        return [self._decode(code) for code in codes]

    def _decode(self, code: Encoded) -> FloatArray:
        c, side = self.config, code.side
        values = np.zeros((0, self.spec.n_features)) if code.values is None else code.values
        values = np.asarray(values, np.float64)
        if not len(values):
            values = np.zeros((1, self.spec.n_features))
        if values.ndim == 2:
            values = values.reshape(-1, *(1 for _ in c.patch[1:]), self.spec.n_features)
        x = from_patches(values, c.patch, (c.channels,))
        x = x * np.array(side.get("scale", c.std or (1.0,)))
        x = x + np.array(side.get("loc", c.mean or (0.0,)))
        shape = side.get("shape")
        if shape:
            x = x[tuple(slice(n) for n in shape[: len(c.patch)])].reshape(shape)
        elif c.channels == 1:
            x = x[..., 0]
        return FloatArray(x.astype(np.float32))


def _shape(raw: Any) -> tuple[int, ...]:
    return np.shape(raw.values if isinstance(raw, FloatArray) else raw)


@TOKENIZERS.register("array_patches")
class ArrayPatchesConfig(Config):
    """Patches along the first axes of an array; all axes behind them are channels."""

    kind: Literal["array_patches"] = "array_patches"
    modality: Annotated[str, Field(description="of the vocabulary")] = "array"
    patch: Annotated[
        tuple[Annotated[int, Field(gt=0, le=65536)], ...],
        Field(min_length=1, max_length=3, description="elements of a place along each axis"),
    ] = (4, 4)
    channels: Annotated[
        int, Field(gt=0, le=65536, description="product of the axes behind those of `patch`")
    ] = 1
    normalise: Annotated[
        Literal["train", "item", "none"],
        Field(description="by mean and deviation of the training part, or of the array itself"),
    ] = "train"
    mean: Annotated[
        tuple[float, ...] | None, Field(description="of each channel; `fit` measures it")
    ] = None
    std: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...] | None,
        Field(description="of each channel, by which is divided; `fit` measures it"),
    ] = None
    max_patches: Annotated[
        int, Field(gt=0, le=2**20, description="of one array; one of more is refused")
    ] = 1024

    @model_validator(mode="after")
    def _measured(self) -> ArrayPatchesConfig:
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is None:
                continue
            if self.normalise != "train":
                raise ValueError(f"{name} is of normalise: train, not of {self.normalise}")
            if len(given) not in (1, self.channels):
                raise ValueError(f"{name} has {len(given)} numbers for {self.channels} channels")
        if (self.mean is None) != (self.std is None):
            raise ValueError("set both of mean and std, or let `mm tokenizer train` measure them")
        return self

    def flat(self, raw: Any) -> np.ndarray:
        """(S_1, .., S_k, C) float64 of an array. Raises UserError on any other."""
        k = len(self.patch)
        try:
            given = raw if isinstance(raw, FloatArray) else get_modality("array").accept(raw)
        except BadSample as error:
            raise UserError(f"array patches: {error}") from error
        x = np.asarray(given.values, np.float64)
        if not np.isfinite(x).all():
            raise UserError("array patches: an array has elements that are not finite")
        if x.ndim < k or math.prod(x.shape[k:]) != self.channels:
            raise UserError(
                f"array patches: an array of shape {x.shape} has not {k} axes and {self.channels} "
                "channels behind them: set tokenizer.patch and tokenizer.channels to what the data "
                "have"
            )
        return x.reshape(*x.shape[:k], self.channels)

    def fit(self, arrays: Iterable[Any] = ()) -> ArrayPatches:
        """Measure mean and standard deviation of every channel, unless they are given.

        Source: merging of parts, Chan, Golub & LeVeque 1983, eqs. 2.1.
        """
        if self.normalise != "train" or self.mean is not None:
            return self.build()
        n, mean, squares = 0, np.zeros(self.channels), np.zeros(self.channels)
        for raw in arrays:
            x = self.flat(raw).reshape(-1, self.channels)
            both, apart = n + len(x), x.mean(0) - mean
            squares += ((x - x.mean(0)) ** 2).sum(0) + apart**2 * (n * len(x) / both)
            mean, n = mean + apart * (len(x) / both), both
        std = scale_of(mean, np.sqrt(squares / max(n, 1)))
        measured = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist())}
        return self.model_copy(update=measured).build()

    def build(self, folder: str | Path | None = None) -> ArrayPatches:
        """Make it; its folder holds nothing but this config. Raises UserError before `fit`."""
        if self.normalise == "train" and self.mean is None:
            raise UserError(
                "array patches: mean and std are not measured yet: mm tokenizer train CONFIG "
                "--data SHARDS --out DIR, or set tokenizer.normalise to item or none"
            )
        return ArrayPatches(self)

    @classmethod
    def smallest_tokenizer(cls) -> ArrayPatches:
        """An instance for the laws."""
        return cls(patch=(2, 3), channels=2).fit(cls.examples())

    @classmethod
    def examples(cls) -> list[Any]:
        """Raw values for the laws: of whole patches, of more, one cell, a flat one, a large one."""
        rng = np.random.default_rng(0)
        made = [
            rng.normal(2, 3, shape) for shape in ((4, 6, 2), (5, 7, 2), (1, 1, 2), (3, 2, 1, 2))
        ]
        made += [np.full((2, 3, 2), 7.0), 1e3 + rng.normal(0, 10, (8, 4, 2))]
        return [FloatArray(each.astype(np.float32)) for each in made]
