"""Thirty mutants drawn by the commit's hash: most are caught."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run  # noqa: E402
from table import accepted  # noqa: E402

# Not measured here, for their time: the targets' lines that they run are run by others too.
LONG = ("tests/decoders/", "tests/model/test_peers", "tests/surgery/", "tests/test_")
LONG_FILES = ("test_recompute.py", "test_autocast.py", "test_audio_codec.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not os.environ.get("MM_MUTATION_SAMPLE"),
    reason="not seen to end within 11 minutes on a busy machine yet: MM_MUTATION_SAMPLE=1 runs it",
)
def test_a_sample_of_mutants_is_caught(tmp_path: Path) -> None:
    """At least 18 of 30.

    Of mutants that no test was written for, 76 % were caught when last measured (docs/lab-notes.md,
    346 mutants); thirty draws at 76 % catch fewer than 18 once in 70 commits, at 60 % in half of
    them. Raise the limit with the share: at 92 %, the aim, it is 24 (once in 120).
    """
    files = run.files_like(run.TESTS)
    tests = [f for f in files if not f.startswith(LONG) and not f.endswith(LONG_FILES)]
    rows = run.run(sample=30, seed="HEAD", workers=1, tests=tests, build=tmp_path)
    alive = [row["key"] for row in rows if not row["caught"] and row["key"] not in accepted()]
    assert len(rows) == 30
    assert len(alive) <= 12, "\n".join(alive)
