"""One document a row, batched with others of its size in two dimensions, such as audio and text.

Where documents may not share a row, padding is what costs. Samples are put into buckets by the
lengths of two modalities (or of more, or by their own); a step takes its rows from one bucket, the
same on all ranks, and as many as the token budget has room for. Every sample comes once an epoch.
Which sample a row of a step is, is computed where it is asked for: a seek is O(1), and a process
looks at its own rows alone. Source: EMMeTT
(arXiv:2409.13523) and Zelasko et al. 2025 (arXiv:2503.05931): 2-D bucketing with a batch size of
its own for each bucket.

N samples, B rows of one micro-batch, K buckets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from mm.data.batching.borders import document_length, part_lengths
from mm.data.batching.collate import to_batch
from mm.data.shards.index import spread
from mm.data.streams import stats
from mm.data.streams.base import Step
from mm.data.streams.buckets import make_buckets
from mm.data.streams.classes import Classes
from mm.data.streams.documents import TokenSource
from mm.data.streams.shuffle import key_of, permute
from mm.data.streams.single_source import SingleSourceConfig, SingleSourceStream
from mm.data.streams.survey import Drawn
from mm.errors import UserError, did_you_mean
from mm.registry import STREAMS
from mm.specs import Segment

TOTAL = "total"  # the axis of whole documents
FITTED = 1 << 20  # samples, at most, that the cuts between the buckets are fitted to


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


class Line(NamedTuple):
    """Samples of one bucket in an epoch: first the ``before`` that the shorter ones left over."""

    bucket: int
    before: int
    rows: int  # of a step
    steps: int


class PlannedStep(NamedTuple):
    """One step: a line's number, its first place there, its rows, and how many only fill it."""

    line: int
    first: int
    rows: int
    fillers: int
    length: int


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
        lengths, whole = self._lengths_of(spread(len(shards), FITTED))
        fits = self._fits(whole)
        if not fits.any():
            raise UserError(
                f"{config.source.path}: no document of at most data.max_length {config.max_length}"
            )
        least = min(config.batch_size, int(fits.sum()))
        buckets = make_buckets(lengths[fits], config.buckets, least)
        K, longest = len(buckets.bound), np.zeros(len(buckets.bound), np.int64)

        def bucket_of(first: int, stop: int) -> np.ndarray:
            lengths, whole = self._lengths_of(np.arange(first, stop))
            found = np.where(self._fits(whole), buckets.of(lengths), K)
            np.maximum.at(longest, found[found < K], whole[found < K])
            return found

        self.classes = Classes(len(shards), K + 1, bucket_of)
        self.left_out, self.bounds = self.classes.count(K), longest.copy()
        self.budget = config.tokens or int(self.bounds.max()) * config.batch_size
        if self.budget < self.bounds.max() * config.batch_size:
            raise UserError(
                f"data.tokens {self.budget}: {config.batch_size} rows of the longest bucket take "
                f"{int(self.bounds.max()) * config.batch_size}: raise it, or lower "
                "data.batch_size or data.max_length"
            )
        self._lines = self._make_lines()
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
        return [steps / self.steps_of_epoch]

    def mend(self, why: str, longest: int) -> str:
        too_long = f"data.max_length={longest} takes all"
        return too_long if why == "too_long" else "give any_to_any a task for them"

    def start(self) -> dict[str, int]:
        return {"step": 0, "epoch": 0, "batch": 0}

    @property
    def epoch(self) -> float:
        """Passes over the source, up to the last consumed step."""
        at = self._cursor
        return at["epoch"] + at["batch"] / self.steps_of_epoch

    def rows(self, bucket: int) -> int:
        """Rows of a step of this bucket: as many batch_size as the budget has room for."""
        unit = self.config.batch_size
        return unit * max(1, self.budget // (unit * int(self.bounds[bucket])))

    def advance(self, cursor: Mapping[str, int]) -> Step:
        epoch, batch = cursor["epoch"], cursor["batch"]
        step = self._step(epoch, batch)
        counts = dict.fromkeys((n for n in self.counted if not n.startswith(stats.SEEN)), 0)
        scale = step.rows // self.config.batch_size
        micros = []
        for unit in self.own_rows:
            own = range(unit.start * scale, unit.stop * scale)
            samples = self._samples(step, epoch, np.arange(own.start, own.stop)).tolist()
            rows = [
                [self._read(i, n < step.rows - step.fillers, epoch, step.length, counts)]
                for n, i in zip(own, samples, strict=True)
            ]
            keys = [self.shards.key(i) for i in samples]
            parts = step.length if self.declared.parts else None
            micros.append(
                to_batch(rows, self.vocabulary, step.length, len(own), keys, self.declared, parts)
            )
            counts["rows"] += len(own)
            counts["places"] += len(own) * step.length
        seen = stats.accumulate(cursor, counts)
        last = batch + 1 == self.steps_of_epoch
        after = {"epoch": epoch + last, "batch": 0 if last else batch + 1}
        counted = stats.with_sums(counts, seen)
        return Step(micros, {"step": cursor["step"] + 1, **after, **seen}, counted)

    def _read(
        self, i: int, real: bool, epoch: int, length: int, counts: dict[str, int]
    ) -> list[Segment]:
        """Sample ``i`` for a row, which is counted; without loss where it only fills the step."""
        segments = self.segments(0, i)
        made = self.apply_transforms(0, segments, "bucketed", epoch, i) if real else None
        counts["rejects/filtered"] += real and not made
        counts["samples/0"] += real and bool(made)
        if not made:  # its row stays, which keeps the shape, and costs no loss
            made = [s._replace(weight=0.0) for s in segments]
        longest = max(document_length(made), *part_lengths(made).values(), 0)
        if longest > length:
            raise UserError(
                f"data.transform makes sample '{self.shards.key(i)}' {longest} tokens long; its "
                f"bucket has {length}"
            )
        if real:
            counts["used"] += document_length(made)
            self.count(made, counts)
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

    def _lengths_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths on the axes (N, A), and of whole documents (N,), of some samples; int64."""
        whole = np.zeros(len(samples), np.int64)
        own: dict[str, np.ndarray] = {TOTAL: whole}
        for spec in self.shards.specs:
            n = np.maximum(self.shards.lengths(spec.modality)[samples], 0)
            own[spec.modality] = n
            whole += n + 2 * self.shards.segments(spec.modality, samples)  # a begin and an end each
        return np.stack([own[m] for m in self.config.axes], 1).astype(np.int64), whole

    def _fits(self, whole: np.ndarray) -> np.ndarray:
        return (whole > 0) & (whole <= (self.config.max_length or np.iinfo(np.int64).max))

    def _make_lines(self) -> list[Line]:
        """The lines from short to long.

        What does not fill a step goes on to the next longer bucket.
        """
        lines: list[Line] = []
        rest = 0
        for k in np.argsort(self.bounds, kind="stable").tolist():
            rows = self.rows(k)
            steps, after = divmod(rest + self.classes.count(k), rows)
            lines.append(Line(k, rest, rows, steps))
            rest = after
        missing = -rest % self.config.batch_size
        # repeats without loss keep the rows divisible, once an epoch
        self._last = PlannedStep(
            len(lines) - 1,
            lines[-1].steps * lines[-1].rows,
            rest + missing,
            missing,
            int(self.bounds.max()),
        )
        self._first_step = np.cumsum([0, *(line.steps for line in lines)])
        self.steps_of_epoch = int(self._first_step[-1]) + (rest > 0)
        return lines

    def _step(self, epoch: int, batch: int) -> PlannedStep:
        """Step ``batch`` of an epoch, whose steps are mixed."""
        key = key_of(self.seed, "steps", epoch)
        step = int(permute(np.array([batch]), self.steps_of_epoch, key)[0])
        number = int(np.searchsorted(self._first_step, step, side="right")) - 1
        if number == len(self._lines):
            return self._last
        line = self._lines[number]
        first = (step - int(self._first_step[number])) * line.rows
        return PlannedStep(number, first, line.rows, 0, int(self.bounds[line.bucket]))

    def _samples(self, step: PlannedStep, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Samples of some rows of a step. (B,) int64."""
        return self._in_line(step.line, step.first + rows % (step.rows - step.fillers), epoch)

    def _in_line(self, number: int, places: np.ndarray, epoch: int) -> np.ndarray:
        """Samples at places (B,) of a line, its own ones mixed anew in every epoch."""
        line, out = self._lines[number], np.empty(len(places), np.int64)
        old = places < line.before
        if old.any():
            shorter = self._lines[number - 1]
            at = shorter.steps * shorter.rows + places[old]
            out[old] = self._in_line(number - 1, at, epoch)
        if not old.all():
            key = key_of(self.seed, epoch, line.bucket)
            own = permute(places[~old] - line.before, self.classes.count(line.bucket), key)
            out[~old] = self.classes.select(line.bucket, own)
        return out
