"""A callback with which one rank fails; `imports: [fault_rank]` registers it."""

from __future__ import annotations

import collections
import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from mm.batch import Batch
from mm.config import Config
from mm.launch import environment
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback


def exception() -> None:
    raise RuntimeError("injected: an exception")


def async_exception() -> None:
    """Another thread raises in this one."""
    me = ctypes.c_ulong(threading.get_ident())
    raised = ctypes.py_object(ZeroDivisionError)
    other = threading.Thread(target=lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(me, raised))
    other.start()
    other.join()
    time.sleep(0.1)


def exception_of_a_signal() -> None:
    """A handler that raises, as a timer's or a scheduler's may."""

    def handler(*_: Any) -> None:
        raise RuntimeError("injected: raised by a signal's handler")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(5)


def hold_the_interpreter() -> None:
    """An endless loop in C that never gives the interpreter's lock back."""
    collections.deque(itertools.repeat(None), maxlen=0)


def out_of_memory() -> None:
    torch.empty(2**50)


FAULTS: dict[str, Callable[[], Any]] = {
    "exception": exception,
    "async exception": async_exception,
    "exception of a signal": exception_of_a_signal,
    "abort": os.abort,
    "held interpreter lock": hold_the_interpreter,
    "segmentation fault": lambda: ctypes.string_at(0),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(10**6),
    "out of memory": out_of_memory,
}


@CALLBACKS.register("toy_fault")
class ToyFaultConfig(Config):
    """One rank fails before a step."""

    kind: Literal["toy_fault"] = "toy_fault"
    fault: str
    rank: int = 1
    step: int = 8

    def build(self) -> ToyFault:
        return ToyFault(self)


class ToyFault(Callback):
    def __init__(self, config: ToyFaultConfig):
        self.config = config

    def pre_step(self, trainer: Any, batches: list[Batch]) -> None:
        if trainer.step == self.config.step and environment.ranks().rank == self.config.rank:
            FAULTS[self.config.fault]()
