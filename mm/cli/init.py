"""`mm init`: look at raw files and write the YAML and the commands that fit them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, write_json

app = typer.Typer()


@app.command(
    help="Look at SRC and write DIR: YAML for tokenizers and backbone, and the commands, with a "
    "reason beside every chosen value.\n\nSRC is anything that `mm data pack` takes. Then: mm run "
    "DIR, or the printed commands one by one. Everything they make lies in DIR.",
)
def init(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Raw files or a manifest.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of everything.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="For all of it, on this machine.")] = 10.0,
    text: Annotated[
        str, typer.Option(metavar="auto|bytes|bpe", help="How text becomes ids.")
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=8, max=256, help="Pixels a side; default by the pictures.")
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(min=0.001, max=0.9, help="Held out where SRC names no split; default 0.1."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that were edited.")] = False,
    json: JsonFile = None,
) -> None:
    from mm.errors import UserError
    from mm.own_data.choose import Options, choose
    from mm.own_data.look import look
    from mm.own_data.timing import step_seconds
    from mm.own_data.write import write

    if text not in ("auto", "bytes", "bpe"):
        raise UserError(f"--text {text}: give auto, bytes or bpe")
    if image_size is not None and image_size % 8:
        raise UserError(f"--image-size {image_size}: give a multiple of 8")
    given = ["mm", "init", str(src), "--out", str(out)]
    given += [f"--minutes={minutes:g}"] * (minutes != 10.0) + [f"--text={text}"] * (text != "auto")
    given += [f"--image-size={image_size}"] * (image_size is not None)
    given += [f"--val-share={val_share}"] * (val_share is not None)
    options = Options(out, minutes, text, image_size, val_share)
    plan = choose(look(src), options, step_seconds)
    rows = plan.rows()
    _show(src, out, rows)
    written = write(plan, out, shlex.join(given), force=force)
    if written.kept:
        names = ", ".join(file.name for file in written.kept)
        console().print(f"kept: {names} (there already; --force replaces them)", style="yellow")
    names = ", ".join(file.name for file in written.new) or "nothing"
    console().print(f"wrote: {names}\nthen: mm run {out}, or one by one:")
    for step in plan.steps:
        console().print(f"  {step.line}", markup=False)
    write_json(
        json,
        {
            "out": out,
            "choices": [
                dict(zip(("file", "key", "value", "reason"), r, strict=True)) for r in rows
            ],
            "commands": [step.line for step in plan.steps],
        },
    )


def _show(src: Path, out: Path, rows: list[tuple[str, str, str, str]]) -> None:
    """Every choice on a line of its own, its reason behind it."""
    shown = None
    for file, key, value, why in rows:
        if file != shown:
            console().print(f"\n{out / file if file else src}", style="bold", markup=False)
            shown = file
        console().print(f"  {key}: {value}  # {why}" if file else f"  {key}: {why}", markup=False)
    console().print()
