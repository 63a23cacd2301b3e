"""`mm bench`: measure parts of the project on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mm.cli.bench_mup import mup
from mm.cli.common import JsonFile, console, is_main, number, table, write_json
from mm.errors import UserError, did_you_mean
from mm.launch.environment import keep_freed_memory

if TYPE_CHECKING:
    from mm.bench.mixers import Row

app = typer.Typer(no_args_is_help=True, help="Measure parts of the project on this machine.")


app.command()(mup)


@app.callback()
def bench() -> None:
    """Measure parts of the project on this machine."""


@app.command(
    help="Speed, memory, growth and decoding of every mixer and preset, or of those named.\n\n"
    "Forward and backward of one row of T tokens. A mixer whose kernels differ from their "
    "references gets no speed; a cell predicted to take longer than --cell-seconds is skipped. "
    "--json is rewritten after every mixer, so an interrupted run keeps what it has."
)
def mixers(
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A mixer or preset; may be repeated.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Default: 1024 to 65536, doubling.")
    ] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 256,
    linear: Annotated[str, typer.Option(metavar="KIND", help="Kind of the matrices.")] = "dense",
    cell_seconds: Annotated[float, typer.Option(min=0, help="Patience with one cell.")] = 60.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw tokens/s over T.", dir_okay=False),
    ] = None,
) -> None:
    import torch

    from mm.bench import mixers as measure
    from mm.registry import LINEARS

    if linear not in LINEARS:
        raise UserError(f"no linear '{linear}'{did_you_mean(linear, list(LINEARS))}")
    known = measure.names()
    for name in only or ():
        if name not in known:
            raise UserError(f"no mixer or preset '{name}'{did_you_mean(name, known)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; see: mm doctor")
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: cpu or cuda")
    keep_freed_memory()  # as training does
    wanted = parse_lengths(lengths) if lengths else list(measure.LENGTHS)
    run = measure.Bench(wanted, d_model, linear, cell_seconds, torch.device(device))
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    names = list(dict.fromkeys(only)) if only else known
    with Progress(*columns, TimeElapsedColumn(), console=console(), disable=not is_main()) as bar:
        task = bar.add_task("", total=len(names) * len(run.lengths))
        for name in names:
            bar.update(task, description=name)
            rows += run.run(name, lambda: bar.advance(task))
            write_json(json, [row._asdict() for row in rows])
    _print(rows, wanted, run.decode_lengths())
    if plot is not None and is_main():
        measure.plot(rows, plot)
        console().print(f"wrote {plot}")


def parse_lengths(lengths: str) -> list[int]:
    """``"1024,4096"`` to numbers, ascending. Raises UserError on anything else."""
    words = [word.strip().lower() for word in lengths.split(",") if word.strip()]
    try:
        found = sorted({int(w[:-1]) * 1024 if w.endswith("k") else int(w) for w in words})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UserError(f"--lengths {lengths}: positive numbers with commas, as 1024,4096 or 1k,4k")
    return found


def _print(rows: Sequence[Row], lengths: Sequence[int], decode_at: Sequence[int]) -> None:
    """One line a mixer, then what was not measured and why."""
    by_mixer: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_mixer.setdefault(row.mixer, {})[row.length] = row
    speeds, rest = [], []
    for name, cells in by_mixer.items():
        growth = cells[lengths[0]].growth_exponent
        line = (_short(cells[n].tokens_per_second) for n in lengths)
        speeds.append((name, *line, "–" if growth is None else f"{growth:.2f}"))
        longest = next((cells[n] for n in reversed(lengths) if cells[n].peak_mib is not None), None)
        peak = (number(longest.peak_mib), _k(longest.length)) if longest else ("–", "–")
        rest.append((name, *peak, *(x for n in decode_at for x in _decoding(cells[n]))))
    heads = [f"{what} {_k(n)}" for n in decode_at for what in ("µs/token", "state KiB")]
    title = "forward + backward, tokens/s by T, and the power of T that time grows with"
    table(title, ("mixer", *map(_k, lengths), "growth"), speeds)
    table("memory and decoding", ("mixer", "peak MiB", "at T", *heads), rest)
    said: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.note:
            said.setdefault((row.mixer, row.note), []).append(row.length)
    for (name, note), places in said.items():
        where = "" if len(places) == len(lengths) else f" {', '.join(map(_k, places))}"
        if is_main():
            console().print(f"{name}{where}: {note}", markup=False)


def _decoding(row: Row) -> tuple[str, str]:
    size = None if row.state_bytes is None else row.state_bytes / 1024
    return ("–" if row.decode_us is None else f"{row.decode_us:,.0f}", number(size))


def _k(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _short(value: float | None) -> str:
    """Three digits and k or M, so that a line of seven fits a screen."""
    if value is None:
        return "–"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
