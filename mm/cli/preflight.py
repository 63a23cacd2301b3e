"""The table of the preflight, of `mm doctor --nodes` and of `mm launch`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from mm.cli.common import console, existing_config, overrides, run_config, table
from mm.errors import UserError

STYLE = {"OK": "green", "WARN": "yellow", "FIX": "bold red"}


def check_hosts(
    nodes: str, config: str | None, changes: Sequence[str] | None, cluster: str | None
) -> Any:
    """Check the hosts of a hostfile, or the first N of the cluster's. Raises UserError."""
    from mm.launch import start
    from mm.run import Run

    if config is not None and "=" in config and not Path(config).exists():
        config, changes = None, [config, *(changes or ())]
    words = overrides(changes)
    own = [word.removeprefix("cluster.") for word in words if word.startswith("cluster.")]
    rest = [word for word in words if not word.startswith("cluster.")]
    count = int(nodes) if nodes.isdigit() else None
    if count is None:
        own.append(f"hostfile={nodes}")
    launcher = start.cluster("ssh", cluster, own, count)
    job = None
    if config is not None:
        path = str(run_config(Path(config))) if Path(config).is_dir() else existing_config(config)
        run = Run.load(path, rest)
        job = start.job(run, path, rest, launcher.forward, Path.cwd())
    return start.preflight(launcher, job)


def pass_preflight(launcher: Any, job: Any) -> None:
    """Check the hosts of a job before it is started. Raises UserError where one is not fit."""
    from mm.launch import start

    report = start.preflight(launcher, job)
    if all(row.light == "OK" for row in report.rows):
        said = f"preflight: {report.hosts} hosts are fine, {report.seconds:.1f} s"
        console().print(said, markup=False)
        return
    show(report)
    if report.to_mend:
        raise UserError(
            f"preflight: {len(report.to_mend)} to mend, see above; to start all the same: "
            "--no-preflight"
        )


def show(report: Any) -> None:
    """Print the table, and under it the command of everything that is to be mended."""
    rows = [(r.check, r.host, Text(r.light, STYLE[r.light]), r.found) for r in report.rows]
    title = f"preflight of {report.hosts} hosts, {report.seconds:.1f} s"
    table(title, ("check", "host", "", "found"), rows, left=4)
    for row in report.rows:
        if row.mend:
            line = f"{row.light}: {row.check}, {row.host}: {row.mend}"
            console().print(line, style=STYLE[row.light], markup=False)


def as_values(report: Any) -> dict[str, Any]:
    """The report as JSON."""
    rows = [row._asdict() for row in report.rows]
    return {"hosts": report.hosts, "seconds": report.seconds, "rows": rows}
