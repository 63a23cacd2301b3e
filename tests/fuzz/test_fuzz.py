"""Files of strangers, damaged at random: taken or refused in one line, never anything else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from doors import DOORS  # noqa: E402
from guard import pass_through, warm  # noqa: E402

QUICK = 300  # inputs of the default suite over all doors; `make fuzz` runs 100,000


@pytest.mark.parametrize("name", DOORS)
def test_a_damaged_file_is_taken_or_refused(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    door = DOORS[name]
    seed = tmp_path_factory.mktemp(name)
    door.seed(seed)
    warm(door, seed)

    @settings(
        max_examples=-(-QUICK // len(DOORS)),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(edits=door.strategy)
    def check(edits: object) -> None:
        pass_through(door, seed, edits)

    check()


def test_every_door_has_edits() -> None:
    assert all(isinstance(door.strategy, st.SearchStrategy) for door in DOORS.values())
