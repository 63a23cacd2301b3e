"""`mm data`: pack raw files or manifests into shards, look into them, verify them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.common import JsonFile, console, existing, figures, is_main, table, write_json
from mm.errors import UserError

app = typer.Typer(
    no_args_is_help=True, help="Pack raw files into shards, look into them, verify them."
)


def pairs(option: str, words: Iterable[str] | None) -> dict[str, str] | None:
    """Turn ``["image=img_path"]`` into a mapping; None when nothing was given. Raises UserError on
    another form.
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


@app.command(
    help="Pack SRC into checked shards in DIR.\n\nSRC is a folder or tar of files paired by stem "
    "(a.png, a.wav, a.txt), a JSONL, CSV, "
    "TSV or Parquet manifest, a Hugging Face dataset on disk, one text file, or packed shards. "
    "With --tokenizers the shards hold tokens. Unreadable samples "
    "go to quarantine.jsonl and are counted."
)
def pack(
    src: Annotated[Path, typer.Argument(metavar="SRC")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="DIR", help="New folder; it appears when it is complete."
        ),
    ],
    tokenizers: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of one tokenizer a modality.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Older vocabulary.json, to be appended to.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="folder, jsonl, csv, parquet, hf, text or shards, where SRC's name does not tell.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY=COLUMN",
            help="Of a manifest, such as image=img_path; repeatable. segments=COLUMN: lists of "
            "{modality: value}, interleaved samples.",
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where a manifest's relative paths start.")
    ] = None,
    caption_from: Annotated[
        str | None,
        typer.Option(
            metavar="parent",
            help="`parent`: the caption is the name of the folder that a file lies in.",
        ),
    ] = None,
    caption_regex: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="On a file's name; the caption is its group `text` (or the first).",
        ),
    ] = None,
    caption_map: Annotated[
        list[str] | None,
        typer.Option(metavar="FOUND=CAPTION", help="Replaces what was found; repeatable."),
    ] = None,
    incomplete: Annotated[
        str | None,
        typer.Option(metavar="keep|reject", help="Samples that lack a modality the others have."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put all samples into this split.")
    ] = None,
    val_share: Annotated[
        float, typer.Option(help="Share of train that becomes val, by hash of the key.")
    ] = 0.0,
    document_bytes: Annotated[
        int | None, typer.Option(min=1, help="Length of the documents of one text file.")
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Size of a shard in 10**6 bytes.")] = 64.0,
    max_bad: Annotated[float, typer.Option(help="Share of samples that may be unreadable.")] = 0.01,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a pack of other content.")
    ] = False,
    segments: Annotated[
        bool,
        typer.Option(
            "--segments",
            help="a.000.txt, a.001.png, a.002.txt of a folder are one interleaved sample.",
        ),
    ] = False,
    tokenized: Annotated[
        bool,
        typer.Option(
            "--tokenized",
            help="The columns hold lists of token ids, made by --tokenizers (also a tokenizer.json;"
            " default the one beside SRC).",
        ),
    ] = False,
    license: Annotated[str, typer.Option(metavar="TEXT", help="Goes into the manifest.")] = "",
    dedupe: Annotated[
        str | None,
        typer.Option(
            metavar="sample|MODALITY",
            help="Leave out samples whose content (or that modality) came before.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that read, check and encode samples; default one a core."
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    from mm.data.pack import job as packing

    report = packing.pack(
        src,
        out,
        source=source,
        columns=pairs("--column", column),
        root=root,
        tokenizers=tokenizers,
        vocabulary=vocabulary,
        split=split,
        val_share=val_share,
        shard_mb=shard_mb,
        max_bad=max_bad,
        overwrite=overwrite,
        caption_from=caption_from,
        caption_regex=caption_regex,
        caption_map=pairs("--caption-map", caption_map),
        incomplete=incomplete,
        document_bytes=document_bytes,
        segments=segments,
        tokenized=tokenized,
        license=license,
        dedupe=dedupe,
        workers=workers,
        progress=is_main(),
    )
    values = report.to_dict()
    title = f"{src} is packed in {out} already" if report.already else f"Packed {src}"
    figures(
        title,
        {
            name: value
            for name, value in values.items()
            if value not in ({}, [], False) and name not in ("already", "histograms")
        },
    )
    if report.quarantined:
        console().print(
            f"{report.quarantined} unreadable: see {out / 'quarantine.jsonl'}", style="yellow"
        )
    write_json(json, values)


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
    json: JsonFile = None,
) -> None:
    existing(shards, "packed data", f"make it with: mm data pack SRC --out {shards}")
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
        where = f" -> {example['file']}" if "file" in example else ""
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
