"""The quickstart: its raw files never change, and what it trains meets the bars that it prints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mm.quickstart import source


@pytest.mark.parametrize("versions", [1, 2])
def test_the_split_of_the_scans_is_fixed(
    versions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every figure in docs/results.md is on these 300 scans, however many copies are trained on."""
    monkeypatch.setattr(source, "VERSIONS", versions)
    monkeypatch.setattr(source, "IMAGE_SIZE", 8)
    (tmp_path / "images").mkdir()
    made = source._images(
        tmp_path, *(np.random.default_rng((source.SPLIT_SEED, i)) for i in (0, 3))
    )
    numbers = lambda split: {
        re.findall(r"\d{4}", name)[0]
        for (kind, _), names in made.items()
        for name in names
        if kind == split
    }
    held = sorted(n for (kind, _), names in made.items() if kind == "test" for n in names)
    assert hashlib.sha256("\n".join(held).encode()).hexdigest()[:16] == "a5c211f703103f90"
    assert [len(numbers(split)) for split in ("train", "val", "test")] == [1347, 150, 300]
    assert len(set.union(*map(numbers, ("train", "val", "test")))) == 1797


def test_speech_is_the_same_in_every_process() -> None:
    """A breathy voice is partly noise; two quickstarts must still train on the same bytes."""
    code = (
        "import hashlib; from mm.quickstart.speech import speaker\n"
        "with speaker() as one:\n"
        "    clips = [one.say('three', voice, 155, 50) for voice in ('en+f2', 'en-us+f3')]\n"
        "print([hashlib.sha256(clip).hexdigest() for clip in clips])"
    )
    said = []
    for _ in range(2):
        said.append(subprocess.check_output([sys.executable, "-c", code], text=True))
        time.sleep(1.1)  # the library's own seed is the time in seconds
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_meets_its_bars(tmp_path: Path) -> None:
    """The README's first command at full size; a figure may miss its bar by what chance can do.

    That is two standard errors of a share of its held-out samples.
    """
    command = [sys.executable, "-m", "mm", "quickstart", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    held = [figure for figure in results["figures"] if figure.get("bar") is not None]
    assert len(held) >= 11, [figure["name"] for figure in held]
    missed = []
    for figure in held:
        bar, above = figure["bar"], figure["value"] - figure["bar"]
        chance = 0.0
        if "accuracy" in figure["name"]:
            chance = 2 * math.sqrt(bar * (1 - bar) / figure["n"])
        if (-above if figure.get("lower_is_better") else above) < -chance:
            missed.append((figure["name"], figure["value"], bar))
    assert not missed, missed
    assert (tmp_path / "run" / "report" / "index.html").is_file()
