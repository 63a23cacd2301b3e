"""`mm import`: a model in Hugging Face's layout becomes a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import JsonFile, console, existing, write_json
from mm.errors import UserError

app = typer.Typer()
NoCheck = Annotated[bool, typer.Option("--no-check", help="Compare no logits with transformers.")]


@app.command(
    name="import",
    help="Write the model of DIR, a folder in Hugging Face's layout or an adapter in PEFT's "
    "format, as a saved model for init_from, mm generate, mm eval and mm export; a codec or an "
    "image tokenizer as a tokenizer for mm data pack.",
)
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="config.json, *.safetensors, tokenizer.json.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="MODEL", help="Saved model that an adapter is put upon."),
    ] = None,
    books: Annotated[
        int | None,
        typer.Option(
            "--books", min=1, help="Codebooks of a codec to use; default: what its config says."
        ),
    ] = None,
    no_check: NoCheck = False,
    json: JsonFile = None,
) -> None:
    existing(folder, "folder", "name one that holds config.json and *.safetensors")
    refuse_existing(out)
    from mm.interchange.adapter import import_adapter, is_adapter

    if is_adapter(folder):
        if base is None:
            raise UserError(
                f"{folder}: an adapter, no whole model: name the imported model that it is for "
                "with --base"
            )
        existing(base, "saved model", "make one with: mm import")
        import_adapter(folder, base, out)
        say(None, out, json)
        return
    if base is not None:
        raise UserError(f"--base: {folder} is no adapter (it has no adapter_config.json)")
    from mm.interchange.check import require_peer
    from mm.interchange.read import import_model, read_settings
    from mm.interchange.read_codec import import_codec
    from mm.interchange.read_encoder import import_encoder
    from mm.registry import CODECS, ENCODERS

    if not no_check:
        require_peer()
    c = read_settings(folder)
    if c.get("model_type") in CODECS:
        report = import_codec(folder, out, c, check=not no_check, books=books)
        say_codec(report, out, json)
        return
    if books is not None:
        raise UserError(f"--books: {folder} is no codec (its model_type is {c['model_type']!r})")
    if c.get("model_type") in ENCODERS:
        found = import_encoder(folder, out, c, check=not no_check)
        by = "nothing" if found is None else f"transformers: at most {found.difference:.1e} apart"
        console().print(f"wrote {out}; its last hidden states were compared with {by}")
        console().print(
            f"put it into a model: `init_from.surgery: [{{kind: graft_adapter, path: {out}, "
            f"modality: ...}}]`, and {out}/config.json as `model.adapters`"
        )
        write_json(json, {"out": out, "check": found._asdict() if found else None})
        return
    say(import_model(folder, out, check=not no_check), out, json)
    console().print(
        f"train it further: init_from={out}; ask it: mm generate {out} --to text -p ..."
    )


def refuse_existing(out: Path) -> None:
    """Raise UserError where a folder would be overwritten."""
    if out.exists():
        raise UserError(f"--out {out}: is there already; name another or remove it")


def say_codec(report: Any, out: Path, json: Path | None) -> None:
    """Print what was written of a codec and what a comparison found."""
    from mm.tokenizers.load import load_tokenizer

    spec = load_tokenizer(out).spec
    found = (
        "its codes were compared with nothing"
        if report is None
        else f"{report.codes:,} codes are those of transformers, decoded values at most "
        f"{report.difference:.1e} apart"
    )
    console().print(f"wrote {out}; {found}")
    console().print(
        f"{spec.n_codebooks} codebooks of {spec.vocab_size} codes for '{spec.modality}'; write "
        f"data in its ids: mm data pack DATA --tokenizers FOLDER, which holds {out.name}"
    )
    write_json(json, {"out": out, "check": report._asdict() if report else None})


def say(report: Any, out: Path, json: Path | None) -> None:
    """Print what was written and what a comparison found."""
    if report is None:
        console().print(f"wrote {out}; its logits were compared with nothing")
    else:
        console().print(
            f"wrote {out}; {report.logits:,} logits differ from transformers' by at most "
            f"{report.difference:.1e}, the greedy continuation is the same"
        )
    write_json(json, {"out": out, "check": report._asdict() if report else None})
