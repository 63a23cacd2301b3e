"""SIGTERM and SIGINT as a request: finish the step, save, stop."""

from __future__ import annotations

import signal
from typing import Any, Self


class Stop:
    """While entered, the first SIGTERM or SIGINT sets ``asked``; a second SIGINT interrupts at
    once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:
            # not the main thread (a notebook's worker): whoever runs it keeps its own handlers
            pass
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
