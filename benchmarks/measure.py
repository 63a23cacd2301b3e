"""Interleaved timing for the benchmarks.

Processor time of this process, so that other jobs on the machine matter little, and ratios of
neighbouring runs, so that its changing speed matters less.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Work = Callable[[], object]
PATIENCE = [60.0]  # seconds of processor time for one comparison


class Missing(Exception):
    """A peer that is not installed, or a part that this tree lacks."""


class Ratio(NamedTuple):
    """Median of the ratios of neighbouring runs, and its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Ratio:
        """By order statistics: of fewer than 6 values the interval is their whole range."""
        ordered, n = sorted(values), len(values)
        low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
        return Ratio(statistics.median(ordered), ordered[low], ordered[n - 1 - low])

    def inverse(self) -> Ratio:
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)


class Figure(NamedTuple):
    """A goal and what was measured. ``low`` and ``high``: interval, where repeats say one."""

    goal: str
    what: str
    bar: str
    anchor: str
    figure: float
    met: bool
    low: float | None = None
    high: float | None = None


def at_most(goal: str, what: str, bar: float, anchor: str, found: Ratio | float) -> Figure:
    value, *interval = found if isinstance(found, Ratio) else (found,)
    return Figure(goal, what, f"<= {bar:g}", anchor, value, value <= bar, *interval)


def at_least(goal: str, what: str, bar: float, anchor: str, found: Ratio | float) -> Figure:
    value, *interval = found if isinstance(found, Ratio) else (found,)
    return Figure(goal, what, f">= {bar:g}", anchor, value, value >= bar, *interval)


class Children:
    """Processor seconds of the processes that a with-block started and waited for."""

    seconds = 0.0

    def __enter__(self) -> Children:
        self._before = self._spent()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = self._spent() - self._before

    @staticmethod
    def _spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime


def timed(work: Work) -> float:
    """Processor seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def seconds(*works: Work, repeats: int = 9, warm: bool = True) -> list[list[float]]:
    """Processor seconds of each, run in turns until ``repeats`` or the patience is over."""
    spent = sum(timed(work) for work in works) if warm else 0.0
    taken: list[list[float]] = [[] for _ in works]
    while len(taken[0]) < repeats and (not taken[0] or spent < PATIENCE[0]):
        for kept, work in zip(taken, works, strict=True):
            kept.append(timed(work))
            spent += kept[-1]
    return taken


def ratios(mine: Work, *peers: Work, repeats: int = 9, warm: bool = True) -> list[Ratio]:
    """Time of ``mine`` over that of each peer, pair by pair."""
    own, *others = seconds(mine, *peers, repeats=repeats, warm=warm)
    return [Ratio.of([a / b for a, b in zip(own, other, strict=True)]) for other in others]


def fastest(mine: Work, peers: dict[str, Work], repeats: int = 9) -> tuple[str, Ratio]:
    """The peer with the smallest median, and the time of ``mine`` over its."""
    own, *others = seconds(mine, *peers.values(), repeats=repeats)
    name, best = min(zip(peers, others, strict=True), key=lambda pair: statistics.median(pair[1]))
    return name, Ratio.of([a / b for a, b in zip(own, best, strict=True)])


def backward(f: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward of ``f`` on leaves that need gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        dy = torch.randn_like(f(*leaves))
    return lambda: torch.autograd.grad(f(*leaves), leaves, dy)


def backward_of(f: Callable[[Tensor], Tensor], module: torch.nn.Module, x: Tensor) -> Work:
    """Forward and backward to the input and every parameter."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    dy = torch.randn_like(x)
    return lambda: torch.autograd.grad(f(x), wanted, dy, allow_unused=True)
