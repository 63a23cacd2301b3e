"""`mm generate`: any modality from any other, with a trained run."""

from __future__ import annotations

import errno
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli.common import (
    Device,
    JsonFile,
    TrustCode,
    console,
    existing,
    table,
    with_options,
    write_json,
)
from mm.errors import UserError
from mm.reading import parse_json

HELP = "Generate any modality from any mix of modalities."


def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a saved model.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="MODALITY", help="What to generate; asked for where it is not clear."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; with --to text it is continued.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer --prompt, asked through the chat template.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write; suffix optional."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=100_000, help="How many.")] = 1,
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
        int | None,
        typer.Option(min=1, max=1_000_000, help="New ids at most, where the length is free."),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer prompts are refused. Default: 16384.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    device: Device = "auto",
    trust_code: TrustCode = False,
    json: JsonFile = None,
    **conditions: Path | None,
) -> None:
    existing(run, "run folder", "make one with: mm train CONFIG")
    for modality, file in conditions.items():
        if file is not None and not file.is_file():
            raise UserError(f"--{modality} {file}: no such file")
    if chat:
        named = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "cfg_scale": cfg_scale,
            "max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens,
        }  # fmt: skip
        asked = {k: v for k, v in named.items() if v is not None} | {"seed": seed}
        answer(run, prompt, conditions, n, device, trust_code, json, asked)
        return
    from mm.data.modalities.base import raw_modality
    from mm.decoders.device import choose_device
    from mm.decoders.generate import Generator, save_media
    from mm.decoders.raws import by_reader, parse_prompt

    generator = Generator.from_pretrained(run, choose_device(device), trust_code=trust_code)
    given = by_reader(parse_prompt(prompt, conditions), generator.vocabulary.ranges)
    to = chosen_modality(generator, to)
    own = generator.modality(to)
    generator.tokenizer(own)
    raw = raw_modality(own)
    if out is None and not raw.is_text:
        raise UserError(f"--to {to} writes a file: name it with -o FILE.{raw.extensions[0]}")
    if out is not None:
        raw.check_ending(out)
        make_room(out)
    # What is generated comes last in the prompt, because it is continued.
    raws = {m: v for at_end in (False, True) for m, v in given.items() if (m == to) is at_end}
    if not raws:
        typer.echo(f"no prompt: {to} as the model makes it without a condition", err=True)
    if note := generator.unseen([raws]):
        typer.echo(note, err=True)
    named = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "cfg_scale": cfg_scale,
        "repeats": repeats,
    }  # fmt: skip
    chosen = chosen_sampling(run, raws, to)
    sampling = chosen | {k: v for k, v in named.items() if v is not None}
    if max_prompt_tokens is not None:
        sampling["max_prompt_tokens"] = max_prompt_tokens
    values = generator.generate([raws] * n, to, max_tokens=max_tokens, seed=seed, **sampling)
    rows = []
    for i, value in enumerate(values):
        text = None
        if raw.is_text:
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        try:
            file = save_media(value, numbered_path(out, i, n), own) if out else None
        except OSError as error:
            raise UserError(f"-o {out}: cannot be written ({error.strerror})") from error
        rows.append({"file": file, "text": text, "what": raw.line(value)})
        if text is not None and out is None:
            console().print(text, markup=False)
    if out:
        table(
            f"Generated {to}", ("file", "what"), [(str(row["file"]), row["what"]) for row in rows]
        )
    write_json(json, {"run": run, "to": to, "seed": seed, "sampling": sampling, "outputs": rows})


def answer(
    run: Path,
    prompt: str | None,
    conditions: dict[str, Path | None],
    n: int,
    device: Any,
    trust_code: bool,
    json: Path | None,
    settings: dict[str, Any],
) -> None:
    """Print what the assistant says to a question, with the files that go with it before it."""
    from mm.decoders.chat import Chat
    from mm.decoders.device import choose_device

    media = [
        {"type": modality, modality: str(file.resolve())}
        for modality, file in conditions.items()
        if file is not None
    ]
    if not prompt and not media:
        raise UserError("--chat answers a question: give one with --prompt")
    content = [*media, {"type": "text", "text": prompt or ""}]
    asking = Chat.from_pretrained(run, choose_device(device), trust_code=trust_code)
    said = asking.answer([[{"role": "user", "content": content}]] * n, Path("/"), **settings)
    for text in said:
        console().print(text, markup=False)
    write_json(json, {"run": run, "sampling": settings, "outputs": said})


app = typer.Typer()  # what `mm --help` reads
app.command(help=HELP)(with_options(generate, {}))


def full_app() -> typer.Typer:
    """The command with a file option for every modality but text, which is --prompt."""
    from mm.plug_point import load_plugins
    from mm.registry import MODALITIES

    load_plugins()
    file = lambda kind: typer.Option(metavar="FILE", help=f"{kind.capitalize()} condition.")
    files = {k: (Annotated[Path | None, file(k)], None) for k in MODALITIES if k != "text"}
    full = typer.Typer()
    full.command(help=HELP)(with_options(generate, files))
    return full


def chosen_modality(generator: Any, to: str | None) -> str:
    """What to generate: as asked, the only modality of the model, or the answer at a terminal.

    Raises:
        UserError: it is not clear, and nobody can be asked; names the choices.
    """
    if to is not None:
        generator.modality(to)
        return to
    from mm.decoders.raws import writable_modalities

    known = writable_modalities(generator.vocabulary.ranges, generator.tokenizers)
    if len(known) > 1 and at_terminal():
        to = ask(known)
        generator.modality(to)
        return to
    if len(known) > 1:
        raise UserError(f"--to is missing: --to {' or --to '.join(known)}")
    return generator.modality()


def at_terminal() -> bool:
    """True where somebody can answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(known: Sequence[str]) -> str:
    """The modality that somebody at the terminal names."""
    return typer.prompt(f"generate which modality ({', '.join(known)})")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"no finite number: {str(value)[:40]!r}")
    return value


def _whole_number(value: Any) -> int:
    if not float(_number(value)).is_integer():
        raise ValueError(f"no whole number: {value}")
    return int(value)


SAMPLING = {
    "temperature": _number,
    "top_k": _whole_number,
    "top_p": _number,
    "cfg_scale": _number,
    "repeats": _whole_number,
}


def chosen_sampling(run: Path, conditions: Iterable[str], to: str) -> dict[str, Any]:
    """Settings that `mm eval RUN --json RUN/results.json` chose for this direction, or none."""
    file, direction = run / "results.json", f"{'_'.join(m for m in conditions if m != to)}_to_{to}"
    if not file.is_file():
        return {}
    try:
        settings = parse_json(file.read_bytes()).get("sampling", {}).get(direction, {})
        return {k: kind(settings[k]) for k, kind in SAMPLING.items() if k in settings}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(
            f"{file}: sampling.{direction} cannot be read ({error}); write it again: mm eval "
            f"{run} --json {file}"
        ) from error


def make_room(out: Path) -> None:
    """Make the folder that a file is to be written into. Raises UserError where it cannot be."""
    if out.is_dir():
        raise UserError(f"-o {out}: is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise UserError(f"-o {out}: cannot be written ({error.strerror})") from error


def numbered_path(out: Path | None, i: int, n: int) -> Path:
    """File of output ``i`` of ``n``.

    ``out`` itself, or ``out_00``, ``out_01`` ... before its suffix.
    """
    assert out is not None
    return out if n == 1 else out.with_name(f"{out.stem}_{i:02d}{out.suffix}")
