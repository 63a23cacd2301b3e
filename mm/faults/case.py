"""A case: what is injected, and what must be left afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mm.faults.bench import Bench, Ended
from mm.faults.compare import differences

KILLED, USER_ERROR = -9, 2


class Case(NamedTuple):
    """One row of the result."""

    name: str
    outcome: str  # what must happen
    tries: Callable[[Bench, bool], Iterator[str]]  # (bench, quick) -> what each try lost


def resume_and_compare(
    bench: Bench, config: Mapping[str, Any], ended: Ended, code: int, world: int = 1, **kw: Any
) -> str:
    """Check how the broken run ended, run the same command again, compare with the unbroken run."""
    if code not in ended.codes:
        return f"exit codes {ended.codes} instead of {code}: {ended.said[-300:]}"
    whole = bench.whole(config, world=world, **kw)
    again = bench.train(config, world=world, **kw)
    if again.codes != [0] * world:
        return f"the next start ended with {again.codes}: {again.said[-300:]}"
    lost = differences(whole, bench.folder(config))
    if not lost:
        bench.drop(config)
    return lost
