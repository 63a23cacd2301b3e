"""Read a run folder into plain values.

Everything is optional: a run that was stopped half-way has a report too. A page may be made of a
stranger's folder: a link that leads out of it is not followed, and no file can exhaust the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.reading import parse_yaml
from mm.report.find import INDEX, n_parameters, samples, tokenizer_runs
from mm.report.folder import Folder, Sampled, Series, number

WEIGHTS = "model/model.safetensors"


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run folder holds, as far as it could be read; ``notes`` says what could not."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    start: dict[str, Any]
    metrics: dict[str, Series]
    results: dict[str, Any]
    commands: list[dict[str, Any]]
    evaluation: dict[str, Any]
    times: dict[str, Any]
    events: list[dict[str, Any]]
    vocabulary: dict[str, Any]
    parameters: int | None
    samples: list[Sampled]
    reconstructions: list[Path]
    tokenizers: dict[str, RunData]
    last_line: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        name = self.config.get("name")
        return name if isinstance(name, str) and name else self.folder.name

    @property
    def steps(self) -> int:
        step = number(self.last_line.get("step"))
        return int(step) if step is not None and 0 <= step < 1e15 else 0

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        stages = self.config.get("stages")
        return [s for s in stages if isinstance(s, Mapping)] if isinstance(stages, list) else []


def read_run(folder: Path, *, nested: bool = True) -> RunData:
    """Read ``folder`` and, when ``nested``, the runs that its tokenizers were trained in."""
    notes: list[str] = []
    inside = Folder(folder, notes)
    text = inside.text("config.yaml")
    config = _config(text, notes)
    metrics, last = read_metrics(inside)
    commands = inside.json("commands.json")
    vocabulary = _mapping(inside.json("model/vocabulary.json"))
    tokenizers = {}
    if nested:
        for modality, where in tokenizer_runs(inside, config, vocabulary).items():
            tokenizers[modality] = part = read_run(where, nested=False)
            notes += [f"tokenizers/{modality}/{note}" for note in part.notes]
    return RunData(
        folder=folder,
        config=config,
        config_text=text,
        environment=_mapping(inside.json("environment.json")),
        start=_mapping(inside.json("start.json")),
        metrics=metrics,
        results=_mapping(inside.json("results.json")),
        commands=[c for c in commands if isinstance(c, dict)] if isinstance(commands, list) else [],
        evaluation=_mapping(inside.json("eval.json")),
        times=_mapping(inside.json("times.json")),
        events=inside.lines("events.jsonl"),
        vocabulary=vocabulary,
        parameters=n_parameters(inside.file(WEIGHTS) or inside.file(f"{WEIGHTS}{INDEX}")),
        samples=samples(inside),
        reconstructions=inside.media("eval"),
        tokenizers=tokenizers,
        last_line=last,
        notes=notes,
    )


def read_metrics(inside: Folder) -> tuple[dict[str, Series], dict[str, Any]]:
    """Read metrics.jsonl to ``{name: Series}`` and the newest value of everything in it."""
    columns: dict[str, dict[float, float]] = {}
    last: dict[str, Any] = {}
    without = 0
    for row in inside.lines("metrics.jsonl"):
        step = number(row.get("step"))
        if step is None:
            without += 1
            continue
        last.update(row)
        for name, value in row.items():
            drawn = number(value)
            if name != "step" and drawn is not None:
                columns.setdefault(name, {})[step] = (
                    drawn  # a resumed run repeats steps: the later line holds
                )
    if without:
        inside.notes.append(f"metrics.jsonl: {without} line(s) without a step left out")
    return {name: Series(sorted(c), [c[s] for s in sorted(c)]) for name, c in columns.items()}, last


def _config(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        values = parse_yaml(text) or {}
    except ValueError as error:
        notes.append(f"config.yaml could not be read: {str(error)[:200]}")
        return {}
    return values if isinstance(values, dict) else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
