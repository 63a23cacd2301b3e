"""What all ranks do together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.data.streams.base import merge_states
from mm.errors import UserError
from mm.launch import environment
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.format import Saved
from mm.trainer.health.signals import INTERRUPTED, Interrupted, Stop

log = logging.getLogger("mm.trainer")


def on_any(flag: bool, device: torch.device) -> bool:
    """True on all ranks when ``flag`` is on one. Call on all ranks."""
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total > 0)


def most(n: int, device: torch.device) -> int:
    """The largest ``n`` of all ranks. Call on all ranks."""
    total = torch.tensor(n, device=device)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return int(total)


def of_all_rows(states: Sequence[Any], share: int = 1) -> Any:
    """The state of a stream with the rows of all ranks, of those of the ranks in their order.

    ``share`` ranks each have the same rows.
    """
    if len(states) == 1 or not states[0].get("rows"):
        return states[0]
    return merge_states(states[::share])


def newest_checkpoint(root: Path, device: torch.device) -> Saved | None:
    """The newest checkpoint whose files match their hashes; a damaged one is passed over.

    Each rank looks into its share of the files. Call on all ranks.
    """
    me = environment.ranks()
    steps: list[Any] = [[check.step_of(folder) for folder in check.folders(root)]]
    if me.world > 1:
        dist.broadcast_object_list(steps, 0, device=device)
    agree = lambda damaged: on_any(damaged, device)
    found = (checkpoint.load(root, step, (me.rank, me.world), agree) for step in steps[0])
    return next((saved for saved in found if saved is not None), None)


def on_main(work: Callable[[], Any], device: torch.device, where: object) -> None:
    """Run ``work`` on the main rank while the others wait. Call on all ranks.

    Raises UserError on all ranks when ``work`` does; ``where`` begins the others' message.
    """
    failed: UserError | None = None
    if environment.ranks().is_main:
        try:
            work()
        except UserError as error:
            failed = error
    if on_any(failed is not None, device):
        raise failed or UserError(f"{where}: the main process stopped, and says why")


@contextlib.contextmanager
def leave_before_step(
    stop: Stop, next_step: Callable[[], int], device: torch.device
) -> Iterator[None]:
    """Exit with 75 when a signal comes before a stage's first step: all before it is saved.

    At once when alone; several processes finish the block first, so that none waits in vain.
    """
    try:
        with stop.at_once() if environment.ranks().world == 1 else contextlib.nullcontext():
            yield
        if not on_any(stop.asked, device):
            return
    except Interrupted:
        pass
    if environment.ranks().is_main:
        log.warning("stopped by a signal before step %d; run the same command", next_step())
    raise SystemExit(INTERRUPTED)
