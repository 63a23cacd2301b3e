"""The table of the preflight: of `mm doctor --nodes`, of `mm launch`, and inside a job.

``python -m mm.cli.preflight NODE ADDRESS PORT JSON`` is what a job's script runs on every node.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from mm.cli.common import console, existing_config, overrides, run_config, table
from mm.errors import UserError
from mm.reading import parse_json

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


def inside(node: int, address: str, port: int, told: dict[str, Any]) -> int:
    """Check this node among those of its job; the first one prints. Returns an exit code."""
    from mm.launch.preflight import inside
    from mm.launch.preflight.check import Asked

    home, exclude, wait_s = Path(told.pop("home")), told.pop("exclude"), told.pop("wait_s")
    told["overrides"] = tuple(told["overrides"])
    # common to the nodes of a job, and no other job's: files of that name are written and removed
    nonce = hashlib.sha256(f"{home} {address} {port}".encode()).hexdigest()[:8]
    asked = Asked(rank=node, address=address, port=port, nonce=nonce, **told)
    name = inside.host_name()
    code, report = inside.run(asked, name, exclude or "leave {} out", wait_s)
    if report is not None:
        inside.note(home, report, code or 0)
        show(report)
        if code:
            left = "; to start all the same: --no-preflight"
            sys.stderr.write(f"mm: preflight: {len(report.to_mend)} to mend, see above{left}\n")
    elif code is None:
        where = f"{address}:{inside.meeting_port(asked)}"
        why = "cannot be opened" if node == 0 else "does not answer, the first node asks there"
        left = "another port: cluster.port=N; without these checks: --no-preflight"
        sys.stderr.write(f"mm: {name}: preflight: {where} {why}; {left}\n")
    return 1 if code is None else code


if __name__ == "__main__":
    sys.exit(inside(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), parse_json(sys.argv[4])))
