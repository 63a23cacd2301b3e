"""What a save and a load cost one process: its slices, no message, no more in a larger world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainer_runs import make_run, torchrun
from trainer_toys import toys_registered  # noqa: F401

MORE = 2**20  # bytes beside the slices: the file that is written, piece by piece, and JSON


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_save_needs_its_slices_and_sends_nothing(tmp_path: Path) -> None:
    """Two processes, every stage. In the foreground not even a copy is made.

    Collected, written, synced and read back; not the losses that are kept beside it.
    """
    runs = {
        (stage, later): make_run(
            tmp_path,
            f"{stage}-{later}",
            steps=2,
            stage=stage,
            model={"d": 384},
            checkpoints={"every": 1, "background": later},
        )
        for stage in range(4)
        for later in (False, True)
    }
    torchrun(2, list(runs.values()), timeout_s=800, child="save_child.py")
    wrong = {}
    for (stage, later), run in runs.items():
        for rank in range(2):
            path = tmp_path / f"{run.name}_2.{rank}.json"
            for row in json.loads(path.read_text()):
                assert row["own"] > 4 * MORE  # so that all weights would be seen
                copies = row["own"] if later else 0
                if row["sent"] or row["tensors"] > copies + MORE or row["python"] > 2 * MORE:
                    wrong[stage, later, rank] = row
    assert not wrong
