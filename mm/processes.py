"""Processes of this machine: whether they live, and how this one leaves those that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


def is_alive(pid: int) -> bool:
    """True while a process of this machine has that id; a group's id (0 and below) is none."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def unwind_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM leaves by SystemExit, so that what must be ended and removed is.

    Only the main thread may say so; another one changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
