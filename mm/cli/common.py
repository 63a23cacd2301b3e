"""What the commands share: output as a table and as JSON, overrides, reading prompts.

No torch here.
"""

from __future__ import annotations

import errno
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mm.errors import UserError, did_you_mean

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write what is printed as JSON.", dir_okay=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides: a.b=c or --a.b c.", show_default=False),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Import the Python modules that the folder's config names (imports:)."
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="auto (the best there is), cpu, cuda or cuda:N."),
]
PASS_OVERRIDES = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


def with_options(
    command: Callable[..., None], options: Mapping[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """A command whose ``**rest`` takes these options: name -> (annotation, default)."""
    parameters: list[inspect.Parameter] = []
    for p in inspect.signature(command, eval_str=True).parameters.values():
        if p.kind is p.VAR_KEYWORD:
            parameters += [
                inspect.Parameter(name, p.KEYWORD_ONLY, default=default, annotation=annotation)
                for name, (annotation, default) in options.items()
            ]
        else:
            parameters.append(p.replace(kind=p.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        command(**given)

    made: Any = run
    made.__name__, made.__signature__ = command.__name__, inspect.Signature(parameters)
    made.__annotations__ = {p.name: p.annotation for p in parameters}
    return made


def console() -> Console:
    """A console on stdout that looks up the stream when called, so that a captured one is used."""
    return Console(highlight=False, soft_wrap=True)


def is_main() -> bool:
    """True on the process that may print (rank 0 under torchrun, or a single process)."""
    return os.environ.get("RANK", "0") == "0"


def overrides(words: Iterable[str] | None) -> list[str]:
    """Normalise ``a.b=c``, ``--a.b=c`` and ``--a.b c`` to ``a.b=c``.

    Raises UserError on a lone word.
    """
    out: list[str] = []
    pending: str | None = None
    for word in words or ():
        if pending is not None:
            out.append(f"{pending}={word}")
            pending = None
        elif "=" in word:
            out.append(word.removeprefix("--"))
        elif word.startswith("--") and len(word) > 2:
            pending = word[2:]
        else:
            raise UserError(f"'{word}' is neither an option nor an override key.sub=value")
    if pending is not None:
        raise UserError(
            f"'--{pending}' has no value: write {pending}=VALUE, or see --help for the options"
        )
    return out


def plain(value: Any) -> Any:
    """Convert to what JSON can hold: NumPy and torch scalars, arrays, paths, tuples.

    A non-finite number becomes null.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def write_json(file: Path | None, value: Any) -> None:
    """Write ``value`` to ``file`` (nothing when None), whole or not at all.

    Raises UserError when it cannot be written.
    """
    if file is None or not is_main():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(
            json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        part.replace(file)
    except OSError as error:
        raise UserError(f"--json {file}: {error.strerror}") from error


def number(value: Any) -> str:
    """Format a figure for people: four significant digits, no trailing zeros."""
    value = plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1
) -> None:
    """Print one table on the main process; its first ``left`` columns are text, then numbers.

    Where the terminal is too narrow, a row is its first cell and, on the next line, the others by
    name: no name is broken in two.
    """
    if not is_main():
        return
    rows = [[cell if isinstance(cell, Text) else Text(number(cell)) for cell in r] for r in rows]
    out = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        out.add_column(name, overflow="fold", justify="left" if i < left else "right")
    for row in rows:
        out.add_row(*row)  # Text: a caption or path that holds [brackets] is no markup
    to = console()
    if Measurement.get(to, to.options.update(max_width=10**4), out).maximum <= to.width:
        to.print(out)
        return
    to.print(Text(title, "bold"))
    for first, *others in rows:
        named = zip(columns[1:], others, strict=False)
        said = [Text.assemble(f"{n} " if n else "", c) for n, c in named if c.plain not in "–"]
        to.print(first)
        to.print(Text("  ") + Text(", ").join(said))


def flatten(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to ``{"a.b": value}``; other values stay as they are."""
    out: dict[str, Any] = {}
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{name}.")
        else:
            out[name] = value
    return out


def figures(title: str, values: Mapping[str, Any]) -> None:
    """Print ``{name: value}``, nested or not, as a table of two columns."""
    rows = [(name, value) for name, value in flatten(plain(values)).items() if not _long(value)]
    table(title, ("figure", "value"), rows)


def _long(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 8  # curves and histograms: --json has them


def existing(path: Path, what: str, mend: str) -> Path:
    """Return ``path`` if it is there. Raises UserError with the command that makes it."""
    if not path.exists():
        raise UserError(f"{path}: no such {what}; {mend}")
    return path


def existing_config(given: str) -> str:
    """Return the name of a YAML that is there. Raises UserError with those that can be trained."""
    from mm import config

    try:
        config.find(given)
    except UserError:
        shipped = sorted(f"configs/{name}" for name in config.trainable())
        hint = did_you_mean(given, shipped)
        raise UserError(f"{given}: no such file{hint.replace('; known:', '; shipped:')}") from None
    return given


def run_config(folder: Path) -> Path:
    """The resolved config of a run folder. Raises UserError when it is not one."""
    existing(folder, "run folder", "make one with: mm train CONFIG")
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"{folder}: no config.yaml, so not a run folder; make one with: mm train CONFIG"
        )
    return file


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
