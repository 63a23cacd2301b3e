"""What all tests of the trainer share: runs without wandb."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write no wandb folder; test_wandb.py sets modes of its own."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
