"""`mm`: the command line.

Each command is its own module, imported when it is called; torch only when it runs.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Annotated, Any

import typer
import typer.core

from mm.errors import UserError, did_you_mean
from mm.launch.environment import prepare

COMMANDS = (
    "quickstart",
    "init",
    "run",
    "tokenizer",
    "data",
    "train",
    "finetune",
    "launch",
    "plan",
    "verify",
    "generate",
    "eval",
    "import",
    "export",
    "average",
    "report",
    "explain",
    "sweep",
    "wandb",
    "bench",
    "doctor",
    "env",
    "faults",
    "config",
)

# Read by libraries when they are imported; what the user has set wins. Threads:
# mm/launch/environment.py.
ENVIRONMENT = {
    "WDS_SECURE": "1",  # webdataset opens no pipes and no pickles
    "MPLBACKEND": "Agg",
}


class LazyGroup(typer.core.TyperGroup):
    """A group whose commands are modules ``mm.cli.<name>`` holding an ``app``.

    Typer itself has no lazy groups.
    """

    listing = False

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Import the module of a command. Raises UserError with a suggestion on an unknown name."""
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            raise UserError(f"no command 'mm {cmd_name}'{did_you_mean(cmd_name, COMMANDS)}")
        module = importlib.import_module(f"mm.cli.{cmd_name}")
        # A module with derived options makes them when it is called, not to be listed.
        app = module.full_app() if hasattr(module, "full_app") and not self.listing else module.app
        command = typer.main.get_command(app)
        command.name = cmd_name
        return command

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """List the commands without what they need to run."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from mm import __version__

        typer.echo(f"mm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; understood after any command too.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log what is chosen and why (kernels, precision)."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Raw text, images and audio to one trained, resumed, sampled and measured any-to-any model."""
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("mm").setLevel(level)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    0, 1 (a fault of the program), 2 (of the input), 130 (interrupt).
    """
    debug = "--debug" in arguments or bool(os.environ.get("MM_DEBUG"))
    rest = [argument for argument in arguments if argument != "--debug"]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        prepare()  # before torch is imported
        typer.main.get_command(app)(args=["--debug", *rest] if debug else rest, prog_name="mm")
    except SystemExit as stop:
        code = stop.code
        return code if isinstance(code, int) else 0 if code is None else 1
    except UserError as error:
        if debug:
            raise
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Exception as error:
        if debug:
            raise
        command = " ".join(w if len(w) <= 200 else f"{w[:200]}..." for w in rest)
        _complain(f"{type(error).__name__}: {error}; for the traceback: mm --debug {command}")
        return 1
    return 0


def _complain(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"mm: {message}\n")
    sys.stderr.flush()


def main() -> None:
    """Entry point of the `mm` script."""
    code = run(sys.argv[1:])
    if code == 0:
        return
    sys.exit(code)
