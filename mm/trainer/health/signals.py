"""SIGTERM, SIGUSR1 and SIGINT as a request: finish the step, save, stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Self

INTERRUPTED = 75  # exit code (EX_TEMPFAIL): run the same command to go on


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Before there is a trainer (imports, configs): SIGTERM and SIGUSR1 exit at once with 75.

    SIGUSR1 would else kill the process, and SIGTERM give another code.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(INTERRUPTED)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, leave)
    except ValueError:  # not the main thread: as of `Stop`
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(BaseException):
    """Raised by a signal inside `Stop.at_once`."""


class Stop:
    """While entered, the first of the signals sets ``asked``; a second SIGINT interrupts at once.

    SIGUSR1 is what Slurm's ``--signal`` sends ahead of its SIGTERM.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False
        self._raise = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._raise:
            self._raise = False
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Leave the block at a signal, also at an earlier one: nothing in it needs an end.

        For the long work after training, which a resumed run does again.
        """
        try:
            self._raise = True
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._raise = False

    def __enter__(self) -> Self:
        try:
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:
            # not the main thread (a notebook's worker): whoever runs it keeps its own handlers
            pass
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
