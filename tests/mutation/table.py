"""The report of a mutation run, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACCEPTED = Path(__file__).with_name("accepted.tsv")


def accepted() -> dict[str, str]:
    """Survivors with the reason why no test need notice them, by key."""
    rows = [line.split("\t") for line in ACCEPTED.read_text().splitlines() if line.strip()]
    return {key: reason for key, reason in rows}


def report(rows: Sequence[dict[str, Any]], every: Sequence[Any]) -> str:
    """Shares in all, by module and by operator; then every survivor.

    ``rows`` are results, ``every`` the mutants that there are, covered by a test or not.
    """
    known = accepted()
    caught = sum(row["caught"] for row in rows)
    fine = sum(row["key"] in known for row in rows if not row["caught"])
    covered = sum(bool(case.tests) for case in every)
    seconds = sum(row["seconds"] for row in rows) / max(1, len(rows))
    out = [
        f"{caught} of {len(rows)} mutants caught: {caught / max(1, len(rows)):.1%}. "
        f"Without {fine} accepted as no bugs: {caught / max(1, len(rows) - fine):.1%}.",
        f"{seconds:.1f} s a mutant. Of {len(every)} mutants {covered} are on lines that a test "
        "runs in its own process.",
        "",
        *_table("module", rows, known, lambda row: row["key"].split(":")[0]),
        "",
        *_table("operator", rows, known, lambda row: row["operator"]),
        "",
        "Survivors:",
        "",
    ]
    for row in sorted(rows, key=lambda row: row["key"]):
        if not row["caught"]:
            why = known.get(row["key"], f"ran {row['ran']} tests")
            out.append(f"- line {row['line']} `{row['key']}`: {why}")
    return "\n".join(out) + "\n"


def _table(title: str, rows: Sequence[dict[str, Any]], known: dict[str, str], of: Any) -> list[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(of(row), []).append(row)
    out = [f"| {title} | mutants | caught | accepted |", "|---|---:|---:|---:|"]
    for name, group in sorted(groups.items()):
        alive = [row for row in group if not row["caught"]]
        fine = sum(row["key"] in known for row in alive)
        out.append(f"| {name} | {len(group)} | {len(group) - len(alive)} | {fine} |")
    return out
