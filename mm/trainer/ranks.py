"""What all ranks do together, and what the main rank does while the others wait."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.data.streams.base import merge_states
from mm.errors import Damaged, UserError
from mm.launch import environment
from mm.trainer.checkpoint import check
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.format import Saved
from mm.trainer.health.signals import INTERRUPTED, Interrupted, Stop

log = logging.getLogger("mm.trainer")

HEARD_S = 2.0  # until a rank that stopped has said why
PAUSES_S = (0.002, 0.5)  # first and longest between two looks at whether the main rank is done
_turns = itertools.count(1)  # of `main_alone`: all ranks take as many


@contextlib.contextmanager
def main_alone() -> Iterator[bool]:
    """A turn of the main rank, as long as it likes: True there. Enter and leave it on ALL ranks.

    The others leave it when the main rank has. They ask the group's store: the collective that
    comes next would give up after half an hour, and end a run whose model takes longer to write.
    """
    me = environment.ranks()
    if me.world == 1 or not dist.is_initialized():
        yield me.is_main
        return
    store, turn = dist.distributed_c10d._get_default_store(), next(_turns)
    try:
        yield me.is_main
    finally:
        if me.is_main:
            store.add("mm/main/turns", 1)
        pause = PAUSES_S[0]
        # Looks, not one long wait, which would keep the store from the thread of a save.
        while not me.is_main and store.add("mm/main/turns", 0) < turn:
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_S[1])


def on_any(flag: bool, device: torch.device) -> bool:
    """True on all ranks when ``flag`` is on one. Call on all ranks."""
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return bool(total > 0)


def first_told(fault: str | None, device: torch.device) -> str | None:
    """The ``fault`` of the first rank that has one, with its name, on all ranks; None without one.

    Call on all ranks.
    """
    me = environment.ranks()
    if me.world == 1 or not on_any(fault is not None, device):
        return fault
    everyone: list[Any] = [None] * me.world
    dist.all_gather_object(everyone, None if fault is None else f"{_name()}: {fault}")
    return next(said for said in everyone if said is not None)


def _name() -> str:
    return f"rank {environment.ranks().rank} on {socket.gethostname()}"


@contextlib.contextmanager
def hear_others() -> Iterator[None]:
    """Let an error that stops one rank be that of all which it leaves in a collective.

    Raises UserError where another rank said why it stopped; `Damaged` names this one.
    """
    if environment.ranks().world == 1 or not dist.is_initialized():
        yield
        return
    store, key = dist.distributed_c10d._get_default_store(), "mm/stopped"
    try:
        yield
    except UserError as error:
        told = f"{_name()}: {error}"
        with contextlib.suppress(RuntimeError):  # who keeps the store is gone
            store.set(key, told)
        raise (Damaged(told) if isinstance(error, Damaged) else error) from error.__cause__
    except RuntimeError as error:  # a connection that was closed, if it is that
        end = time.monotonic() + HEARD_S
        with contextlib.suppress(RuntimeError):
            while not store.check([key]) and time.monotonic() < end:
                time.sleep(PAUSES_S[1] / 10)
            if store.check([key]):
                raise UserError(store.get(key).decode()) from error
        raise


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
    agree = lambda fault: first_told(fault, device)
    found = (checkpoint.load(root, step, (me.rank, me.world), agree) for step in steps[0])
    return next((saved for saved in found if saved is not None), None)


def on_main(work: Callable[[], Any], device: torch.device) -> None:
    """Run ``work`` on the main rank while the others wait. Call on all ranks.

    Raises UserError on all ranks when ``work`` does.
    """
    failed: UserError | None = None
    with main_alone() as mine:
        try:
            if mine:
                work()
        except UserError as error:
            failed = error
    told = first_told(None if failed is None else str(failed), device)
    if told is not None:
        raise failed or UserError(told)


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
