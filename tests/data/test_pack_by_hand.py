"""What a pack that was cut off goes on from, byte for byte; what its encoder keeps in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm.data.pack.job import pack
from mm.data.pack.writer import SplitWriter
from mm.errors import UserError


def sample(n: int) -> tuple[str, dict[str, bytes], dict[str, int]]:
    return f"sample{n}", {"txt": f"{n} ".encode() * (300 + n)}, {"text": 10 + n}


@pytest.mark.parametrize("shard_mb", [1.0, 0.003])  # one shard; two samples a shard
@pytest.mark.parametrize("cut_at", [1, 2, 3])
def test_a_split_goes_on_where_it_was_cut_off(tmp_path: Path, shard_mb: float, cut_at: int) -> None:
    """A longer sample that was written after the last state leaves no byte."""
    whole, first = (SplitWriter(tmp_path / name, shard_mb) for name in ("whole", "cut"))
    for n in range(5):
        whole.write(*sample(n))
    for n in range(cut_at):
        first.write(*sample(n))
    state, lengths = first.state(), {k: dict(v) for k, v in first.lengths.items()}
    first.write("lost", {"txt": b"x" * 5000}, {"text": 1})
    first.abort()
    again = SplitWriter(tmp_path / "cut", shard_mb)
    again.restore(state, lengths)
    for n in range(cut_at, 5):
        again.write(*sample(n))
    assert again.finish() == whole.finish()
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "cut")]
    assert files[0] == files[1] and len(files[0]) > (3 if shard_mb < 1 else 1)
    for name in files[0]:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_few_samples_over_the_budget_stop_a_pack_at_its_end(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"2 of 3 samples are unreadable, more than --max-bad 0\.5"):
        pack(tmp_path / "rows.jsonl", tmp_path / "out", max_bad=0.5, progress=False)
    assert not (tmp_path / "out").exists()
