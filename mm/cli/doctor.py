"""`mm doctor`: what this machine offers, or whether the hosts of a cluster fit together."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from mm.cli.common import PASS_OVERRIDES, JsonFile, Overrides, console, table, write_json
from mm.cli.preflight import check_hosts, show
from mm.cli.this_machine import examine
from mm.errors import UserError

app = typer.Typer()
STYLE = {"ok": "green", "warning": "yellow", "broken": "bold red"}


@app.command(
    help="Check packages, compiler, CPU, memory, disk and kernels of this machine.\n\n"
    "With --nodes: check the hosts of a cluster before CONFIG is trained there: same code, config "
    "and data, clocks, meeting point, disks, GPUs, bandwidth.\n\nEvery finding comes with the "
    "command that mends it; exit code 1, with --nodes 2, when something will fail.",
    context_settings=PASS_OVERRIDES,
)
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="With --nodes: what is to be trained.")
    ] = None,
    changes: Overrides = None,
    nodes: Annotated[
        str | None,
        typer.Option("--nodes", metavar="HOSTFILE|N", help="Hosts; N: the first of the cluster's."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="FILE", help="Cluster YAML; default: the shipped one."),
    ] = None,
    json: JsonFile = None,
) -> None:
    if nodes is not None:
        report = check_hosts(nodes, config, changes, cluster)
        show(report)
        write_json(json, report.to_dict())
        if report.to_mend:
            raise typer.Exit(2)
        return
    if config is not None:
        raise UserError(f"{config}: which hosts? say: mm doctor {config} --nodes HOSTFILE")
    findings = list(examine())
    rows = [(f.check, f.found, Text(f.light, STYLE[f.light])) for f in findings]
    table("mm doctor", ("check", "found", ""), rows, left=2)
    for f in findings:
        if f.mend:
            console().print(f"{f.light}: {f.check}: {f.mend}", style=STYLE[f.light], markup=False)
    broken = [f for f in findings if f.light == "broken"]
    console().print("everything that is needed is here" if not broken else f"{len(broken)} broken")
    write_json(json, [f._asdict() for f in findings])
    if broken:
        raise typer.Exit(1)
