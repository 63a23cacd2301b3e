"""A machine dies or hangs in a run: the others go on, and the losses are those of no death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deaths import DEATHS, run_unbroken, survive
from machines import Hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    root = tmp_path_factory.mktemp("restarts")
    return root, run_unbroken(root)


@pytest.mark.parametrize("death", DEATHS)
def test_training_goes_on_after_a_death(
    unbroken: tuple[Path, dict[int, float]], hosts: Hosts, death: str, capsys: Any
) -> None:
    root, expected = unbroken
    seconds = survive(hosts, root, death.replace(" ", "_"), death, expected)
    with capsys.disabled():
        print(f"\n{death}: {seconds:.1f} s from the death to training again")
    assert seconds <= 120  # the bar of 60 is that of benchmarks/deaths.py, on a quiet machine
