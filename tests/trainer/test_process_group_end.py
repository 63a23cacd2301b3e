"""A process ends when its work is done: gloo's threads are at rest before the interpreter is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from mm.trainer.engine.process_group import wait_for_threads

ALONE = """
import threading
from mm.trainer.engine import process_group
process_group.join()
def work(): # as a thread of gloo's that has something to let go of
    import hashlib
    for _ in range(30): hashlib.sha256(bytes(20_000_000)).digest()
    print("done", flush=True)
threading.Thread(target=work, daemon=True).start()
"""


def busy(seconds: float) -> None:
    x, end = torch.ones(400, 400), time.monotonic() + seconds
    while time.monotonic() < end:
        x @ x  # without the interpreter's lock


def test_it_waits_for_a_thread_that_runs() -> None:
    thread = threading.Thread(target=busy, args=(0.3,))
    thread.start()
    assert wait_for_threads() and not thread.is_alive()


def test_it_does_not_wait_for_ever_nor_for_a_thread_that_sleeps() -> None:
    stop = threading.Event()
    sleeping = threading.Thread(target=stop.wait)
    sleeping.start()
    begun = time.monotonic()
    assert wait_for_threads(), "somebody runs"
    assert time.monotonic() - begun < 2
    thread = threading.Thread(target=busy, args=(0.5,))
    thread.start()
    assert not wait_for_threads(limit_s=0.1)
    stop.set()
    thread.join()


@pytest.mark.slow
def test_a_process_ends_after_its_threads() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
