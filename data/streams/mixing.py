"""How many samples each source gives.

By weights in samples or tokens, or by token shares of modalities, constant or scheduled. Everything
is a pure function of the block number, so a stream seeks in O(1).

What is exact: the blocks 0 .. n - 1 together, over all row streams, take of every source its share
of the samples within half a sample, for every n; so a single block is within one sample. Weights in
tokens, and shares of modalities, are turned into shares of samples by the mean tokens of a sample
of each source (`PackedStream.prepare`), the same on all ranks, and are as exact as these.

S sources, K knots, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeGuard

import numpy as np

from mm.errors import UserError

Schedule = float | Mapping[int, float]  # a constant, or samples drawn so far -> value
TOLERANCE = 0.02  # absolute error of a modality's share that counts as reached


class Plan(NamedTuple):
    """Shares of the samples at some points of the run, linear between them."""

    at: np.ndarray  # (K,) float64, blocks
    shares: np.ndarray  # (K, S) float64, each row sums to 1
    block_samples: int

    def drawn_before(self, block: float) -> list[int]:
        """Samples that each source gave before ``block``: (S,).

        The rounded integral of the shares: whatever the block, no source is more than one sample
        away from its exact part.
        """
        if len(self.at) == 1:
            return [int(x) for x in np.floor(self.shares[0] * (block * self.block_samples) + 0.5)]
        total = np.zeros(self.shares.shape[1])
        edges = [0.0, *(float(a) for a in self.at if 0 < a < block), float(block)]
        for left, right in zip(edges, edges[1:], strict=False):
            total += (right - left) * (self.at_block(left) + self.at_block(right)) / 2
        return [int(x) for x in np.floor(total * self.block_samples + 0.5)]

    def at_block(self, block: float) -> np.ndarray:
        """Shares of the samples at one point of the run. (S,) float64."""
        return np.array([np.interp(block, self.at, column) for column in self.shares.T])


def plan(
    weights: Sequence[Schedule],
    block_samples: int,
    unit: str = "samples",
    modality_tokens: Mapping[str, Schedule] | None = None,
    tokens: Sequence[Mapping[str, float]] = (),
) -> Plan:
    """Turn weights into samples of every source a block.

    Args:
        weights: of the sources.
        block_samples: samples of one block, all sources together.
        unit: "samples", or "tokens": the weights are then shares of the tokens.
        modality_tokens: wanted shares of the tokens by modality; sources are then mixed to reach
            them, starting from ``weights``.
        tokens: mean tokens of one sample by modality, for every source; not needed for "samples".
    Raises:
        UserError: all weights are 0 somewhere, or no mixture of the sources has these shares.
    """
    wanted = modality_tokens or {}
    points = sorted({0, *(int(p) for s in (*weights, *wanted.values()) if _varies(s) for p in s)})
    rows = []
    for point in points:
        share = np.array([value_at(w, point) for w in weights])
        if share.sum() <= 0:
            raise UserError(f"data.sources: every weight is 0 after {point} samples")
        if unit == "tokens" or wanted:
            size = np.array([sum(t.values()) for t in tokens])
            if (size <= 0).any():
                raise UserError(
                    f"data.sources[{int(np.argmin(size))}]: its samples have no tokens, so it "
                    "cannot be mixed by tokens"
                )
            if unit == "samples":
                share = share * size
            if wanted:
                goal = {m: value_at(s, point) for m, s in wanted.items()}
                share = reach(goal, share / share.sum(), tokens)
            share = share / size
        rows.append(share / share.sum())
    return Plan(np.array(points) / block_samples, np.array(rows), block_samples)


def reach(
    goal: Mapping[str, float], start: np.ndarray, tokens: Sequence[Mapping[str, float]]
) -> np.ndarray:
    """Shares of the tokens by source that give the wanted shares by modality.

    Expectation-maximisation for the weights of a mixture of known distributions: each step raises
    the likelihood of ``goal``, and sources that do not have to change keep the ratio of ``start``.
    Source: Dempster, Laird, Rubin 1977, section 4.3 (finite mixtures).

    Args:
        goal: modality -> weight.
        start: (S,) shares of the tokens.
        tokens: mean tokens of one sample by modality, for every source.
    Raises:
        UserError: no mixture comes within 2 % of the goal; says what would.
    """
    names = sorted({*goal, *(m for t in tokens for m in t)})
    want = np.array([goal.get(m, 0.0) for m in names])
    if want.sum() <= 0:
        raise UserError("data.modality_tokens: every weight is 0")
    want = want / want.sum()
    part = np.array([[t.get(m, 0.0) / sum(t.values()) for m in names] for t in tokens])  # (S, M)
    share = start / start.sum()
    for _ in range(4000):
        have = share @ part
        ratio = np.divide(want, have, out=np.zeros_like(want), where=have > 0)
        new = share * (part @ ratio)
        if new.sum() <= 0:
            break
        new = new / new.sum()
        if np.abs(new - share).max() < 1e-9:
            share = new
            break
        share = new
    have = share @ part
    if np.abs(have - want).max() > TOLERANCE:
        said = lambda values: ", ".join(
            f"{m} {v:.3f}" for m, v in zip(names, values, strict=True) if v > 0
        )
        raise UserError(
            f"data.modality_tokens: no mixture of these sources has {said(want)}; the nearest is "
            f"{said(have)}: add a source of what is missing, or ask for this"
        )
    return share


def _varies(schedule: Schedule) -> TypeGuard[Mapping[int, float]]:
    return isinstance(schedule, Mapping)


def value_at(schedule: Schedule, at: int) -> float:
    """A weight after ``at`` samples."""
    if not isinstance(schedule, Mapping):
        return float(schedule)
    points = sorted(schedule)
    return float(np.interp(at, points, [schedule[p] for p in points]))
