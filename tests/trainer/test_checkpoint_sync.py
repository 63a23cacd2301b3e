"""What is on the disk when: a checkpoint's files before its mark, the mark before its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.trainer.checkpoint import check
from mm.trainer.checkpoint.save import Moment, save


def test_files_are_synced_before_the_mark_and_the_mark_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a checkpoint that carries its mark is whole."""
    events: list[tuple[str, str]] = []
    path_of = lambda fd: os.readlink(f"/proc/self/fd/{fd}")

    def recorded(owner: Any, name: str, kind: str, where: Any) -> None:
        original = getattr(owner, name)

        def call(first: Any, *args: Any, **kw: Any) -> Any:
            place = Path(where(first))
            done = original(first, *args, **kw)
            events.append((kind, place.name))
            return done

        monkeypatch.setattr(owner, name, call)

    recorded(os, "fsync", "sync", path_of)
    recorded(Path, "write_text", "write", str)
    recorded(Path, "rename", "rename", str)
    tensors = {"model": {"w": torch.ones(3)}, "model.optimizer": {"m/w": torch.zeros(3)}}
    root = tmp_path / "checkpoints"
    final = save(root, Moment.of({"step": 7}, tensors), keep_last=2)
    assert check.fault_of(final) is None
    mark = events.index(("write", check.MARK))
    renamed = next(i for i, (kind, _) in enumerate(events) if kind == "rename")
    part = events[renamed][1]
    files = {f.name for f in final.iterdir()} - {check.MARK}
    assert files == {"state.json", "index.json", "model.safetensors", "model.optimizer.safetensors"}
    written = [name for kind, name in events[:mark] if kind == "sync"]
    assert files <= set(written), "files that the mark vouches for"
    between = [name for kind, name in events[mark:renamed] if kind == "sync"]
    assert between.index(check.MARK) < between.index(part)
    assert ("sync", root.name) in events[renamed:], "the new name itself"
