"""The tasks of a run, each done by one process of the launch.

The figures do not depend on how many there are.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mm.errors import UserError
from mm.launch.environment import ranks

if TYPE_CHECKING:
    from mm.tasks.base import Task

GIVEN_UP = "mm/tasks/given_up"
PATIENCE = timedelta(days=2)  # one process may have the longest task
_calls, _meetings = itertools.count(), itertools.count()


def measure(
    tasks: Sequence[Task], evaluate: Callable[[Task], dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Evaluate ``tasks``; under a launcher the processes take them from one list, in its order.

    Args:
        tasks: the same on every process.
        evaluate: Task -> JSON-able figures.
    Yields:
        on the first process (place in ``tasks``, figures with the task's ``seconds``) as they
        become known, each once; on the others nothing.
    Raises:
        UserError: a task failed, here or in another process.
    """
    if ranks().world == 1:
        for n, task in enumerate(tasks):
            yield n, _timed(task, evaluate)
        return
    store, rank, size = _meet()
    here = f"mm/tasks/{next(_calls)}"
    waiting, problems = list(range(len(tasks))), []

    def arrivals() -> Iterator[tuple[int, dict[str, Any]]]:
        for n in [n for n in waiting if store.check([f"{here}/{n}"])]:
            waiting.remove(n)
            said = json.loads(store.get(f"{here}/{n}"))
            if "error" in said:
                problems.append(UserError(said["error"]))
            else:
                yield n, said

    left = 0
    try:
        while (mine := store.add(f"{here}/taken", 1) - 1) < len(tasks):
            try:
                said = _timed(tasks[mine], evaluate)
            except Exception as error:
                said = {"error": str(error)}
                problems.append(error)
                store.add(f"{here}/taken", len(tasks))  # nobody begins another one
            store.set(f"{here}/{mine}", json.dumps(said))
            if rank == 0:
                yield from arrivals()
    finally:  # a signal leaves, too
        left = store.add(f"{here}/left", 1)
    # The first process may hold the store: it stays until nobody asks any more.
    while rank == 0 and left < size and not store.check([GIVEN_UP]):
        time.sleep(0.05)
        yield from arrivals()
        left = store.add(f"{here}/left", 0)
    if rank == 0:
        yield from arrivals()
    if problems:
        raise problems[0]


@functools.cache
def _meet() -> Any:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():  # in a run: its ranks have met
        store = dist.distributed_c10d._get_default_store()
        return store, dist.get_rank(), dist.get_world_size()
    return next(rendezvous("env://", timeout=PATIENCE))


def give_up() -> None:
    """Tell the first process not to wait for this one: a signal ends the run."""
    if ranks().world > 1:
        _meet()[0].set(GIVEN_UP, "1")


def wait_for_all() -> None:
    """Wait for all ranks of a run without a collective, which would time out. Call on all."""
    if ranks().world == 1:
        return
    store, _, size = _meet()
    key = f"mm/tasks/met/{next(_meetings)}"
    here = store.add(key, 1)
    while here < size:
        time.sleep(0.05)
        here = store.add(key, 0)


def _timed(task: Task, evaluate: Callable[[Task], dict[str, Any]]) -> dict[str, Any]:
    start = time.monotonic()
    found = evaluate(task)
    return {"figures": found, "seconds": round(time.monotonic() - start, 2)}
