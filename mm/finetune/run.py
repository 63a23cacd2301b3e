"""`mm finetune`: pack, choose, train, measure both models, compare, report; safe to run again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mm.errors import UserError
from mm.finetune.base import open_base
from mm.finetune.choose import Options, config_of
from mm.finetune.compare import BASE, TUNED, compare
from mm.finetune.data import amount_of, read_data
from mm.finetune.fit import fit_device
from mm.finetune.method import candidates
from mm.finetune.prompts import prompts_of
from mm.own_data import run as commands
from mm.own_data.plan import Plan, Step, plain
from mm.own_data.write import COMMANDS, write
from mm.quickstart.steps import Steps

YAML = "finetune.yaml"


class Tuned(NamedTuple):
    """``comparison`` is None where the data hold no raw values and the base no data."""

    folder: Path
    comparison: dict[str, Any] | None


def finetune(
    model: Path,
    data: Path,
    out: Path,
    options: Options = Options(),
    *,
    command: str = "mm finetune",
    trust_code: bool = False,
    show: Callable[[list[tuple[str, str, str, str]]], None] | None = None,
) -> Tuned:
    """Tune a model on data; the same call again goes on where it stopped.

    Args:
        model: a run folder, a saved model, or what `mm import` wrote.
        data: raw files, or packed shards.
        out: run folder of everything that is made.
        command: that made it, for the heads of the files.
        trust_code: import what the config of the base names.
        show: called with (file, key, value, reason) of what was chosen.
    Raises:
        UserError: something that the user can mend; a new folder was not begun, or goes on.
    """
    packed: list[dict[str, Any]] = []
    if not (out / COMMANDS).is_file():
        packed = _choose(model, data, out, options, command, trust_code, show)
    else:
        _require_same(out, command)
    commands.run(out, again=command.removeprefix("mm "), just_run=packed)
    if not (out / BASE).is_file():
        return Tuned(out, None)
    return Tuned(out, compare(out))


def _require_same(out: Path, command: str) -> None:
    lines = (out / COMMANDS).read_text(encoding="utf-8").splitlines()
    by = next((x.removeprefix("# Written by: ") for x in lines if "Written by" in x), "")
    if by != command:
        raise UserError(
            f"{out}: made by: {by}; go on with that command, or name another folder: --out"
        )


def _choose(
    model: Path, data: Path, out: Path, options: Options, command: str, trust_code: bool,
    show: Callable[[list[tuple[str, str, str, str]]], None] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Pack the data, choose a config for them, and write it with its commands.

    Returns the commands that packed, with their seconds.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is no folder; name another")
    if (out / "config.yaml").is_file():
        raise UserError(f"--out {out}: is another run's folder; name a new one")
    base = open_base(model, trust_code=trust_code)
    methods = candidates(base, base.parameters, options.method)  # refuses a wrong name at once
    read = read_data(data, base, out)
    if read.steps:
        out.mkdir(parents=True, exist_ok=True)
    steps = Steps(out, command.removeprefix("mm "))
    for step in read.steps:
        steps.run(*step.words)
    amount = amount_of(read.tokens)
    methods = candidates(base, amount.ids // read.copies, options.method)
    prompts = prompts_of(base, read, amount, out / "prompts")
    config, notes = fit_device(
        methods,
        lambda how: config_of(base, read, amount, out, how, options, prompts),
        options.minutes,
        options.changes,
    )
    words = [Step(("train", str(out / YAML)), "the tuning")]
    if plain(config["stages"][0]["tasks"]):
        of_base = ("eval", str(out), "--model", str(base.model), "--json", str(out / BASE))
        words.append(Step(("eval", str(out), "--json", str(out / TUNED)), "figures of the tuned"))
        words.append(Step(of_base, "the same of the base"))
    words.append(Step(("report", str(out)), "one page of all of it"))
    plan = Plan({YAML: config}, (*read.steps, *words), (*read.notes, *notes))
    if show is not None:
        show(plan.rows())
    write(plan, out, command)
    return steps.done


def command_line(model: Path, data: Path, out: Path, options: Options) -> str:
    """What the user called, options that differ from their defaults alone."""
    words = ["mm", "finetune", "--model", str(model), "--data", str(data), "--out", str(out)]
    default = Options()
    for name in ("method", "minutes", "replay"):
        value = getattr(options, name)
        words += [f"--{name}={value}"] * (value != getattr(default, name))
    return shlex.join([*words, *options.changes])
