"""`mm finetune`: tune a trained model on data of one's own, and compare both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    TrustCode,
    console,
    existing,
    number,
    overrides,
    table,
    write_json,
)
from mm.cli.eval import amount

app = typer.Typer()


@app.command(
    help="Tune the model of --model on --data, measure both, and write everything into --out.\n\n"
    "With nothing else said it chooses method, rank, batch, learning rate and steps that fit this "
    "device, says why, and writes the YAML that it runs. The same command again resumes.",
    context_settings=PASS_OVERRIDES,
)
def finetune(
    changes: Overrides = None,
    model: Annotated[
        Path,
        typer.Option("--model", metavar="DIR", help="Run, saved model, or what mm import wrote."),
    ] = ...,  # type: ignore[assignment]
    data: Annotated[
        Path, typer.Option("--data", metavar="DATA", help="Raw files, or packed shards.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="RUN", help="Run folder of everything.")
    ] = ...,  # type: ignore[assignment]
    method: Annotated[
        str, typer.Option(metavar="auto|full|lora|qlora", help="Which parameters train.")
    ] = "auto",
    minutes: Annotated[
        float, typer.Option(min=0.1, help="For all of it, on this device, as predicted.")
    ] = 10.0,
    replay: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of the base's own data, if it is there.")
    ] = 0.5,
    trust_code: TrustCode = False,
    json: JsonFile = None,
) -> None:
    assignments = overrides(changes)
    existing(data, "data", "name a folder, a manifest or packed shards")
    from mm.finetune.choose import Options
    from mm.finetune.run import command_line, finetune

    options: Any = Options(method, minutes, replay, tuple(assignments))  # type: ignore[arg-type]
    command = command_line(model, data, out, options)
    found = finetune(
        model, data, out, options, command=command, trust_code=trust_code, show=_show_choices
    )
    if found.comparison is not None:
        show(found.comparison)
    write_json(json, {"run": found.folder, "comparison": found.comparison})
    console().print(
        f"tuned: {out}; look at {out / 'report' / 'index.html'}, ask it: mm generate {out} --help"
    )


def _show_choices(rows: list[tuple[str, str, str, str]]) -> None:
    for file, key, value, why in rows:
        text = f"  {key}: {value}  # {why}" if file else f"  {key}: {why}"
        console().print(text if len(text) <= 240 else f"{text[:240]}...", markup=False)


def show(comparison: dict[str, Any]) -> None:
    """Print base and tuned model beside each other, and what the tuning cost."""
    for of, title in (("own", "Your held-out data"), ("base", "The base's own data")):
        rows = [row for row in comparison["rows"] if row["of"] == of]
        cells = [
            (
                row["name"],
                *(amount(row.get(k), row["unit"]) for k in ("base", "tuned", "chance")),
                number(row.get("n")),
            )
            for row in rows
        ]
        if cells:
            table(title, ("figure", "base", "tuned", "chance", "n"), cells)
    cost = comparison["cost"]
    total, trained = cost["parameters"], cost["trained_parameters"]
    console().print(
        f"trained {trained:,} of {total:,} parameters ({trained / max(1, total):.1%}), "
        f"{cost['steps']:,} steps, {cost['tokens']:,} tokens, {cost['seconds']:.0f} s, peak memory "
        f"{number(cost['peak_memory_mib'])} MiB of the {cost['peak_memory_of']}"
    )
