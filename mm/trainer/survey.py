"""What a run will train on, said before its first step: a table, `start.json`, and what is refused.

The figures come from the index of the shards, see `mm.data.streams.survey`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.errors import UserError, did_you_mean
from mm.run import Run, Stage
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")

WORTH_SAYING = 0.01  # share left out that is warned of
FILE = "start.json"


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``start.json``."""
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / FILE)


def show(run: Run, found: Mapping[str, Any]) -> None:
    """Print the table on standard error."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sizes = ", ".join(
        f"{n:,} parameters"
        + (f" of '{name}'" if name != "model" else "")
        + (f" ({found['trained'][name]:,} train)" if found["trained"][name] != n else "")
        for name, n in found["parameters"].items()
    )
    world = f"{found['world']} process" + "es" * (found["world"] > 1)
    steps = sum(stage.budget.steps for stage in run.stages)
    title = (
        f"{run.name}: {sizes}; {found['device']}, {found['precision']}, {world}; {steps:,} steps"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    many = len(found["stages"]) > 1
    sources = [source for stage in found["stages"] for source in stage["sources"]]
    names = endings([str(source["source"]) for source in sources])
    some = any(max(left_out(source)) > 0 for source in sources)  # else a column less to read
    columns = ("source", "modality", "samples", "tokens", "on disk", "left out")
    for i, name in enumerate((*["stage"] * many, *columns, *["of tokens"] * some, "epochs")):
        side = "right" if i >= 2 + many else "left"
        # Of a short line the source's name is broken, never a number.
        table.add_column(name, overflow="fold", justify=side, no_wrap=i >= 1)
    for stage in found["stages"]:
        for source in stage["sources"]:
            for cells in _rows(source, names[str(source["source"])], some):
                table.add_row(*[Text(c) for c in (*[str(stage["stage"])] * many, *cells)])
    Console(stderr=True, highlight=False, soft_wrap=True).print(table)


def _rows(source: Mapping[str, Any], name: str, some: bool) -> Iterator[tuple[str, ...]]:
    """Cells of a source: a line a modality, what is said of the whole source in the first.

    Args:
        name: what to call it.
        some: whether any source leaves something out.
    """
    from rich.filesize import decimal

    samples, tokens = left_out(source)
    shares = (f"{samples:.1%}", f"{tokens:.1%}") if max(samples, tokens) else ("none", "")
    for n, (modality, entry) in enumerate(source["modalities"].items()):
        size = f"{entry['tokens']:,}" if "tokens" in entry else ""
        line = (modality, f"{entry['samples']:,}", size, decimal(entry["bytes"]))
        whole = (f"{name} ({source['split']})", *shares[: 1 + some], f"{source['epochs']:.3g}")
        whole = whole if n == 0 else ("",) * len(whole)
        yield (whole[0], *line, *whole[1:])


def endings(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ends of paths that tell them apart: path -> end."""
    parts = {path: Path(path).parts for path in paths}
    out = {}
    for path, own in parts.items():
        others = [other for each, other in parts.items() if each != path]
        n = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), 0)
        out[path] = "/".join(own[-n:]) if n else path
    return out


def left_out(source: Mapping[str, Any]) -> tuple[float, float]:
    """Share of a source's samples, and of its tokens, that no step will see."""
    reasons = source["left_out"].values()
    return sum(r["samples"] for r in reasons), sum(r["tokens"] for r in reasons)


def judge(
    index: int, stage: Stage, stream: Any, found: Sequence[Mapping[str, Any]], words: Vocabulary
) -> None:
    """Warn of what a stage leaves out, and refuse it where it is more than the config allows.

    Args:
        index: number of the stage.
        stream: of the stage; it says what mends it.
        found: its sources, as the stream surveys them.
        words: of the run.
    Raises:
        UserError: one line a source, modality or task, with the keys to set.
    """
    key, faults = f"stages.{index}", []
    for source in found:
        name = str(source["source"])
        share = max(left_out(source))
        if share <= WORTH_SAYING or name in stage.allow_empty:
            continue
        line = f"{key}.data: {name}: {_shares(source)}: {_mend(key, source, stream)}"
        if share > stage.allow_left_out:
            faults.append(f"{line}; or allow it: {key}.allow_left_out={_above(share)}")
        elif share >= 1:
            faults.append(f"{line}; or allow it: {key}.allow_empty=[{name}]")
        else:
            log.warning("%s", line)
    faults += _empty(key, stage, stream, found, words)
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _empty(
    key: str, stage: Stage, stream: Any, found: Sequence[Mapping[str, Any]], words: Vocabulary
) -> Iterator[str]:
    """A line for every modality and task that the config names and that gets nothing."""
    tasks: dict[str, float] = {}
    for source in found:
        for task, share in source["tasks"].items():
            tasks[task] = max(tasks.get(task, 0.0), share)
    having: dict[str, int] = {}
    used: dict[str, float] = {}
    for source in found:
        for m, entry in source["modalities"].items():
            having[m] = having.get(m, 0) + entry["samples"]
            used[m] = max(used.get(m, 0.0), entry["used"])
    weights = getattr(stage.objective, "weights", {})
    asked = getattr(stage.data, "modality_tokens", None) or {}
    in_tasks = {m for task in tasks for m in _parts(task)}
    chunked = {p.modality for p in getattr(stage.data, "transform", ()) if p.kind == "chunk"}
    for m in sorted(in_tasks | set(asked) | chunked):
        if m not in words.modalities:
            where = next((f"any_to_any task '{t}'" for t in tasks if m in _parts(t)), f"{key}.data")
            yield (
                f"{key}: {where} names '{m}', which is no modality of the vocabulary"
                f"{did_you_mean(m, words.modalities)}"
            )
    known = (*words.modalities, *tasks, *(str(source["source"]) for source in found))
    for name in stage.allow_empty:
        if name not in known:
            yield f"{key}.allow_empty: nothing is called '{name}'{did_you_mean(name, known)}"
    named = (in_tasks if tasks else set(having)) | {m for m, w in weights.items() if w}
    allow = lambda name: f"or allow it: {key}.allow_empty=[{name}]"
    mends = next((_mend(key, s, stream) for s in found if s["left_out"]), "")
    silent = {m for m in named if not used.get(m) and m not in stage.allow_empty}
    for m in sorted(silent & set(words.modalities)):
        if not having.get(m):
            why = "no sample of its sources has it: add a source that has, or leave it out"
        elif mends:
            why = f"all {having[m]:,} samples that have it are left out: {mends}"
        else:
            why = "no task of any_to_any takes it"
        yield f"{key}: '{m}' gets nothing: {why}, {allow(m)}"
    for task, share in tasks.items():
        if share or task in stage.allow_empty or silent & _parts(task):
            continue
        if _parts(task) <= set(words.modalities):
            why = mends or "no sample has all of its modalities"
            yield f"{key}: any_to_any task '{task}' gets nothing: {why}, {allow(task)}"


def _parts(task: str) -> set[str]:
    """The modalities of a task, such as ``image+text>audio``."""
    return set(task.replace(">", "+").split("+"))


def _shares(source: Mapping[str, Any]) -> str:
    samples, tokens = left_out(source)
    reasons = " and ".join(why.replace("_", " ") for why in source["left_out"])
    return (
        f"{samples:.1%} of the samples and {tokens:.1%} of the tokens are left out ({reasons}; "
        f"the longest has {source['longest']:,} tokens)"
    )


def _mend(key: str, source: Mapping[str, Any], stream: Any) -> str:
    made = (stream.mend(why, source["longest"]) for why in source["left_out"])
    return "; ".join(text.replace("data.", f"{key}.data.") for text in dict.fromkeys(made))


def _above(share: float) -> str:
    """The next hundredth above a share."""
    return f"{min(1.0, int(share * 100 + 1) / 100):g}"
