"""The tracker: metrics.jsonl mirrored into the run's sinks, none of which can hurt it.

Each sink is opened, fed and closed by a thread of its own. The training only puts what it has to
say into a queue: a sink that is slow, hangs, dies, is rate-limited or full costs it nothing. One
that fails falls silent after one warning; what a full queue could not take is counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.run import Run
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.log import lineage
from mm.trainer.log.sinks.base import Artifact, Level, Place, Sink

log = logging.getLogger("mm.trainer")

FILE = "run_id.json"
QUEUE = 10_000  # things to say that a sink may be behind
FINISH_TIMEOUT_S = 30.0  # of all sinks together
Action = Callable[[Sink], None]


class Feed:
    """A sink and the thread that feeds it."""

    def __init__(self, name: str, open_: Callable[[], Sink | None]):
        self.name, self.left_out, self.failed = name, 0, False
        self.opened = threading.Event()
        self._queue: queue.Queue[tuple[str, Action] | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(
            target=self._work, args=(open_,), daemon=True, name=f"mm-{name}"
        )
        self._thread.start()

    def put(self, what: str, action: Action) -> None:
        """Have the thread do it, in its turn; never waits."""
        if self.failed:
            return
        try:
            self._queue.put_nowait((what, action))
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                log.warning(
                    "%s is %d entries behind: newer ones are left out until it catches up "
                    "(metrics.jsonl has them)",
                    self.name,
                    QUEUE,
                )

    def finish(self, timeout_s: float) -> None:
        """Send what is left, for at most ``timeout_s``; then go on without."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self.failed = True  # it hangs: nothing of it will be sent
        else:
            self._thread.join(timeout_s)
        if self._thread.is_alive() or self.left_out:
            log.warning(
                "%s: no answer in %.0f s, or too slow: %d entries were left out "
                "(metrics.jsonl has them)",
                self.name,
                timeout_s,
                self.left_out + self._queue.qsize(),
            )

    def _work(self, open_: Callable[[], Sink | None]) -> None:
        what = "start"
        try:
            sink = open_()
            self.opened.set()
            while sink is not None:
                item = self._queue.get()
                if item is None or self.failed:
                    what = "finish"
                    sink.finish()
                    return
                what, action = item
                action(sink)
        except BaseException as error:  # noqa: BLE001  whatever a library raises, exits too
            self.failed = True
            log.warning(
                "%s %s failed, tracking is off for this run (metrics.jsonl goes on): %s",
                self.name,
                what,
                error,
            )
        self.failed = True
        self.opened.set()


class Tracker(Callback):
    """The sinks of a run. `none` makes one that does nothing (other ranks)."""

    def __init__(self, feeds: Sequence[Feed] = (), run_id: str | None = None):
        self.feeds, self.id = list(feeds), run_id

    @classmethod
    def none(cls) -> Tracker:
        return cls()

    @classmethod
    def start(
        cls,
        run: Run,
        folder: Path,
        environment: Mapping[str, Any],
        run_id: str | None = None,
    ) -> Tracker:
        """Open (or, with the id of an earlier part, continue) the run in every sink.

        Writes ``run_id.json``, ``lineage.json`` and, where the code was changed, ``code.diff``.
        """
        goes_on = bool(_read(folder) or run_id)
        run_id = own_id(folder, run_id)
        commit = environment.get("commit")
        lineage.write_diff(folder, commit)
        read = [*lineage.inputs(run), *lineage.code(folder, commit)]
        told = lineage.write(folder, read, lineage.outputs(run, 0))
        config = {**run.to_dict(), "environment": dict(environment), "lineage": told["inputs"]}
        return cls._open(Place(run, folder, run_id, config, read, goes_on))

    @classmethod
    def go_on(cls, run: Run, folder: Path, run_id: str | None) -> Tracker:
        """The run of a training that is over, such as to add to its summary."""
        known = _read(folder) or run_id
        return cls._open(Place(run, folder, known)) if known else cls.none()

    @classmethod
    def _open(cls, place: Place) -> Tracker:
        feeds = []
        for config in place.run.tracking.sinks:
            feeds.append(Feed(config.kind, lambda config=config: config.build(place)))
        return cls(feeds, place.run_id)

    def wait_until_open(self, timeout_s: float) -> bool:
        """Whether all sinks are open; waits for them. The training itself never does."""
        end = time.monotonic() + timeout_s
        for feed in self.feeds:
            feed.opened.wait(max(0.0, end - time.monotonic()))
        return all(feed.opened.is_set() and not feed.failed for feed in self.feeds)

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        self.log(metrics, step)

    def on_end(self, trainer: Training) -> None:
        """Show what a run that came to its end has made, and its best."""
        best = trainer.held_out.result()
        if best is not None:
            step, value, *name = best
            self.summary({"best/step": step, f"best/{name[0] if name else 'val_loss'}": value})
        if trainer.step < trainer.steps:
            return
        made = lineage.outputs(trainer.run, trainer.step)
        lineage.add_outputs(trainer.folder, made)
        for one in made:
            self.artifact(one)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Mirror the metrics of ``step``."""
        row = dict(metrics)
        self._all("log", lambda sink: sink.log(row, step))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures of the whole run, beside the last value of each metric."""
        mine = dict(figures)
        self._all("summary", lambda sink: sink.summary(mine))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show rows (see `html_table`) with their pictures and sounds."""
        mine = [dict(row) for row in rows]
        self._all("table", lambda sink: sink.table(name, mine, step))

    def alert(self, title: str, text: str, level: Level = "warn") -> None:
        """Tell somebody now."""
        self._all("alert", lambda sink: sink.alert(title, text, level))

    def artifact(self, one: Artifact) -> None:
        """Show that the run used or made it."""
        self._all("artifact", lambda sink: sink.artifact(one))

    def finish(self) -> None:
        """Close all sinks; waits at most `FINISH_TIMEOUT_S` for what they send."""
        feeds, self.feeds = self.feeds, []
        end = time.monotonic() + FINISH_TIMEOUT_S
        for feed in feeds:
            if not feed.failed:
                feed.finish(max(0.1, end - time.monotonic()))

    def _all(self, what: str, action: Action) -> None:
        for feed in self.feeds:
            feed.put(what, action)


def own_id(folder: Path, of_checkpoint: str | None = None) -> str:
    """The run's id in all sinks: WANDB_RUN_ID, else the folder's, else a new one. Writes it."""
    given = os.environ.get("WANDB_RUN_ID")
    run_id = given or _read(folder) or of_checkpoint or secrets.token_hex(4)
    part = folder / f"{FILE}.part"
    try:
        part.write_text(json.dumps({"id": run_id}))
        part.replace(folder / FILE)
    except OSError as error:
        raise UserError(f"{folder / FILE}: cannot be written: {error}") from error
    return run_id


def _read(folder: Path) -> str | None:
    try:
        found = json.loads((folder / FILE).read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
