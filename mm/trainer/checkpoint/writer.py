"""Saves in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Writer:
    """Saves in the background, one at a time.

    The caller stalls for the save before, if that is still being written, and for nothing else.
    A save is crash-safe wherever it runs: until its rename it is not there.
    """

    def __init__(self, background: bool):
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self, write: Callable[[], Any]) -> None:
        """Run ``write`` (which owns all that it needs) now or in the background.

        Raises what this or the save before raised.
        """
        self.wait()
        if not self.background:
            write()
            return

        def work() -> None:
            try:
                write()
            except BaseException as error:  # noqa: BLE001  raised in `wait`
                self._error = error

        # not a daemon: the interpreter waits for it before it ends
        self._thread = threading.Thread(target=work, name="mm-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way. Raises what it raised."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
