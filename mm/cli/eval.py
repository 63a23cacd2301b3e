"""`mm eval`: run the tasks of a run on held-out data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track

from mm.cli.common import (
    PASS_OVERRIDES,
    Device,
    JsonFile,
    Overrides,
    TrustCode,
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

if TYPE_CHECKING:
    from mm.run import Run

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
    "level.\n\nUnder torchrun the processes share the tasks; the figures stay the same.\n\n"
    "--harness arc_easy, or a YAML of its form: tasks of lm-eval in their place.",
    context_settings=PASS_OVERRIDES,
)
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    changes: Overrides = None,
    trust_code: TrustCode = False,
    split: Annotated[
        str | None, typer.Option(help="Instead of the split that each task names.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of whatever is sampled.")] = 0,
    device: Device = "auto",
    json: JsonFile = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task of lm-eval, or the YAML of one; more than once."),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Of --harness: examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of --harness: questions of each task.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=8, help="Of --harness: ids of a question with its answer.")
    ] = 1024,
) -> None:
    from mm.run import Run
    from mm.tasks.base import by_name

    if harness:
        _harness(run, harness, few_shot, limit, max_tokens, device, trust_code, json)
        return
    config = Run.load(run_config(run), overrides(changes), trust_code=trust_code)
    named = by_name([task for stage in config.stages for task in stage.tasks])
    if not named:
        raise UserError(
            f"{run / 'config.yaml'}: no stage has `tasks:`; for a tokenizer: mm tokenizer "
            f"eval {run} --data SHARDS"
        )
    from mm.decoders.device import choose_device
    from mm.decoders.generate import Generator
    from mm.tasks.run import measure

    if split:
        named = {
            name: t.model_copy(update={"split": split}) if "split" in type(t).model_fields else t
            for name, t in named.items()
        }
    tasks = list(named.values())
    generator = Generator.from_pretrained(run, choose_device(device), trust_code=trust_code)
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
    figures = {name: found[n]["figures"] for n, name in enumerate(named)}
    rows = task_rows(figures)
    sampling: dict[str, Any] = {}
    for each in figures.values():  # of two tasks of one direction the first one's
        chosen = {k.removesuffix("_settings"): v for k, v in each.items() if "_settings" in k}
        sampling = chosen | sampling
    figure_table(f"{run}: {split or 'held-out'} split", rows)
    seconds = {name: found[n]["seconds"] for n, name in enumerate(named)}
    write_json(
        json,
        {
            "run": run,
            "seed": seed,
            "figures": rows,
            "sampling": sampling,
            "seconds": seconds,
            "tasks": [
                {
                    "name": name,
                    "task": task.to_dict(),
                    "figures": figures[name],
                    "seconds": seconds[name],
                }
                for name, task in named.items()
            ],
        },
    )
    mirror_to_tracker(config, run, figures)


def _harness(
    run: Path,
    tasks: Sequence[str],
    few_shot: int | None,
    limit: int | None,
    max_tokens: int,
    device: str,
    trust_code: bool,
    json: Path | None,
) -> None:
    """Run tasks of lm-eval, and print their figures."""
    from mm.decoders.device import choose_device
    from mm.decoders.generate import Generator
    from mm.tasks import harness

    generator = Generator.from_pretrained(run, choose_device(device), trust_code=trust_code)
    model = harness.language_model(generator, max_tokens=max_tokens)
    figures, errors = harness.run(model, tasks, few_shot, limit)
    rows = [(name, number(value)) for name, value in figures.items()]
    table(f"{run}: lm-eval", ("figure", "value"), rows)
    write_json(json, {"run": run, "figures": figures, "standard_errors": errors})


def mirror_to_tracker(config: Run, folder: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Set the figures in the summary of the run's W&B page, if it has one."""
    from mm.trainer.checkpoint.format import newest_state
    from mm.trainer.log.tracker import Tracker

    tracker = Tracker.go_on(config, folder, newest_state(folder / "checkpoints").get("tracker"))
    tracker.summary({f"eval/{name}/{k}": v for name, f in figures.items() for k, v in f.items()})
    tracker.finish()


def task_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of several tasks: task -> figures.

    Each row says its ``task``; a figure that two of them give has ``<task>/`` before its name.
    """
    rows = [row | {"task": task} for task, found in figures.items() for row in figure_rows(found)]
    times = Counter(row["name"] for row in rows)
    for row in rows:
        if times[row["name"]] > 1:
            row["name"] = f"{row['task']}/{row['name']}"
    return rows


def figure_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of `task_rows`: each figure beside its bar, chance level and judge."""
    beside = [c for c in ("bar", "chance", "judge", "probe", "n") if any(c in row for row in rows)]
    cells = []
    for row in rows:
        share = "share" if row["unit"] == "share" else ""
        others = (amount(row.get(c), share if c != "n" else "") for c in beside)
        cells.append((row["name"], amount(row["value"], row["unit"]), *others))
    table(title, ("figure", "value", *beside), cells)
    units = {row["unit"] for row in rows}
    if "share" in units and "chance" in beside:
        console().print("chance of an accuracy: the share of the commonest class", style="dim")
    if "bits/byte" in units:
        console().print(
            "bits per raw byte that the codes take (those of images and audio are lossy); chance: "
            "every code that may come is equally likely",
            style="dim",
        )


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
    if unit in ("bits/byte", "dB") and isinstance(value, (int, float)):
        return f"{number(value)} {unit}"
    return number(value)
