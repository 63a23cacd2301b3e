"""Fixtures of the launch tests: real machines where root and packages are there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machines import Hosts, need, need_namespaces


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
