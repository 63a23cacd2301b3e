"""Cases of which the default suite takes every n-th; the slow suite takes all the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(n: int, values: Iterable[Any]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`; a law that other cases hold too needs few of them.

    Values are taken as they are, `pytest.param` among them.
    """
    return [v if i % n == 0 else _slow(v) for i, v in enumerate(values)]


def only(values: Iterable[Any], *default: Any) -> list[Any]:
    """The same, by default those that are named."""
    return [v if v in default else _slow(v) for v in values]


def _slow(value: Any) -> Any:
    if isinstance(value, type(pytest.param(0))):
        return pytest.param(*value.values, marks=[*value.marks, pytest.mark.slow], id=value.id)
    return pytest.param(value, marks=pytest.mark.slow)
