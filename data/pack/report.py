"""What a pack reports, read from the manifest that it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackReport:
    """What was packed. ``lengths``: modality -> total tokens, or bytes, pixels, audio frames."""

    out: Path
    kind: str  # "raw" or "tokens"
    samples: dict[str, int]  # by split
    modalities: dict[str, int]  # samples that have it
    lengths: dict[str, int]
    bytes: int
    quarantined: int
    seconds: float
    already: bool = False  # nothing was done: the same input and settings are packed there
    # Extension -> files that no modality claims:
    ignored: dict[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # raw modalities without a tokenizer
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> samples, commonest first
    # Of the commonest reasons the first in full, with its sample:
    examples: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0  # samples left out because an earlier one has the same content
    # Of conversations: "empty", "too long" -> samples left out
    skipped: dict[str, int] = field(default_factory=dict)
    # split -> modality -> "64": samples of length 64..127
    histograms: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, out: Path, manifest: Mapping[str, Any], seconds: float, already: bool = False
    ) -> PackReport:
        """The report of a manifest in ``out``."""
        modalities: Counter[str] = Counter()
        lengths: Counter[str] = Counter()
        for entry in manifest["splits"].values():
            for modality, summary in entry["lengths"].items():
                modalities[modality] += summary["count"]
                lengths[modality] += summary["total"]
        return cls(
            out,
            manifest["kind"],
            {s: e["samples"] for s, e in manifest["splits"].items()},
            dict(modalities),
            dict(lengths),
            sum(e["bytes"] for e in manifest["splits"].values()),
            manifest["quarantined"],
            seconds,
            already,
            dict(manifest["ignored"]),
            tuple(manifest.get("left_out", ())),
            dict(manifest.get("rejected", {})),
            dict(manifest.get("examples", {})),
            manifest.get("duplicates", 0),
            dict(manifest.get("skipped", {})),
            {s: e.get("histograms", {}) for s, e in manifest["splits"].items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"out": str(self.out), "left_out": list(self.left_out)}
