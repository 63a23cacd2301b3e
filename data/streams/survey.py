"""What a stage will read, told from the index before it begins: what is left out, and epochs.

Documents of equal lengths fare alike, so one of each kind goes through the transforms, without
reading data (a transform that reads ids gets some real documents). Where there are too many kinds,
or samples, some documents stand for all.

N samples, M modalities, R kinds of documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mm.data.shards.index import spread
from mm.data.streams.shuffle import key_of, permute
from mm.data.transforms.any_to_any import AnyToAny
from mm.data.transforms.compose import Chain
from mm.specs import Segment

LOOKED_AT = 1 << 20  # samples whose lengths are looked at, at most
KINDS = 4096  # documents that go through the transforms at most
REAL = 512  # of those that must be read
DRAWS = 16  # of a random transform, at most
ZERO = np.int32(0)
NEAR = 16  # smallest documents that show whether anything of a kind fits at all


class Drawn(NamedTuple):
    """Documents after the transforms: what the steps of a stage are made of."""

    segments: list[list[Segment]]
    weight: np.ndarray  # (len(segments),) float64: share of the source's samples


def survey_documents(stream: Any, steps: int) -> list[dict[str, Any]]:
    """What ``steps`` steps will see of every source of a stream of token documents.

    Args:
        stream: a `DocumentStream`.

    Returns:
        a source: ``source``, ``split``, ``samples``, ``tokens``, ``bytes``, ``longest`` (tokens),
        ``epochs``, ``left_out`` (reason -> share of ``samples`` and of ``tokens``), ``modalities``
        (name -> ``samples``, ``tokens``, ``used``: share of its samples that reach the model) and
        ``tasks`` (of any_to_any -> share of the documents).
    """
    found, drawn = [], []
    for s in range(len(stream.sources)):
        figures, documents = _Source(stream, s).survey()
        found.append(figures)
        drawn.append(documents)
    for figures, epochs in zip(found, stream.epochs_of(steps, drawn), strict=True):
        figures["epochs"] = epochs
    return found


class _Source:
    """One source: its lengths (N, M), and how its documents fare."""

    def __init__(self, stream: Any, s: int):
        self.stream, self.s, self.shards = stream, s, stream.sources[s]
        self.names = [m.modality for m in self.shards.specs]
        self.chain = stream.transforms[s]
        # an interleaved sample has an order of its own, and no task
        parts = () if self.shards.interleaved else self.chain.parts
        self.tasks = [p for p in parts if isinstance(p, AnyToAny)]
        self.real = not all(p.by_length for p in self.chain.parts)
        n = len(self.shards)
        self.at = spread(n, LOOKED_AT)  # N from here on
        self.scale = n / len(self.at)
        columns = [np.maximum(self.shards.lengths(m)[self.at], 0) for m in self.names]
        self.codes = np.stack(columns, 1).astype(np.int64)
        spans = [self.shards.segments(m, self.at) for m in self.names]
        self.spans = np.stack(spans, 1).astype(np.int64)
        around = [0 if spec.inline else 2 for spec in self.shards.specs]  # begin and end
        self.tokens = self.codes + np.array(around) * self.spans
        self.whole = self.tokens.sum(1)

    def survey(self) -> tuple[dict[str, Any], Drawn]:
        picked, weight, tokens, having = self._kinds()
        R, M = len(picked), len(self.names)
        draws = min(DRAWS, max(1, KINDS // R)) if self.tasks or self.real else 1
        rng = np.random.default_rng([29, self.s])
        reasons: dict[str, np.ndarray] = {}
        used, tasks = np.zeros((R, M)), dict.fromkeys(self._task_names(), 0.0)
        kept: list[list[Segment]] = []
        shares: list[float] = []
        for r, i in enumerate(picked):
            raw = self._segments(int(i))
            for _ in range(draws):
                made = self.chain(list(raw), rng) if self.chain.parts else raw
                why = self.stream.fate(raw, made)
                if why:
                    reasons.setdefault(why, np.zeros(R))[r] += 1 / draws
                    continue
                assert made is not None
                there = {s.modality for s in made}
                used[r] += [(m in there) / draws for m in self.names]
                if (task := _task_of(made)) in tasks:
                    tasks[task] += weight[r] / draws
                kept.append(made)
                shares.append(weight[r] / draws)
        samples = np.maximum((self.spans > 0).sum(0), 0)
        reach = (used * having).sum(0) / np.maximum(having.sum(0), 1e-12)
        modalities = {
            m: {
                "samples": round(n * self.scale),
                "tokens": round(t * self.scale),
                "bytes": self.shards.bytes_of(m),
                "used": float(u),
            }
            for m, n, t, u in zip(self.names, samples, self.tokens.sum(0), reach, strict=True)
            if n
        }
        for m, entry in modalities.items():  # a rare one may be among what was not looked at
            if not entry["used"]:
                entry["used"] = self._smallest_fits([m]) / len(self.at)
        total = max(1e-12, sum(tasks.values()))
        for task, share in tasks.items():
            wanted = task.replace(">", "+").split("+")
            tasks[task] = share / total or self._smallest_fits(wanted, task) / len(self.at)
        figures = {
            "source": str(self.stream.config.token_sources[self.s].path),
            "split": self.shards.split,
            "samples": len(self.shards),
            "tokens": round(int(self.whole.sum()) * self.scale),
            "bytes": self.shards.n_bytes,
            "longest": int(self.whole.max()),
            "left_out": {
                why: {
                    "samples": float((share * weight).sum() / weight.sum()),
                    "tokens": float((share * tokens).sum() / max(1.0, tokens.sum())),
                }
                for why, share in sorted(reasons.items())
            },
            "modalities": modalities,
            "tasks": tasks,
        }
        return figures, Drawn(kept, np.array(shares) / max(1e-12, weight.sum()))

    def _kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Samples that stand for all.

        Returns:
            numbers (R,), samples and tokens that each stands for (R,), and its samples with each
            modality (R, M).
        """
        n, limit = len(self.at), REAL if self.real else KINDS
        if self.chain.parts:
            columns = (*self.codes.T, *self.spans.T)
        else:  # what tells their fate as they are
            columns = (self.whole, self.spans.sum(1))
        kind = np.zeros(n, np.int64)
        for column in columns:
            if column.min() < column.max():
                size = int(column.max()) + 1
                kind = np.unique(kind * size + column, return_inverse=True)[1]
        n_kinds = int(kind.max()) + 1
        if not self.real and (n_kinds <= limit or not self.chain.parts):
            first = np.full(n_kinds, n)
            np.minimum.at(first, kind, np.arange(n))
            having = [np.bincount(kind, column > 0) for column in self.spans.T]
            weight = np.bincount(kind).astype(np.float64)
            return first, weight, np.bincount(kind, self.whole), np.stack(having, 1)
        picked = permute(np.arange(min(n, limit)), n, key_of("survey", self.s))
        having = (self.spans[picked] > 0).astype(np.float64)
        return picked, np.ones(len(picked)), self.whole[picked].astype(np.float64), having

    def _segments(self, i: int) -> list[Segment]:
        if self.real:
            return self.stream.segments(self.s, int(self.at[i]))
        out = []
        for m, codes, spans in zip(
            self.names, self.codes[i].tolist(), self.spans[i].tolist(), strict=True
        ):
            for k in range(spans):  # an interleaved sample's are all of about one length
                size = codes // spans + (k < codes % spans)
                inline = self.stream.vocabulary.spec(m).inline
                out.append(Segment(m, np.broadcast_to(ZERO, size), inline=inline))
        return out

    def _task_names(self) -> list[str]:
        return [_name(t.conditions, t.targets) for part in self.tasks for t in part.tasks]

    def _smallest_fits(self, modalities: Sequence[str], task: str | None = None) -> int:
        """How many of the smallest documents that have these modalities reach the model.

        With the one task ``task`` of any_to_any, or else with any.
        """
        if not set(modalities) <= set(self.names):
            return 0
        columns = [self.names.index(m) for m in modalities]
        having = np.flatnonzero((self.spans[:, columns] > 0).all(1))
        having = having[np.argsort(self.whole[having], kind="stable")[:NEAR]]
        rng = np.random.default_rng([31, self.s])
        named = [t for t in self._task_names() if task in (None, t)] if self.tasks else [None]
        fits = 0
        for name in named:
            chain = Chain([_only(p, name) for p in self.chain.parts])
            for i in having:
                raw = self._segments(int(i))
                made = chain(list(raw), rng) if chain.parts else raw
                there = {s.modality for s in made or ()}
                fits += not self.stream.fate(raw, made) and set(modalities) <= there
        return fits


def _only(part: Any, name: str | None) -> Any:
    """any_to_any with one of its tasks; any other transform as it is."""
    if not isinstance(part, AnyToAny) or name is None:
        return part
    one = {t: w for t, w in part.tasks.items() if _name(t.conditions, t.targets) == name}
    return AnyToAny(one or part.tasks, 0.0, part.repeats)


def _task_of(made: Sequence[Segment]) -> str:
    conditions = dict.fromkeys(s.modality for s in made if s.role == "condition")
    return _name(conditions, [s.modality for s in made if s.role != "condition"])


def _name(conditions: Iterable[str], targets: Iterable[str]) -> str:
    given = "+".join(conditions)
    return f"{given}>{'+'.join(targets)}" if given else "+".join(targets)
