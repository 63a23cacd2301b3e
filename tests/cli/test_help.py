"""What the command line says of the keys of a run."""

from __future__ import annotations

from typing import Any

import pytest

from mm.cli.schema import run_schema

DESCRIBED = ("Run", "data", "transform", "task", "callback")


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return run_schema()["$defs"]


def test_every_key_of_a_run_says_what_it_is(definitions: dict[str, Any]) -> None:
    silent = [
        f"{name}: {key}"
        for name, body in definitions.items()
        if name.split(".")[0] in DESCRIBED
        for key, of in body.get("properties", {}).items()
        if key != "kind" and "description" not in of
    ]
    assert not silent, f"give these fields a description: {', '.join(silent)}"
