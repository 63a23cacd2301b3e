"""Sharded safetensors go in and out tensor by tensor: the whole model is never in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from hf_checkpoints import checkpoint
from safetensors import safe_open
from torch import Tensor

from mm.interchange.read import import_model
from mm.interchange.weights import Checkpoint
from mm.interchange.write import export_model
from mm.plan.tally import Measure


def sizes_in(folder: Path) -> list[int]:
    """Bytes of each tensor of a folder's files."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            found += [tensors.get_tensor(name).nbytes for name in names]
    return found


@pytest.mark.slow
def test_in_and_out_hold_a_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read, and what is made of it: three times the largest tensor, whatever all weigh."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    given = checkpoint(tmp_path / "given", **shape)
    assert len(list(given.glob("*.safetensors"))) > 16
    read = Checkpoint.__getitem__
    with Measure() as measured:

        def noted(self: Checkpoint, name: str) -> Tensor:
            tensor = read(self, name)  # by no operator of torch, which `Measure` would see
            measured.live.add(tensor, name)
            return tensor

        monkeypatch.setattr(Checkpoint, "__getitem__", noted)
        for go, source, out in (
            (import_model, given, tmp_path / "ours"),
            (export_model, tmp_path / "ours", tmp_path / "back"),
        ):
            before = measured.live.now
            measured.live.restart_peak()
            go(source, out, check=False)
            held = measured.live.peak - before
            sizes = sizes_in(tmp_path / "ours")
            assert max(sizes) <= held <= 3 * max(sizes) < sum(sizes) / 3
            assert measured.live.now == before, "nothing of it stays"
