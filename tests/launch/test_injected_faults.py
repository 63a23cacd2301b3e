"""Twelve ways for a rank to fail in a step: each ends the run soon, and is told with its rank.

The kinds are those of nvidia-resiliency-ext's fault injection; on a machine without a GPU, a rank
that sleeps and one without memory stand for a GPU that sleeps and one that fails.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml
from machines import mm, toy_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STOPPED = 75
# What the last lines say.
TOLD = {
    "exception": "RuntimeError: injected: an exception",
    "async exception": "ZeroDivisionError",
    "exception of a signal": "raised by a signal's handler",
    "abort": "SIGABRT",
    "held interpreter lock": "nothing has changed",
    "segmentation fault": "SIGSEGV",
    "SIGINT": "stopped by a signal",
    "SIGTERM": "stopped by a signal",
    "SIGKILL": "SIGKILL",
    "SIGSTOP": "is stopped (SIGSTOP)",
    "sleep": "nothing has changed",
    "out of memory": "allocate",
}


@pytest.mark.parametrize("fault", TOLD)
def test_a_fault_of_one_rank_is_noticed_and_told(tmp_path: Path, fault: str) -> None:
    callback = {"kind": "toy_fault", "fault": fault}
    config = toy_run(tmp_path, steps=100_000, checkpoints={"every": 0})
    values = yaml.safe_load(config.read_text())
    values |= {"imports": [*values["imports"], "fault_rank"], "callbacks": [callback]}
    config.write_text(yaml.safe_dump(values))
    begun = time.monotonic()
    words = ["launch", "local", str(config), "--gpus-per-node", "2", "cluster.hang_s=10"]
    code, said = mm(*words, cwd=tmp_path)
    seconds = time.monotonic() - begun
    asked = fault in ("SIGINT", "SIGTERM")  # an end that is asked for: with a checkpoint
    # no memory is told as a mistake of the config, with the key that mends it
    expected = STOPPED if asked else 2 if fault == "out of memory" else 1
    assert code == expected, f"{code} after {seconds:.0f} s: {said}"
    last = "\n".join(said.splitlines()[-12:])
    assert TOLD[fault] in last, said
    assert asked or re.search(r"rank 1\b", last), said
    saved = [*(tmp_path / "run" / "checkpoints").glob("step_*")]
    assert bool(saved) == asked, saved
