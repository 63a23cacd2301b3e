"""Shards that several tests of the streams read."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_toys import token_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards and token shards of 37 samples."""
    root = tmp_path_factory.mktemp("data")
    token_shards(root, 37)
    return root
