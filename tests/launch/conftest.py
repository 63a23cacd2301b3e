"""Fixtures of the launch tests: real machines where root and packages are there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machines import Hosts, need, need_namespaces
from slurm_cluster import Slurm


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two machines with sshd, each a network namespace."""
    need("ip", "ssh", "sshd")
    need_namespaces()
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes."""
    need("munged", "slurmctld", "slurmd", "sbatch")
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        try:
            made.up()
        except AssertionError as error:  # said by name: not every container lets its daemons run
            pytest.skip(f"launch: Slurm does not come up on this machine: {error}")
        yield made
    finally:
        made.down()
