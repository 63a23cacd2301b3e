"""What all tests share: quiet environment before torch, Chromium, a report's run folder."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

# Before any test imports torch or wandb: the same defaults as the command line, and never a
# network.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # one worker a core (make test); small tests gain nothing from more
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "WDS_SECURE": "1",
    "MPLBACKEND": "Agg",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MM_SELF_CHECK": "0",  # every implementation has its own tests (tests/kernels)
}.items():
    os.environ.setdefault(_name, _value)


def pytest_collection_finish() -> None:
    """Records of torch's loggers go up to the root logger.

    pytest hangs its handlers on every logger that keeps its records to itself, twelve times a test;
    torch has sixty of those.
    """
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: a run that is cut off has no summary that would name it.

    Under pytest-xdist workers call this, too, but what they print goes nowhere.
    """
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        last = (report.longreprtext or "").strip().splitlines()[-60:]
        print(f"\nFAILED AT ONCE: {report.nodeid} ({report.when})\n" + "\n".join(last), flush=True)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Debian's Chromium; `.ci/run` installs it, elsewhere the tests that need it skip by name."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
    return path
