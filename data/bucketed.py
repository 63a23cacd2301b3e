"""One document a row, batched with others of its size in two dimensions, such as audio and text.

Where documents may not share a row, padding is what costs. Samples are put into buckets by the
lengths of two modalities; a step takes its rows from one bucket, the same on all ranks, and as many
as the token budget has room for. Every sample comes once an epoch. The plan of an epoch is a pure
function of (seed, epoch), so a seek is O(1). Source: EMMeTT (arXiv:2409.13523) and Zelasko et al.
2025 (arXiv:2503.05931): 2-D bucketing with a batch size of its own for each bucket.

N samples, B rows of one micro-batch, K buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mm.config import Config
from mm.data.account import carried, running
from mm.data.collate import document_length, to_batch
from mm.data.order import generator, key_of, permute
from mm.data.packed import PackedSource
from mm.data.slots import modality_in
from mm.data.stream import Step, Stream, rank_rows
from mm.data.transforms.compose import chain
from mm.errors import UserError
from mm.registry import STREAMS, TRANSFORMS
from mm.specs import Segment
from mm.vocabulary import Vocabulary


@STREAMS.register("bucketed")
class BucketedConfig(Config):
    """Token-budget batches of one document a row, from buckets of two lengths."""

    kind: Literal["bucketed"] = "bucketed"
    source: PackedSource
    axes: tuple[str, str] = ("audio", "text")  # modalities whose lengths make the buckets
    buckets: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] = (8, 4)
    batch_size: Annotated[
        int,
        Field(gt=0, description="rows of a step over all processes in the longest bucket; others "
              "take a multiple of it"),
    ] = 8  # fmt: skip
    tokens: Annotated[int, Field(gt=0, description="places of one step")] | None = (
        None  # default: what batch_size rows of the longest bucket take
    )
    micro_batch_size: Annotated[int, Field(gt=0)] | None = (
        None  # rows of one process at a time in the longest bucket; default all
    )
    max_length: Annotated[int, Field(gt=3)] | None = (
        None  # longer documents are left out and counted; default none
    )
    transform: tuple[TRANSFORMS.field, ...] = ()  # type: ignore[valid-type]
    prefetch: Annotated[int, Field(ge=0, description="steps made ahead")] = 2

    @classmethod
    def smallest(cls) -> BucketedConfig:
        from pathlib import Path

        return cls(source=PackedSource(path=Path("tokens")), buckets=(2, 2), batch_size=4)

    def build(
        self,
        *,
        vocabulary: Vocabulary | None = None,
        transform: Any = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> BucketedStream:
        """Open the shards; arguments as of `PackedConfig.build`.

        Raises:
            UserError: shards are missing or of another vocabulary, or sizes do not divide.
        """
        return BucketedStream(self, vocabulary, transform, seed, rank, world)


class Buckets(NamedTuple):
    """``of`` (N,) int64: bucket of every sample, -1 = left out; ``bound`` (K, 2) int64."""

    of: np.ndarray
    bound: np.ndarray


def make_buckets(lengths: np.ndarray, counts: Sequence[int]) -> Buckets:
    """Cut two lengths into buckets: first by the one, then each part by the other.

    Borders are quantiles by mass (a sample counts as often as it is long), which spreads the
    padding evenly over the buckets.

    Args:
        lengths: (N, 2) int64.
        counts: wanted buckets of the first axis, and of the second in each.
    Returns:
        Buckets with the longest lengths inside each as bounds; empty ones are left out.
    """
    of = np.full(len(lengths), -1, np.int64)
    bounds: list[tuple[int, int]] = []
    for part in _cut(np.arange(len(lengths)), lengths[:, 0], counts[0]):
        for piece in _cut(part, lengths[part, 1], counts[1]):
            of[piece] = len(bounds)
            bounds.append((int(lengths[piece, 0].max()), int(lengths[piece, 1].max())))
    return Buckets(of, np.array(bounds, np.int64).reshape(-1, 2))


def _cut(numbers: np.ndarray, lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split ``numbers`` by length into ``parts`` of equal mass; equal lengths stay together."""
    order = np.argsort(lengths, kind="stable")
    mass = np.cumsum(lengths[order] + 1.0)
    if not len(order):
        return []
    edges = {int(np.searchsorted(mass, mass[-1] * i / parts)) for i in range(1, parts)}
    ordered = lengths[order]
    edges = {
        int(np.searchsorted(ordered, ordered[e], side="right")) for e in edges if e < len(order)
    }
    return [numbers[p] for p in np.split(order, sorted(edges)) if len(p)]


class Planned(NamedTuple):
    """One step: a bucket's length, the samples, and how many rows at the end only fill it."""

    length: int
    samples: np.ndarray  # (B,) int64
    fillers: int


class BucketedStream(Stream):
    """See `BucketedConfig`.

    ``stats`` of the last step: padding_share, rows, length, tokens by modality, filtered,
    left_out (samples of the whole split that are too long or empty); and those of the run so far
    that `mm.data.account.running` names.
    """

    def __init__(
        self,
        config: BucketedConfig,
        vocabulary: Vocabulary | None,
        transform: Any,
        seed: int,
        rank: int,
        world: int,
    ):
        self.config, self.seed = config, seed
        self.mine = rank_rows(config.batch_size, config.micro_batch_size, rank, world)
        self.shards = shards = config.source.build()
        assert shards.vocabulary is not None
        self.vocabulary = vocabulary or shards.vocabulary
        self.vocabulary.require(shards.specs, str(config.source.path))
        own = config.source.transform
        self.transform = chain(config.transform if own is None else own, transform)
        axes = np.stack([np.maximum(shards.lengths(m), 0) for m in config.axes], 1)
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
        inside = make_buckets(axes[kept], config.buckets)
        self.bounds = np.array(
            [self.lengths[kept[inside.of == k]].max() for k in range(len(inside.bound))]
        )
        self.members = [kept[inside.of == k] for k in range(len(inside.bound))]
        self.budget = config.tokens or int(self.bounds.max()) * config.batch_size
        if self.budget < self.bounds.max() * config.batch_size:
            raise UserError(
                f"data.tokens {self.budget}: {config.batch_size} rows of the longest bucket take "
                f"{int(self.bounds.max()) * config.batch_size}: raise it, or lower "
                "data.batch_size or data.max_length"
            )
        self._plans: dict[int, list[Planned]] = {}
        plan = {
            "seed": seed,
            "batch_size": config.batch_size,
            "tokens": self.budget,
            "axes": list(config.axes),
            "buckets": list(config.buckets),
            "max_length": config.max_length,
            "source": [shards.split, len(shards), shards.fingerprint],
            "transform": key_of(
                config.transform,
                own,
                transform if isinstance(transform, (Config, dict, str)) else None,
            )
            % 2**32,
        }
        super().__init__(plan, config.prefetch)

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
        documents: list[list[Segment]] = []
        filtered = 0
        real = len(step.samples) - step.fillers
        for n, i in enumerate(step.samples):
            segments = [
                Segment(modality_in(slot), ids) for slot, ids in self.shards.tokens(int(i)).items()
            ]
            made: list[Segment] | None = segments if n < real else None
            if made is not None and self.transform.parts:
                made = self.transform(segments, generator(self.seed, "bucketed", epoch, int(i)))
                filtered += not made
            if not made:  # it keeps its place, which keeps the shape, and costs no loss
                made = [s._replace(weight=0.0) for s in segments]
            if document_length(made) > step.length:
                raise UserError(
                    f"data.transform makes sample '{self.shards.key(int(i))}' "
                    f"{document_length(made)} places long; its bucket has {step.length}"
                )
            documents.append(made)
        scale = len(step.samples) // self.config.batch_size
        micros = []
        for unit in self.mine:
            mine = range(unit.start * scale, unit.stop * scale)
            micros.append(
                to_batch(
                    [[documents[r]] for r in mine],
                    self.vocabulary,
                    step.length,
                    len(mine),
                    [self.shards.key(int(step.samples[r])) for r in mine],
                )
            )
        tokens: dict[str, int] = {}
        for document in documents[:real]:
            for s in document:
                if s.ids is not None:
                    tokens[s.modality] = tokens.get(s.modality, 0) + len(s.ids) + 2
        used = sum(document_length(d) for d in documents[:real])
        seen = carried(
            cursor,
            tokens=tokens,
            samples={0: real - filtered},
            rejects={"filtered": filtered},
        )
        stats = {
            "padding_share": 1 - used / (len(documents) * step.length),
            "rows": len(documents),
            "length": step.length,
            "tokens": tokens,
            "filtered": filtered,
            "left_out": self.left_out,
            **running(seen),
        }
        last = batch + 1 == len(plan)
        after = {"epoch": epoch + last, "batch": 0 if last else batch + 1}
        return Step(micros, {"step": cursor["step"] + 1, **after, **seen}, stats)

    def _plan(self, epoch: int) -> list[Planned]:
        """Steps of one epoch. What does not fill a step goes on to the next longer bucket."""
        if epoch not in self._plans:
            steps: list[Planned] = []
            rest = np.empty(0, np.int64)
            for k in np.argsort(self.bounds, kind="stable"):
                own = self.members[k]
                mixed = permute(np.arange(len(own)), len(own), key_of(self.seed, epoch, int(k)))
                line = np.concatenate([rest, own[mixed]])
                rows, length = self.rows(int(k)), int(self.bounds[k])
                full = len(line) // rows * rows
                steps += [Planned(length, line[i : i + rows], 0) for i in range(0, full, rows)]
                rest = line[full:]
            if len(rest):  # once an epoch: repeats without loss keep the rows divisible
                missing = -len(rest) % self.config.batch_size
                filled = np.concatenate([rest, np.resize(rest, missing)])
                steps.append(Planned(int(self.bounds.max()), filled, missing))
            order = permute(np.arange(len(steps)), len(steps), key_of(self.seed, "steps", epoch))
            self._plans = {e: p for e, p in self._plans.items() if e >= epoch - 1}
            self._plans[epoch] = [steps[i] for i in order]
        return self._plans[epoch]
