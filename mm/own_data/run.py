"""Run the commands of a folder that `mm init` wrote, in order; what is done is skipped."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.shards.manifest import MANIFEST
from mm.errors import UserError
from mm.own_data.write import COMMANDS
from mm.quickstart.steps import Steps
from mm.reading import parse_json

DONE = "done.json"  # command -> digest of what it was given
PLACES = ("--out", "--json")  # of what a command makes


def run(folder: Path, again: str = "", just_run: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Run what ``folder/run.sh`` says, and return the run folder.

    A command is done when it ended well before, its line and its YAML are as they were, what it
    made is there, and no command before it has done anything. `mm data pack` is always asked: it
    looks whether its source has changed.

    Args:
        again: words after ``mm`` of what the user calls after a failure; default: run FOLDER.
        just_run: commands of the file that this call has run already, with their seconds.
    Raises:
        UserError: no such file, a line that is no command of `mm`, or a command that failed.
    """
    lines = read_commands(folder / COMMANDS)
    home = run_folder(lines, folder)
    home.mkdir(parents=True, exist_ok=True)
    steps = Steps(home, again or f"run {folder}")
    done: dict[str, str] = read_json(folder / DONE)
    seconds = {old["command"]: old["seconds"] for old in read_json(home / "commands.json") or ()}
    fresh = {each["command"]: each["seconds"] for each in just_run}
    anew = False
    for words in lines:
        line = shlex.join(["mm", *words])
        packs = words[:2] == ["data", "pack"]
        if line in fresh:
            steps.record(line, fresh[line])
            done[line] = digest(words)
            continue
        if not anew and not packs and done.get(line) == digest(words) and _is_there(words):
            steps.echo(line)
            steps.console.print("done already")
            steps.record(line, seconds.get(line, 0.0))
            continue
        before = _manifest(words)
        steps.run(*words)
        anew = anew or not packs or _manifest(words) != before
        done[line] = digest(words)
        (folder / DONE).write_text(json.dumps(done, indent=1), encoding="utf-8")
    return home


def read_commands(file: Path) -> list[list[str]]:
    """Words after ``mm`` of every line of a script.

    Raises UserError naming the file and the line of anything else.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; make it with: mm init SRC --out {file.parent}")
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        words = shlex.split(line, comments=True)
        if not words or words[0] == "set":
            continue
        if words[0] != "mm":
            raise UserError(
                f"{file}:{number}: '{words[0]}' is no command of mm; mm run runs only those: "
                f"bash {file}"
            )
        out.append(words[1:])
    if not out:
        raise UserError(f"{file}: no command; make it anew with: mm init SRC --out {file.parent}")
    return out


def run_folder(lines: Sequence[Sequence[str]], folder: Path) -> Path:
    """The folder that the script's `mm train` writes."""
    from mm.run import Run

    for words in lines:
        if words[:1] == ["train"]:
            return Run.load(words[1], [word for word in words[2:] if "=" in word]).folder
    return folder / "runs" / "first"


def digest(words: Sequence[str]) -> str:
    """Of the files that a command names and that are not its own results."""
    given = hashlib.sha256()
    for word in words:
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            given.update(Path(word).read_bytes())
    return given.hexdigest()


def _manifest(words: Sequence[str]) -> bytes:
    file = Path(words[words.index("--out") + 1], MANIFEST) if "--out" in words else Path()
    return file.read_bytes() if file.is_file() else b""


def _is_there(words: Sequence[str]) -> bool:
    made = [Path(words[i + 1]) for i, word in enumerate(words[:-1]) if word in PLACES]
    return all(path.exists() for path in made)


def read_json(file: Path) -> Any:
    """What a file holds; an empty mapping where there is none."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
