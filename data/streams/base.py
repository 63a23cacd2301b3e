"""Stream: what a stage's data config builds.

A step is a pure function of a small cursor, so resume is a seek. Row r of every global step belongs
to row stream r, whatever process reads it: a process plans and reads its own rows alone, so its
cost does not grow with the number of processes, and any number of them reads the same steps.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mm.batch import Batch
from mm.data.streams.stats import is_sum
from mm.errors import UserError


class Step(NamedTuple):
    """One optimizer step of this rank."""

    micros: list[Batch]
    cursor: dict[str, int]  # where the NEXT step of the own rows begins, see `merge_states`
    counts: dict[str, int]  # what the own rows hold; summed over the ranks, what the step holds


class Stream(ABC):
    """Endless batches in an order that depends on the seed alone.

    Not on ranks, threads or restarts.

    Subclasses write `advance`. ``prefetch`` steps are made ahead in a thread; the state reflects
    what was CONSUMED.

    Attributes:
        own_rows: global row numbers of this rank's micro-batches, contiguous over them.
        counted: names of the counts of a step, the same on all ranks.
        counts: of the last step, of the own rows.
        carried_rows: rows of a step whose documents go on in the next step; 0 = none does.
        max_length: longest document of a stream that carries rows, for the States of a model.
        made: called with each micro-batch that was made ahead, in the thread that made it.
    """

    own_rows: list[range]
    counted: tuple[str, ...] = ()
    carried_rows: int = 0
    max_length: int = 0
    made: Callable[[Batch], None] | None = None

    def __init__(self, plan: Mapping[str, Any], prefetch: int = 2):
        self.plan = dict(plan)  # what the order depends on; a resume under another plan is refused
        self.counts = dict.fromkeys(self.counted, 0)
        self._cursor: dict[str, int] = self.start()
        self._prefetch = prefetch
        self._queue: queue.Queue[Step | BaseException] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def start(self) -> dict[str, int]:
        """Cursor of the first step."""

    @abstractmethod
    def advance(self, cursor: Mapping[str, int]) -> Step:
        """Make the step at ``cursor``; pure, apart from caches."""

    def summarize(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Figures of a step from its ``counts``, those of the own rows or summed over the ranks."""
        return dict(counts)

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the last step's own rows: of the whole step where there is one rank."""
        return self.summarize(self.counts)

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, on the CPU.

        Raises what making them raised.
        """
        if self._prefetch <= 0:
            step: Step | BaseException = self.advance(self._cursor)
        else:
            if self._thread is None:
                self._queue = queue.Queue(self._prefetch)
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._work,
                    args=(self._queue, self._stop, dict(self._cursor)),
                    name="mm-data",
                    daemon=True,
                )
                self._thread.start()
            assert self._queue is not None
            step = self._queue.get()
        if isinstance(step, BaseException):
            self.close()
            raise step
        self._cursor = step.cursor
        self.counts = {name: step.counts.get(name, 0) for name in self.counted}
        return step.micros

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next()

    @property
    def span(self) -> list[int]:
        """First row of this rank, and the one after its last."""
        return [self.own_rows[0].start, self.own_rows[-1].stop] if hasattr(self, "own_rows") else []

    def state_dict(self) -> dict[str, Any]:
        """Where the next step of the own rows begins; JSON-able.

        `merge_states` makes one of all ranks', which any number of processes loads.
        """
        return {"cursor": dict(self._cursor), "plan": dict(self.plan), "rows": self.span}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Seek to the own part of a state, one's own or merged.

        Sums of the run so far go to the rank that has the first row of the state.

        Raises UserError naming every difference when the state belongs to another plan or order.
        """
        if state["plan"].get("order") != self.plan.get("order"):
            raise UserError(
                "data of this run: the checkpoint is of another order of the data "
                f"({state['plan'].get('order', 'blocks over all rows')!r}, this version reads "
                f"{self.plan.get('order')!r}): go on with the version that wrote it, or train "
                "under another run name: name=..."
            )
        changed = [
            f"{key}: {state['plan'].get(key)!r} -> {self.plan.get(key)!r}"
            for key in sorted({*state["plan"], *self.plan})
            if state["plan"].get(key) != self.plan.get(key)
        ]
        if changed:
            raise UserError(
                "data of this run changed since the checkpoint ("
                + "; ".join(changed)
                + "): restore it, or train "
                "under another run name"
            )
        cursor = {key: int(value) for key, value in state["cursor"].items()}
        own = self.start()
        missing = sorted(own.keys() - cursor.keys())
        if missing:
            raise UserError(
                f"data of this run: the checkpoint's cursor has no '{missing[0]}', so an older "
                "version wrote it: train under another run name"
            )
        self.close()
        first = (state.get("rows") or [0])[0] == (self.span or [0])[0]
        self._cursor = {k: v for k, v in cursor.items() if k in own or (is_sum(k) and first)}

    def close(self) -> None:
        """Stop the thread and drop what it made ahead.

        `next` may be called again; it goes on from what was consumed.
        """
        thread, self._thread = self._thread, None
        self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            while thread.is_alive():
                try:  # a full queue would keep the thread waiting
                    assert self._queue is not None
                    self._queue.get_nowait()
                except queue.Empty:
                    thread.join(0.01)
        self._queue = None

    def _work(
        self, out: queue.Queue[Step | BaseException], stop: threading.Event, cursor: dict[str, int]
    ) -> None:
        while not stop.is_set():
            try:
                step: Step | BaseException = self.advance(cursor)
                if (made := self.made) is not None:
                    for micro in step.micros:
                        made(micro)
            except BaseException as error:  # noqa: BLE001  it is raised again in `next`
                step = error
            while not stop.is_set():
                try:
                    out.put(step, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(step, BaseException):
                return
            cursor = step.cursor


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of all rows from those of the ranks, in their order.

    Sums of the run so far are added; what several ranks say of where they are must be the same.
    """
    cursor: dict[str, int] = {}
    for state in states:
        for key, value in state["cursor"].items():
            if is_sum(key):
                cursor[key] = cursor.get(key, 0) + value
            elif cursor.setdefault(key, value) != value:
                raise ValueError(f"ranks are at {key} {cursor[key]} and {value}")
    ends = [row for state in states for row in state["rows"]]
    return {**states[0], "cursor": cursor, "rows": [min(ends), max(ends)] if ends else []}


def rank_rows(batch_size: int, micro: int | None, rank: int, world: int) -> list[range]:
    """Global row numbers of this rank's micro-batches.

    Contiguous, disjoint, complete over the ranks.

    Raises:
        UserError: the sizes do not divide, naming the keys.
    """
    if batch_size % world:
        fits = [w for w in range(1, batch_size + 1) if batch_size % w == 0]
        raise UserError(
            f"data.batch_size {batch_size} does not divide over {world} processes; possible: {fits}"
        )
    mine = batch_size // world
    size = min(micro or mine, mine)
    if mine % size:
        fits = [m for m in range(1, mine + 1) if mine % m == 0]
        raise UserError(
            f"data.micro_batch_size {size} does not divide the {mine} rows of a process "
            f"(batch_size {batch_size} / {world}); possible: {fits}"
        )
    first = rank * mine
    return [range(first + i, first + i + size) for i in range(0, mine, size)]
