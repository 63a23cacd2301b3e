"""One document a row, batched with others of its size in two dimensions, such as audio and text.

Where documents may not share a row, padding is what costs. Samples are put into buckets by the
lengths of two modalities (or of more, or by their own); a step takes its rows from one bucket, the
same on all ranks, and as many as the token budget has room for. Every sample comes once an epoch.
The plan of an epoch is a pure function of (seed, epoch), so a seek is O(1). Source: EMMeTT
(arXiv:2409.13523) and Zelasko et al. 2025 (arXiv:2503.05931): 2-D bucketing with a batch size of
its own for each bucket.

N samples, B rows of one micro-batch, K buckets.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from mm.data.batching.collate import document_length, to_batch
from mm.data.streams import stats
from mm.data.streams.base import Step
from mm.data.streams.documents import TokenSource
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.single_source import SingleSourceConfig, SingleSourceStream
from mm.data.streams.survey import Drawn
from mm.errors import UserError, did_you_mean
from mm.registry import STREAMS
from mm.specs import Segment

TOTAL = "total"  # the axis of whole documents


@STREAMS.register("bucketed")
class BucketedConfig(SingleSourceConfig):
    """Token-budget batches of one document a row, from buckets of two lengths."""

    kind: Literal["bucketed"] = "bucketed"
    axes: Annotated[
        tuple[str, ...],
        Field(
            min_length=1,
            description="modalities whose lengths make the buckets; `total` is that of the whole "
            "document, which alone pads least, but mixes long speech of short texts with the "
            "reverse",
        ),
    ] = ("audio", "text")
    buckets: Annotated[int, Field(gt=0, description="at most: lengths that a step can have")] = 64
    batch_size: Annotated[
        int,
        Field(
            gt=0,
            description="rows of a step over all processes in the longest bucket; others take a "
            "multiple of it",
        ),
    ] = 8
    tokens: Annotated[
        int | None,
        Field(
            gt=0,
            description="of one step, with padding; default: what batch_size rows of the longest "
            "bucket take",
        ),
    ] = None
    max_length: Annotated[
        int | None,
        Field(gt=3, description="longer documents are left out and counted; default: none is"),
    ] = None

    @field_validator("buckets", mode="before")
    @classmethod
    def _product(cls, value: Any) -> Any:
        """Two numbers, as an older config has them, are a grid of so many."""
        pair = isinstance(value, (list, tuple)) and all(isinstance(n, int) for n in value)
        return math.prod(value) if pair else value

    @classmethod
    def smallest(cls) -> BucketedConfig:
        from pathlib import Path

        return cls(source=TokenSource(path=Path("tokens")), buckets=4, batch_size=4)

    @property
    def stream(self) -> type[BucketedStream]:
        return BucketedStream

    def held_out(self, split: str = "val") -> BucketedConfig | None:
        found = super().held_out(split)
        # The split's longest bucket may be over the budget of the one that trains.
        return found and found.model_copy(update={"tokens": None})


class Buckets(NamedTuple):
    """``of`` (N,) int64: bucket of every sample; ``bound`` (K, A) int64: its longest lengths."""

    of: np.ndarray
    bound: np.ndarray


class _Part(NamedTuple):
    """A bucket that may still be cut: its cells sorted by each axis, and the best cut of it."""

    orders: list[np.ndarray]  # an axis: (C,) int64
    saved: int  # tokens of padding that the cut saves
    axis: int
    last: int  # index of the last cell on its near side, in the order of `axis`


def make_buckets(lengths: np.ndarray, count: int, least: int = 1) -> Buckets:
    """Cut samples of several lengths into buckets that pad as little as may be.

    Best first, as a decision tree is grown: of all buckets and axes, the cut that saves the most
    padding is made next, until there are ``count``. A grid of quantiles pads half as much again.
    Samples of equal lengths are one cell, which stays together, so the time goes with the number of
    different lengths; each axis is sorted once.

    Args:
        lengths: (N, A) int64, one column an axis; padding is that of all axes together.
        count: wanted buckets; there are fewer where no cut saves anything.
        least: samples that a bucket must have.
    Returns:
        Buckets with the longest lengths inside each as bounds, from short to long.
    """
    if not len(lengths):
        return Buckets(np.empty(0, np.int64), np.empty((0, lengths.shape[1]), np.int64))
    cell = np.zeros(len(lengths), np.int64)
    for column in lengths.T:
        cell = np.unique(cell * (int(column.max()) + 1) + column, return_inverse=True)[1]
    sizes = np.bincount(cell)
    first = np.full(len(sizes), len(lengths))
    np.minimum.at(first, cell, np.arange(len(lengths)))
    axes = [np.ascontiguousarray(column) for column in lengths[first].T]
    heap: list[tuple[int, int, _Part]] = []

    def grow(orders: list[np.ndarray], number: int) -> None:
        part = _cut(axes, sizes, orders, least)
        heapq.heappush(heap, (-part.saved, number, part))

    grow([np.argsort(column, kind="stable") for column in axes], 0)
    made, near = 0, np.zeros(len(sizes), bool)
    while len(heap) < count and heap[0][2].saved:
        orders, _, axis, last = heapq.heappop(heap)[2]
        near[orders[axis][: last + 1]] = True
        near[orders[axis][last + 1 :]] = False
        for half in (True, False):
            made += 1
            grow([order[near[order] == half] for order in orders], made)
    found = [(part.orders[0], [int(x[part.orders[0]].max()) for x in axes]) for _, _, part in heap]
    found.sort(key=lambda pair: (sum(pair[1]), int(first[pair[0]].min())))
    bucket = np.empty(len(sizes), np.int64)
    for k, (cells, _) in enumerate(found):
        bucket[cells] = k
    return Buckets(bucket[cell], np.array([bound for _, bound in found], np.int64))


def _cut(axes: list[np.ndarray], sizes: np.ndarray, orders: list[np.ndarray], least: int) -> _Part:
    """The part with the cut in two that saves most padding; 0 saved where there is none."""
    best = _Part(orders, 0, 0, 0)
    n = int(sizes[orders[0]].sum())
    longest = [int(x[order[-1]]) for x, order in zip(axes, orders, strict=True)]
    for axis, order in enumerate(orders):
        own = axes[axis][order]
        at = np.flatnonzero(own[1:] != own[:-1])
        near = np.cumsum(sizes[order])[at]
        fits = (near >= least) & (n - near >= least)
        at, near = at[fits], near[fits]
        if not len(at):
            continue
        below, above = own[at], np.full(len(at), longest[axis])  # longest on each side
        for x in (x for other, x in enumerate(axes) if other != axis):
            ordered = x[order]
            below += np.maximum.accumulate(ordered)[at]
            above += np.maximum.accumulate(ordered[::-1])[::-1][at + 1]
        padded = near * below + (n - near) * above
        k = int(padded.argmin())
        saved = n * sum(longest) - int(padded[k])
        if saved > best.saved:
            best = _Part(orders, saved, axis, int(at[k]))
    return best


class PlannedStep(NamedTuple):
    """One step: a bucket's length, the samples, and how many rows at the end only fill it."""

    length: int
    samples: np.ndarray  # (B,) int64
    fillers: int


class BucketedStream(SingleSourceStream[BucketedConfig]):
    """See `BucketedConfig`.

    ``stats`` of the last step: padding_share, rows, length, tokens by modality, filtered,
    left_out (samples of the whole split that are too long or empty); and those of the run so far
    that `mm.data.streams.stats.summarize` names.
    """

    def prepare(self) -> dict[str, Any]:
        config, shards = self.config, self.shards
        self.counted = stats.names_with_sums(
            ("rows", "used", "places", "rejects/filtered", "samples/0")
            + tuple(f"tokens/{m}" for m in self.vocabulary.modalities)
        )
        self._check_axes()
        whole = sum(  # a begin and an end for each segment
            np.maximum(shards.lengths(s.modality), 0) + 2 * shards.segments(s.modality)
            for s in shards.specs
        )
        self.lengths = np.asarray(whole, np.int64)
        fits = (self.lengths > 0) & (self.lengths <= (config.max_length or self.lengths.max()))
        if not fits.any():
            raise UserError(
                f"{config.source.path}: no document of at most data.max_length {config.max_length}"
            )
        self.left_out = int((~fits).sum())
        kept = np.flatnonzero(fits)
        axes = [whole if m == TOTAL else np.maximum(shards.lengths(m), 0) for m in config.axes]
        lengths = np.stack(axes, 1).astype(np.int64)[kept]
        inside = make_buckets(lengths, config.buckets, min(config.batch_size, len(kept)))
        self.bucket_samples = [kept[inside.of == k] for k in range(len(inside.bound))]
        self.bounds = np.array([self.lengths[samples].max() for samples in self.bucket_samples])
        self.budget = config.tokens or int(self.bounds.max()) * config.batch_size
        if self.budget < self.bounds.max() * config.batch_size:
            raise UserError(
                f"data.tokens {self.budget}: {config.batch_size} rows of the longest bucket take "
                f"{int(self.bounds.max()) * config.batch_size}: raise it, or lower "
                "data.batch_size or data.max_length"
            )
        self._plans: dict[int, list[PlannedStep]] = {}
        return self.source_plan() | {
            "tokens": self.budget,
            "axes": list(config.axes),
            "buckets": config.buckets,
            "max_length": config.max_length,
        }

    def _check_axes(self) -> None:
        known = (*(spec.modality for spec in self.shards.specs), TOTAL)
        for axis in self.config.axes:
            if axis not in known:
                raise UserError(f"data.axes: '{axis}' is unknown{did_you_mean(axis, known)}")

    def fate(self, raw: list[Segment], made: list[Segment] | None) -> str:
        n, longest = document_length(raw), self.config.max_length
        if longest is not None and n > longest:
            return "too_long"
        return "" if n and made else "filtered"

    def epochs_of(self, steps: int, drawn: Sequence[Drawn]) -> list[float]:
        return [steps / len(self._plan(0))]

    def mend(self, why: str, longest: int) -> str:
        too_long = f"data.max_length={longest} takes all"
        return too_long if why == "too_long" else "give any_to_any a task for them"

    def start(self) -> dict[str, int]:
        return {"step": 0, "epoch": 0, "batch": 0}

    @property
    def epoch(self) -> float:
        """Passes over the source, up to the last consumed step."""
        at = self._cursor
        return at["epoch"] + at["batch"] / len(self._plan(at["epoch"]))

    def rows(self, bucket: int) -> int:
        """Rows of a step of this bucket: as many batch_size as the budget has room for."""
        unit = self.config.batch_size
        return unit * max(1, self.budget // (unit * int(self.bounds[bucket])))

    def advance(self, cursor: Mapping[str, int]) -> Step:
        epoch, batch = cursor["epoch"], cursor["batch"]
        plan = self._plan(epoch)
        step = plan[batch]
        counts = dict.fromkeys((n for n in self.counted if not n.startswith(stats.SEEN)), 0)
        scale = len(step.samples) // self.config.batch_size
        micros = []
        for unit in self.own_rows:
            own = range(unit.start * scale, unit.stop * scale)
            rows = [[self._read(step, epoch, n, counts)] for n in own]
            keys = [self.shards.key(int(step.samples[n])) for n in own]
            micros.append(to_batch(rows, self.vocabulary, step.length, len(own), keys))
            counts["rows"] += len(own)
            counts["places"] += len(own) * step.length
        seen = stats.accumulate(cursor, counts)
        last = batch + 1 == len(plan)
        after = {"epoch": epoch + last, "batch": 0 if last else batch + 1}
        counted = stats.with_sums(counts, seen)
        return Step(micros, {"step": cursor["step"] + 1, **after, **seen}, counted)

    def _read(self, step: PlannedStep, epoch: int, n: int, counts: dict[str, int]) -> list[Segment]:
        """Row ``n`` of a step, which is counted; without loss where it only fills it."""
        i, real = int(step.samples[n]), n < len(step.samples) - step.fillers
        segments = self.segments(0, i)
        made = self.apply_transforms(0, segments, "bucketed", epoch, i) if real else None
        counts["rejects/filtered"] += real and not made
        counts["samples/0"] += real and bool(made)
        if not made:  # its row stays, which keeps the shape, and costs no loss
            made = [s._replace(weight=0.0) for s in segments]
        if document_length(made) > step.length:
            raise UserError(
                f"data.transform makes sample '{self.shards.key(i)}' "
                f"{document_length(made)} tokens long; its bucket has {step.length}"
            )
        if real:
            counts["used"] += document_length(made)
            for s in made:
                if s.ids is not None:
                    counts[f"tokens/{s.modality}"] += len(s.ids) + 2
        return made

    def summarize(self, counts: Mapping[str, int]) -> dict[str, Any]:
        return {
            "padding_share": stats.padding_share(counts),
            "rows": counts["rows"],
            "length": counts["places"] // max(1, counts["rows"]),
            "tokens": {m: n for m, n in stats.in_group(counts, "tokens").items() if n},
            "filtered": counts["rejects/filtered"],
            "left_out": self.left_out,
            **stats.summarize(counts),
        }

    def _plan(self, epoch: int) -> list[PlannedStep]:
        """Steps of one epoch. What does not fill a step goes on to the next longer bucket."""
        if epoch not in self._plans:
            steps: list[PlannedStep] = []
            rest = np.empty(0, np.int64)
            for k in np.argsort(self.bounds, kind="stable"):
                own = self.bucket_samples[k]
                mixed = permute(np.arange(len(own)), len(own), key_of(self.seed, epoch, int(k)))
                line = np.concatenate([rest, own[mixed]])
                rows, length = self.rows(int(k)), int(self.bounds[k])
                full = len(line) // rows * rows
                steps += [PlannedStep(length, line[i : i + rows], 0) for i in range(0, full, rows)]
                rest = line[full:]
            if len(rest):  # once an epoch: repeats without loss keep the rows divisible
                missing = -len(rest) % self.config.batch_size
                filled = np.concatenate([rest, np.resize(rest, missing)])
                steps.append(PlannedStep(int(self.bounds.max()), filled, missing))
            order = permute(np.arange(len(steps)), len(steps), key_of(self.seed, "steps", epoch))
            self._plans = {e: p for e, p in self._plans.items() if e >= epoch - 1}
            self._plans[epoch] = [steps[i] for i in order]
        return self._plans[epoch]
