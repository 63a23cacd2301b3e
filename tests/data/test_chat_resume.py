"""A pack of conversations that was killed goes on and gives the bytes of one in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_toys import hf, jsonl, talk

from mm.data.pack.job import pack
from mm.data.pack.output import PackOutput


def test_a_killed_pack_goes_on_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = talk(3)
    empty["messages"][1]["content"] = ""
    rows: list[Any] = [talk(i, turns=1 + i % 3) if i % 7 else empty for i in range(600)]
    rows[400] = rows[1]  # a duplicate of what the journal holds
    src = jsonl(tmp_path / "talks.jsonl", rows)
    settings = {"tokenizers": {"text": hf()}, "progress": False, "workers": 1}
    whole = pack(src, tmp_path / "whole", **settings)
    assert whole.skipped == {"empty": 86} and whole.duplicates == 1
    save, saved = PackOutput.save, []

    def stop_at_the_second(self: PackOutput, encoder: Any, seconds: float | None = None) -> None:
        save(self, encoder, 0.0)
        saved.append(self.records)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PackOutput, "save", stop_at_the_second)
        pack(src, tmp_path / "cut", **settings)
    assert saved == [256, 512] and not (tmp_path / "cut").exists()
    again = pack(src, tmp_path / "cut", **settings)
    assert again.skipped == whole.skipped and again.duplicates == 1
    read = lambda root: {
        p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()
    }
    assert read(tmp_path / "cut") == read(tmp_path / "whole")
