"""Read a run folder into plain values.

Everything is optional: a run that was stopped half-way has a report too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.data.modalities.base import modalities
from mm.reading import parse_json, parse_yaml


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over steps: ``steps`` and finite ``values`` of equal length."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds, as far as it could be read; ``notes`` says what could not."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: dict[str, Series]
    results: dict[str, Any]
    commands: list[dict[str, Any]]
    evaluation: dict[str, Any]
    samples: dict[int, list[Path]]
    reconstructions: list[Path]
    tokenizers: dict[str, RunData]
    last_line: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    @property
    def steps(self) -> int:
        return int(self.last_line.get("step", 0))


def read_run(folder: Path, *, nested: bool = True) -> RunData:
    """Read ``folder`` and, when ``nested``, the tokenizer runs below it.

    They lie in ``tokenizers/<modality>/``.
    """
    notes: list[str] = []
    text = _text(folder / "config.yaml")
    config: Any = {}
    try:
        config = parse_yaml(text) or {}
    except ValueError as error:
        notes.append(f"config.yaml could not be read: {' '.join(str(error).split())[:200]}")
    metrics, last = read_metrics(folder / "metrics.jsonl", notes)
    results = _json(folder / "results.json", notes)
    commands = _json(folder / "commands.json", notes)
    tokenizers = {}
    if nested and (folder / "tokenizers").is_dir():
        for child in sorted((folder / "tokenizers").iterdir()):
            if child.is_dir() and any(child.iterdir()):
                tokenizers[child.name] = read_run(child, nested=False)
                notes += [
                    f"tokenizers/{child.name}/{note}" for note in tokenizers[child.name].notes
                ]
    return RunData(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=text,
        environment=_mapping(_json(folder / "environment.json", notes)),
        metrics=metrics,
        results=_mapping(results),
        commands=[c for c in commands if isinstance(c, dict)] if isinstance(commands, list) else [],
        evaluation=_mapping(_json(folder / "eval.json", notes)),
        samples=_samples(folder / "samples"),
        reconstructions=_media(folder / "eval"),
        tokenizers=tokenizers,
        last_line=last,
        notes=notes,
    )


def read_metrics(file: Path, notes: list[str]) -> tuple[dict[str, Series], dict[str, Any]]:
    """Read metrics.jsonl to ``{name: Series}`` and its last complete line.

    A broken line is counted and skipped.
    """
    columns: dict[str, dict[float, float]] = {}
    last: dict[str, Any] = {}
    broken = 0
    for line in _text(file).splitlines():
        try:
            row = parse_json(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        last = {**last, **row}
        for name, value in row.items():
            number = _number(value)
            if name != "step" and number is not None:
                columns.setdefault(name, {})[step] = (
                    number  # a resumed run repeats steps: the later line holds
                )
    if broken:
        notes.append(f"{file.name}: {broken} unreadable line(s) left out")
    return {name: Series(sorted(c), [c[s] for s in sorted(c)]) for name, c in columns.items()}, last


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(file: Path, notes: list[str]) -> Any:
    text = _text(file)
    if not text.strip():
        return {}
    try:
        return parse_json(text)
    except ValueError as error:
        notes.append(f"{file.name} is not valid JSON: {error}")
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _samples(folder: Path) -> dict[int, list[Path]]:
    out: dict[int, list[Path]] = {}
    for child in sorted(folder.glob("step_*")):
        digits = child.name.removeprefix("step_")
        if child.is_dir() and digits.isdigit() and (files := _media(child, texts=True)):
            out[int(digits)] = files
    return out


def _media(folder: Path, *, texts: bool = False) -> list[Path]:
    wanted = {suffix for suffix, kind in shown_as().items() if texts or kind != "text"}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in wanted)


def shown_as() -> dict[str, str]:
    """Suffix of a sample's file -> how a page shows it: "image", "audio" or "text"."""
    return {f".{e}": m.shown_as for m in modalities() for e in m.extensions}
