"""Write a plan into a folder: YAML with reasons as comments, and the commands as a shell script."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mm.errors import UserError
from mm.own_data.plan import Plan, to_yaml

COMMANDS = "run.sh"


class Written(NamedTuple):
    """Files that were written, and those that stood there and were kept."""

    new: tuple[Path, ...]
    kept: tuple[Path, ...]


def write(plan: Plan, out: Path, command: str, *, force: bool = False) -> Written:
    """Write the files of a plan; one that is there is kept, as it may have been edited.

    Args:
        out: folder of all of it.
        command: the command that made the plan, for the heads of the files.
        force: replace the files that are there.
    Raises:
        UserError: the files that are there are another command's; nothing was written.
    """
    by = f"Written by: {command}"
    head = f"{by}\nEvery key may be changed. All of them: mm config schema"
    texts = {out / name: to_yaml(values, head) for name, values in plan.configs.items()}
    texts[out / COMMANDS] = script(plan, by, out)
    there = tuple(file for file in texts if file.is_file()) if not force else ()
    for file in there:
        first = next((x for x in file.read_text("utf-8").splitlines() if "Written by" in x), "")
        if first and first != f"# {by}":
            raise UserError(
                f"{file} is there already, {first.removeprefix('# ').lower()}; nothing was "
                f"written. Go on with it: mm run {out}; or replace it: {command} --force"
            )
    new = tuple(file for file in texts if file not in there)
    for file in new:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(texts[file], encoding="utf-8")
        part.replace(file)
    return Written(new, there)


def script(plan: Plan, by: str, out: Path) -> str:
    """The commands, one a line, each under what it is for."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {by}",
        f"# `mm run {out}` runs these lines in order and skips what is done. Change what you like.",
        "set -euo pipefail",
    ]
    for step in plan.steps:
        lines += ["", f"# {step.why}", step.line]
    return "\n".join(lines) + "\n"
