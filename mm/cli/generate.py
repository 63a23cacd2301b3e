"""`mm generate`: any modality from any other, with a trained run."""

from __future__ import annotations

from collections.abc import Iterable
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import JsonFile, console, existing, table, with_options, write_json
from mm.errors import UserError

HELP = "Generate any modality from any mix of modalities."


def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a saved model.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="MODALITY", help="Modality to generate.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; with --to text it is continued.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write; suffix optional."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 = greedy. Default: what mm eval chose for the run, else 1."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 = off. Default: likewise.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Default: likewise.")] = None,
    cfg_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 = off. Default: likewise.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Times that conditions are read. Default: likewise.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New ids at most, where the length is free.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: JsonFile = None,
    **conditions: Path | None,
) -> None:
    existing(run, "run folder", "make one with: mm train CONFIG")
    raws = read_prompt({"text": prompt, **conditions}, to)
    from mm.data.modalities.base import modality_of_value
    from mm.decoders.generate import Generator, save_media

    generator = Generator.from_pretrained(run)
    generator.tokenizer(to)  # a modality that the run does not know is said before a missing -o
    if out is None and to != "text":
        raise UserError(f"--to {to} writes a file: name it with -o FILE")
    named = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "cfg_scale": cfg_scale,
        "repeats": repeats,
    }  # fmt: skip
    chosen = chosen_sampling(run, raws, to)
    sampling = chosen | {k: v for k, v in named.items() if v is not None}
    values = generator.generate([raws] * n, to, max_tokens=max_tokens, seed=seed, **sampling)
    rows = []
    for i, value in enumerate(values):
        text = (
            value.decode("utf-8", "replace")
            if isinstance(value, bytes)
            else value
            if isinstance(value, str)
            else None
        )
        file = save_media(value, numbered_path(out, i, n)) if out else None
        rows.append({"file": file, "text": text, "what": modality_of_value(value).describe(value)})
        if text is not None and out is None:
            console().print(text, markup=False)
    if out:
        table(
            f"Generated {to}", ("file", "what"), [(str(row["file"]), row["what"]) for row in rows]
        )
    write_json(json, {"run": run, "to": to, "seed": seed, "sampling": sampling, "outputs": rows})


app = typer.Typer()  # what `mm --help` reads
app.command(help=HELP)(with_options(generate, {}))


def full_app() -> typer.Typer:
    """The command with a file option for every modality but text, which is --prompt."""
    from mm.registry import MODALITIES, load_plugins

    load_plugins()
    file = lambda kind: typer.Option(metavar="FILE", help=f"{kind.capitalize()} condition.")
    files = {k: (Annotated[Path | None, file(k)], None) for k in MODALITIES if k != "text"}
    full = typer.Typer()
    full.command(help=HELP)(with_options(generate, files))
    return full


def chosen_sampling(run: Path, conditions: Iterable[str], to: str) -> dict[str, Any]:
    """Settings that `mm eval RUN --json RUN/results.json` chose for this direction, or none."""
    try:
        every = loads((run / "results.json").read_text())["sampling"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    settings = every.get(f"{'_'.join(m for m in conditions if m != to)}_to_{to}", {})
    known = ("temperature", "top_k", "top_p", "cfg_scale", "repeats")
    return {k: settings[k] for k in known if k in settings}


def read_prompt(given: dict[str, Any], to: str) -> dict[str, Any]:
    """Raw values of the given conditions.

    One of the modality that is generated comes last, because it is continued.

    Raises:
        UserError: a file is missing or cannot be decoded.
    """
    from mm.data.modalities.base import BadSample, get_modality

    raws: dict[str, Any] = {}
    for modality, value in sorted(given.items(), key=lambda item: item[0] == to):
        if value is None:
            continue
        if isinstance(value, Path):
            if not value.is_file():
                raise UserError(f"--{modality} {value}: no such file")
            try:
                value = get_modality(modality).decode(value.read_bytes())
            except BadSample as error:
                raise UserError(f"--{modality} {given[modality]}: {error}") from error
        raws[modality] = value
    return raws


def numbered_path(out: Path | None, i: int, n: int) -> Path:
    """File of output ``i`` of ``n``.

    ``out`` itself, or ``out_00``, ``out_01`` ... before its suffix.
    """
    assert out is not None
    return out if n == 1 else out.with_name(f"{out.stem}_{i:02d}{out.suffix}")
