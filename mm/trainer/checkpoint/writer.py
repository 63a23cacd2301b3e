"""Saves of all processes, in the foreground or in the background."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mm.trainer.checkpoint.held import Copies
from mm.trainer.checkpoint.meeting import Meeting
from mm.trainer.checkpoint.save import Moment, save


def meet() -> None:
    """Wait for all processes; fails where one is gone. Call on all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


class Writer:
    """One save at a time.

    In the background the caller stalls for the save before, if that is still being written. Weights
    and optimizer states are copied while the next step runs forward and backward; that step's
    update waits for them (`settle`), as CheckFreq's does (Mohan et al., FAST 2021). A save is
    crash-safe wherever it runs: until its rename it is not there.
    """

    def __init__(self, background: bool):
        self.background = background
        self._copies = Copies()
        self._thread: threading.Thread | None = None
        self._wrote, self._copied = threading.Event(), threading.Event()
        self._copied.set()
        self._error: BaseException | None = None

    def __call__(self, root: Path, moment: Moment, **keep: Any) -> None:
        """Save ``moment`` (``keep``: of `save`) now or in the background. Call on all ranks.

        Raises what this or the save before raised.
        """
        self.wait()  # before its copies are written over
        meeting = Meeting.of_all()
        if not self.background:
            save(root, moment, **keep, meeting=meeting, wrote=meet)
            return
        files, finish = self._copies.of(moment.files)
        self._wrote.clear()
        self._copied.clear()

        def fill() -> None:
            try:
                if not self._copied.is_set():  # a second try of the save has the same copies
                    finish()
            finally:
                self._copied.set()

        copied = replace(moment, files=files, fill=fill)

        def work() -> None:
            try:
                save(root, copied, **keep, meeting=meeting, wrote=self._wrote.set)
            except BaseException as error:  # noqa: BLE001  raised in `wait`
                self._error = error
            finally:
                self._copied.set()
                self._wrote.set()

        # not a daemon: the interpreter waits for it before it ends
        self._thread = threading.Thread(target=work, name="mm-checkpoint")
        self._thread.start()

    def settle(self) -> None:
        """Wait until nothing of the save under way is read any more from what a step updates."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait for the save under way. Call on all ranks. Raises what it raised."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wrote.wait()
            meet()  # a process that is gone is found here, and not waited for in the thread
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
