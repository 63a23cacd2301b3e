"""What a run tells of itself: what it was made from, with names and versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mm.trainer.log import lineage


def packed(root: Path, name: str, **manifest: Any) -> Path:
    made = root / name
    made.mkdir()
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made


def test_packed_data_are_told_with_what_they_were_packed_from(tmp_path: Path) -> None:
    """The source lies beside them; one that is not there, or is the data themselves, ends it."""
    run: Any = SimpleNamespace(tracking=SimpleNamespace(upload=()))
    raw = packed(tmp_path, "raw", source="elsewhere", license="MIT")
    splits = {"train": {"samples": 3}}
    tokens = packed(tmp_path, "tokens", kind="tokens", source="raw", splits=splits)
    found = list(lineage._with_origins(run, tokens))
    assert [(one.kind, one.name) for one in found] == [
        ("tokens", "tokens-tokens"),
        ("data", "data-raw"),
    ]
    version = hashlib.sha256((tokens / "manifest.json").read_bytes()).hexdigest()[:12]
    assert found[0].metadata == {
        "path": str(tokens),
        "version": version,
        "made_from": ["data:data-raw"],
        "source": "raw",
        "samples": {"train": 3},
    }
    told = found[1].metadata
    assert (told["path"], told["made_from"], told["license"]) == (str(raw), [], "MIT")
    (alone,) = lineage._with_origins(run, packed(tmp_path, "own", source="own"))
    assert alone.metadata["made_from"] == []
