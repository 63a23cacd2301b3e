"""At ZeRO stage 3 no process ever holds the whole network: it is cut module by module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm.launch import environment

CHILD = Path(__file__).parents[1] / "build_child.py"
NETWORK = """
kind: lm
d_model: 128
backbone: {kind: stack, depth: 12, pattern: attention}
"""


@pytest.mark.slow
def test_law_a_build_holds_its_shard_and_the_largest_module(tmp_path: Path) -> None:
    """4 processes; the slices are those of the whole network, bit by bit.

    Beyond shard and module there are what `isnan` makes of its largest matrix, and the tables of
    the layers.
    """
    (tmp_path / "network.yaml").write_text(NETWORK)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=4", "--master_addr=127.0.0.1"]
    words += [f"--master_port={environment.free_port()}", str(CHILD)]
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # of a training in this process
    clean = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "network.yaml"), str(tmp_path)],
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(4):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts["same"] and facts["units"] > 12
        shard, largest = facts["weights"] / 4, facts["largest"]
        assert facts["peak"] <= shard + 1.25 * largest + 2**16, facts
        assert facts["peak"] < 0.5 * facts["weights"], facts
        assert facts["after"] <= shard + 2**16, facts
