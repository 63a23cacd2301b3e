"""What a run said before its first step (``start.json``): its data, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import PurePosixPath
from typing import Any

from mm.report.charts import short
from mm.report.folder import number
from mm.report.read import RunData
from mm.report.words import grid

WORTH_SAYING = 0.01  # share left out that is said in red


def sources(run: RunData) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the stage, what it reads of one source)."""
    stages = run.start.get("stages")
    for n, stage in enumerate(stages if isinstance(stages, list) else ()):
        found = stage.get("sources") if isinstance(stage, Mapping) else None
        number = stage.get("stage", n) if isinstance(stage, Mapping) else n
        for source in found if isinstance(found, list) else ():
            if isinstance(source, dict):
                yield number, source


def start(run: RunData) -> str:
    """Samples, tokens and bytes by source and modality, epochs, tasks, and what is left out."""
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    alarms = []
    several = len({stage for stage, _ in sources(run)}) > 1
    for stage, source in sources(run):
        name = PurePosixPath(str(source.get("source", ""))).name or "data"
        name += f" ({source['split']})" if isinstance(source.get("split"), str) else ""
        name = f"stage {stage}: {name}" if several else name
        while name in rows:  # two folders of one name
            name += "′"
        left = {str(k): v for k, v in _mapping(source.get("left_out")).items()}
        share = sum(number(_mapping(v).get("samples")) or 0.0 for v in left.values())
        whole = {
            "samples": source.get("samples"),
            "tokens": source.get("tokens"),
            "bytes on disk": source.get("bytes"),
            "epochs": source.get("epochs"),
            "left out": _per_cent(share) if "left_out" in source else None,
        }
        rows[name] = whole
        for modality, each in _mapping(source.get("modalities")).items():
            each = _mapping(each)
            used = number(each.get("used"))
            rows[f"{name} · {modality}"] = {
                **{k: each.get(k) for k in ("samples", "tokens")},
                "bytes on disk": each.get("bytes"),
                "drawn": _per_cent(used) if used is not None else None,
            }
        drawn = _mapping(source.get("tasks"))
        if drawn:
            tasks[name] = {str(k): _per_cent(number(v) or 0.0) for k, v in drawn.items()}
        alarms += [_alarm(name, why, _mapping(shares)) for why, shares in left.items()]
    if not rows:
        return ""
    told = "".join(f'<p class="alert">{escape(text)}</p>' for text in alarms if text)
    directions = f"<h3>Documents by task</h3>{grid(tasks)}" if tasks else ""
    said = " <small>drawn: share of the modality's samples that a step may see</small>"
    return f"<h3>What the run reads{said}</h3>{grid(rows)}{told}{directions}"


def _alarm(name: str, why: str, shares: Mapping[str, Any]) -> str:
    """A sentence on what is left out of a source for one reason, "" where it is hardly any."""
    samples, tokens = (number(shares.get(k)) or 0.0 for k in ("samples", "tokens"))
    if max(samples, tokens) <= WORTH_SAYING:
        return ""
    return (
        f"{name}: {_per_cent(samples)} of the samples and {_per_cent(tokens)} of the tokens are "
        f"left out: {why.replace('_', ' ')}."
    )


def epochs(run: RunData) -> str | None:
    """Times that the data were seen, as the last step of a stage counted them.

    Of several stages, and of runs that did not count: what the budget makes, the least and the most
    of all sources. None: not known.
    """
    if "data/epoch" in run.metrics and len(run.stages) < 2:
        return f"{run.metrics['data/epoch'].values[-1]:.3g}"
    seen: dict[str, float] = {}
    for _, source in sources(run):
        times, name = number(source.get("epochs")), str(source.get("source"))
        if times is not None:
            seen[name] = seen.get(name, 0.0) + times
    if not seen:
        return None
    least, most = f"{min(seen.values()):.3g}", f"{max(seen.values()):.3g}"
    return least if least == most else f"{least} to {most}"


def parameters(run: RunData) -> int | None:
    """Parameters of the model, as the start said it or as the saved model holds them."""
    said = run.start.get("parameters")
    found = said.get("model") if isinstance(said, Mapping) else said
    return found if isinstance(found, int) else run.parameters


def _per_cent(share: float) -> str:
    return f"{short(100 * max(0.0, share))} %"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
