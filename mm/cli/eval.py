"""`mm eval`: run the tasks of a run on held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    console,
    is_main,
    number,
    overrides,
    plain,
    run_config,
    table,
    write_json,
)
from mm.errors import UserError

app = typer.Typer()

# Endings of figures that stand beside another one, and the column they go to.
BESIDE = {
    "_chance": "chance",
    "_n": "n",
    "_judge_on_real_accuracy": "judge",
    "_linear_probe_accuracy": "probe",
    "_bar": "bar",
}


@app.command(
    name="eval",
    help="Run the tasks that the config of RUN names, and print every figure beside its chance "
    "level.\n\nUnder torchrun the processes share the tasks; the figures stay the same.",
    context_settings=PASS_OVERRIDES,
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    changes: Overrides = None,
    split: Annotated[
        str | None, typer.Option(help="Instead of the split that each task names.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of whatever is sampled.")] = 0,
    json: JsonFile = None,
) -> None:
    from mm.run import Run

    config = Run.load(run_config(run), overrides(changes))
    tasks = [task for stage in config.stages for task in stage.tasks]
    if not tasks:
        raise UserError(
            f"{run / 'config.yaml'}: no stage has `tasks:`; for a tokenizer: mm tokenizer "
            f"eval {run} --data SHARDS"
        )
    from mm.decoders.generate import Generator
    from mm.tasks.run import measure

    if split:
        tasks = [
            t.model_copy(update={"split": split}) if "split" in type(t).model_fields else t
            for t in tasks
        ]
    generator = Generator.from_pretrained(run)
    found: dict[int, dict[str, Any]] = {}
    each = measure(tasks, lambda task: plain(task.build().evaluate(generator, seed=seed)))
    for n, one in track(
        each,
        description="evaluating",
        total=len(tasks),
        console=console(),
        disable=not is_main(),
    ):
        found[n] = one
    if not is_main():
        return
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    sampling: dict[str, Any] = {}
    for n, task in enumerate(tasks):
        figures, taken = found[n]["figures"], found[n]["seconds"]
        raw.append({"task": task.to_dict(), "figures": figures, "seconds": taken})
        sampling |= {
            k.removesuffix("_settings"): v for k, v in figures.items() if k.endswith("_settings")
        }
        mine = figure_rows(figures)
        rows += mine
        seconds[mine[0]["name"] if mine else task.to_dict()["kind"]] = taken
    figure_table(f"{run}: {split or 'held-out'} split", rows)
    write_json(
        json,
        {
            "run": run,
            "seed": seed,
            "figures": rows,
            "sampling": sampling,
            "seconds": seconds,
            "tasks": raw,
        },
    )


def figure_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of `figure_rows`: each figure beside its bar, chance level and judge."""
    beside = [c for c in ("bar", "chance", "judge", "probe", "n") if any(c in row for row in rows)]
    cells = []
    for row in rows:
        others = (amount(row.get(c), row["unit"] if c != "n" else "") for c in beside)
        cells.append((row["name"], amount(row["value"], row["unit"]), *others))
    table(title, ("figure", "value", *beside), cells)


def figure_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turn a task's flat figures into rows.

    ``x_accuracy`` takes ``x_chance``, ``x_n``, ``x_judge_on_real_accuracy`` along.
    """
    rows = []
    for name, value in figures.items():
        counted = name.endswith(
            (*BESIDE, "_tokens", "_bytes", "_nats_per_token")
        )  # counts of what was measured: the JSON has them
        if counted or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        row = {"name": name, "value": value, "unit": unit(name)}
        for ending, column in BESIDE.items():
            # A bar is one figure's own; chance, judge and count are shared by all figures of a
            # task.
            for stem in [name.removesuffix("_accuracy")] if column == "bar" else stems(name):
                if f"{stem}{ending}" in figures and column not in row:
                    row[column] = figures[f"{stem}{ending}"]
        rows.append(row)
    return rows


def stems(name: str) -> Sequence[str]:
    """What the companions of a figure begin with: its own name, or that without its last words."""
    words = name.split("_")
    return [name, *("_".join(words[:i]) for i in range(len(words) - 1, 0, -1))]


def unit(name: str) -> str:
    """Unit that a figure's name declares."""
    if name.endswith(("_accuracy", "_share", "_usage")):
        return "share"
    return "bits/byte" if "bits_per_byte" in name else "dB" if name.endswith("_db") else ""


def amount(value: Any, unit: str) -> str:
    if unit == "share" and isinstance(value, (int, float)):
        return f"{100 * value:.1f} %"
    return number(value)
