"""The shell of a node, run for real: what it answers, and what ends its ranks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mm.launch.torchrun import STATE, watch_input

# A starter with one rank, as torchrun: it waits for its child.
STARTER = "bash -c 'sleep 60 & wait $!' < /dev/null &\n"


@contextmanager
def node(lease_s: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A node's shell with its standard input and output."""
    child = subprocess.Popen(
        ["bash", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    child.stdin.write(f"{{\n{STARTER}{watch_input(lease_s=lease_s)}}}\n")
    child.stdin.flush()
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def say(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{word}\n")
    child.stdin.flush()


def test_a_node_tells_the_state_of_its_ranks() -> None:
    with node() as child:
        time.sleep(0.5)  # until the rank is there
        say(child, "alive")
        assert child.stdout is not None
        assert child.stdout.readline() == f"{STATE}\n"
        name, pid, state = child.stdout.readline().split()
        assert name == STATE and pid.isdigit() and state == "S"
        say(child, "quit")
        assert child.wait(15) != 0


@pytest.mark.parametrize("way", ["lease", "end of input"])
def test_a_node_that_is_left_alone_ends_its_ranks(way: str) -> None:
    begun = time.monotonic()
    with node(lease_s=1 if way == "lease" else 0) as child:
        if way == "end of input":
            assert child.stdin is not None
            child.stdin.close()
        assert child.wait(20) != 0 and time.monotonic() - begun < 20


def test_words_keep_the_lease() -> None:
    with node(lease_s=2) as child:
        for _ in range(6):
            time.sleep(0.6)
            say(child, "alive")
        assert child.poll() is None
