"""`mm data`: pack raw files or manifests into shards, look into them, verify them."""

from __future__ import annotations

import inspect as inspection
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from mm.cli.common import (
    JsonFile,
    console,
    existing,
    figures,
    is_main,
    table,
    with_options,
    write_json,
)
from mm.errors import UserError

HELP = "Pack raw files into shards, look into them, verify them."
PACK = (
    "Pack SRC into checked shards in DIR.\n\nSRC is a folder or tar of files paired by stem "
    "(a.png, a.wav, a.txt), a JSONL, CSV, TSV or Parquet manifest, a Hugging Face dataset on disk, "
    "one text file, or packed shards. With --tokenizers the shards hold tokens. Unreadable samples "
    "go to quarantine.jsonl and are counted."
)
app = typer.Typer(no_args_is_help=True, help=HELP)  # without `pack`, see `full_app`


def pairs(option: str, words: Iterable[str] | None) -> dict[str, str] | None:
    """Turn ``["image=img_path"]`` into a mapping; None when nothing was given.

    Raises UserError on another form.
    """
    if not words:
        return None
    out = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {word}: write it as name=value")
        out[name] = value
    return out


def pack(
    src: Annotated[Path, typer.Argument(metavar="SRC")], json: JsonFile = None, **given: Any
) -> None:
    from mm.config import validate
    from mm.data.pack.config import PackConfig
    from mm.data.pack.job import PackJob

    out = given["out"]
    for name in ("columns", "caption_map", "map"):
        given[name] = pairs(PackConfig.option(name).flags[0], given[name])
    config = validate(PackConfig, {"src": src, **given}, "mm data pack")
    job = PackJob(config)
    show_conversations(job)
    report = job.run(progress=is_main())
    values = report.to_dict()
    title = f"{src} is packed in {out} already" if report.already else f"Packed {src}"
    figures(
        title,
        {
            name: value
            for name, value in values.items()
            if value not in ({}, [], False)
            and name not in ("already", "histograms", "rejected", "examples")
        },
    )
    if report.quarantined:
        console().print(
            f"{report.quarantined} unreadable: see {out / 'quarantine.jsonl'}", style="yellow"
        )
        for kind, count in report.rejected.items():
            console().print(f"  {count:,} x {report.examples.get(kind, kind)}", markup=False)
    write_json(json, values)


def show_conversations(job: Any) -> None:
    """Print how the columns of conversations are read, and the first ones as a model reads them."""
    from mm.data.chat.show import colour_runs
    from mm.data.pack.preview import preview

    shown = preview(job)
    if job.template is None:
        return
    words = " ".join(f"{name}={column}" for name, column in job.source.mapping.items())
    how = "guessed; another: --map NAME=COLUMN" if job.source.guessed else "as given"
    console().print(f"map: {words} ({how}); template: {job.template.origin}", markup=False)
    for key, runs in shown:
        console().print(f"--- {key}", style="bold", markup=False)
        console().print(colour_runs(runs, plain=not console().color_system))


def full_app() -> typer.Typer:
    """The group with `pack`, whose options are the fields of `PackConfig`."""
    from mm.data.pack.config import PackConfig

    options = {}
    for name, field in PackConfig.model_fields.items():
        if name in ("src", "limits"):
            continue
        own, annotation = PackConfig.option(name), field.annotation
        if name in ("columns", "caption_map", "map"):
            annotation = list[str] | None  # NAME=VALUE, repeatable
        elif Path in get_args(annotation):
            annotation = Path | None
        option = typer.Option(*own.flags, metavar=own.metavar, help=field.description)
        default = inspection.Parameter.empty if field.is_required() else field.default
        options[name] = (Annotated[annotation, option], default)
    full = typer.Typer(no_args_is_help=True, help=HELP)
    full.command(help=PACK)(with_options(pack, options))
    full.registered_commands += app.registered_commands
    return full


@app.command(help="Show counts, modalities, lengths and one decoded sample of each modality.")
def inspect(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Packed data.")],
    split: Annotated[
        str | None, typer.Option(help="Split of the decoded samples; default the first.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Number of the decoded sample.")] = 0,
    tokenizers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="To decode token shards.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Also write the decoded samples here."),
    ] = None,
    loss: Annotated[
        bool, typer.Option("--loss", help="Show what is learnt of three samples, in colour.")
    ] = False,
    json: JsonFile = None,
) -> None:
    existing(shards, "packed data", f"make it with: mm data pack SRC --out {shards}")
    if loss:
        inspect_loss(shards, tokenizers, split, sample, json)
        return
    from mm.data.shards import inspect as inspecting

    found = inspecting.inspect(shards, out=out, tokenizers=tokenizers, split=split, sample=sample)
    rows = [
        (name, modality, s["count"], s["total"], s["min"], round(s["mean"], 1), s["max"], s["unit"])
        for name, entry in found["splits"].items()
        for modality, s in entry["modalities"].items()
    ]
    samples = ", ".join(f"{name} {entry['samples']:,}" for name, entry in found["splits"].items())
    columns = ("split", "modality", "samples", "total", "min", "mean", "max", "unit")
    table(f"{shards}: {found['kind']} shards, samples: {samples}", columns, rows, left=2)
    for modality, example in found["examples"].items():
        files = [example[name] for name in ("file", "picture") if name in example]
        where = f" -> {', '.join(files)}" if files else ""
        console().print(f"{modality} {example['key']}: {example['what']}{where}", markup=False)
        if "segments" in example:
            console().print(f"  segments: {example['segments']}", markup=False)
        if example["metadata"]:
            console().print(f"  {example['metadata']}", markup=False)
    if found["quarantined"]:
        console().print(
            f"{found['quarantined']} unreadable: see {shards / 'quarantine.jsonl'}", style="yellow"
        )
    write_json(json, found)


def inspect_loss(
    shards: Path, tokenizers: Path | None, split: str | None, sample: int, json: Path | None
) -> None:
    """Print three samples with what is learnt in green."""
    from mm.data.chat import show

    found = show.inspect_loss(shards, tokenizers, split, sample)
    for each in found:
        console().print(f"--- {each['key']}", style="bold", markup=False)
        console().print(show.colour_runs(each["runs"], plain=not console().color_system))
    write_json(json, {"samples": found})


@app.command(
    help="Compare every byte with the manifest: sizes, hashes, members, ids.\n\nExit code 2 names "
    "what is damaged."
)
def verify(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Packed data.")],
    json: JsonFile = None,
) -> None:
    existing(shards, "packed data", f"make it with: mm data pack SRC --out {shards}")
    from mm.data.shards import verify as verifying

    found = verifying.verify(shards)
    write_json(json, found)
    if not found["ok"]:
        raise UserError(
            "\n".join(
                [
                    *found["problems"],
                    f"restore these files, or pack again: mm data pack SRC --out {shards} "
                    "--overwrite",
                ]
            )
        )
    console().print(
        f"{shards}: {found['shards']} shards, {found['samples']:,} samples, "
        f"{found['bytes']:,} bytes: all as packed"
    )
