"""`mm config`: keys of a Run, its JSON Schema, and a YAML after bases and overrides."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import (
    PASS_OVERRIDES,
    JsonFile,
    Overrides,
    TrustCode,
    console,
    overrides,
    write_json,
)

app = typer.Typer(
    no_args_is_help=True,
    help="List the keys of a Run, show its JSON Schema, or a YAML as it would run.",
)


@app.command(
    help="List keys of a run's YAML with type, default and meaning.\n\nWithout PATTERN those "
    "outside of kinds. A word is looked for in names: mm config keys lr. With a dot it is a path, "
    "where * is anything: mm config keys 'stages.*.optimizer*'"
)
def keys(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Word, or path with *.")
    ] = None,
    json: JsonFile = None,
) -> None:
    from mm.cli.keys import list_keys, show

    found = list_keys(pattern)
    for line in show(found):
        console().print(line)
    write_json(json, [key._asdict() for key in found])


@app.command(
    help="Write the JSON Schema of a Run with every registered kind, for editors to complete and "
    "check YAML."
)
def schema(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Instead of stdout.")
    ] = None,
    json: JsonFile = None,
) -> None:
    from mm.cli.schema import run_schema

    document = run_schema()
    write_json(json, document)
    if out:
        write_json(out, document)
        console().print(f"wrote {out}; first line of a YAML: # yaml-language-server: $schema={out}")
    else:
        typer.echo(json_module.dumps(document, indent=1))


@app.command(
    help="Print FILE as it would run: `base:` merged, overrides applied, defaults filled in.",
    context_settings=PASS_OVERRIDES,
)
def show(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Run or tokenizer YAML, or the name of a shipped one."),
    ],
    changes: Overrides = None,
    trust_code: TrustCode = False,
    json: JsonFile = None,
) -> None:
    from mm import config
    from mm.cli.schema import resolve

    resolved = resolve(file, overrides(changes), trust_code=trust_code)
    typer.echo(config.dump(resolved), nl=False)
    write_json(json, resolved.to_dict())
