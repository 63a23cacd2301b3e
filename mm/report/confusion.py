"""A confusion matrix as a heat map."""

from __future__ import annotations

from html import escape
from typing import Any

CELL, SMALL, NUMBERED, MOST = 26, 12, 16, 60  # pixels of a cell; classes up to which each holds
LETTER = 6.3  # pixels of a letter of a label
NONE = "none"
WORST = 4


def heat_map(title: str, counts: Any, classes: Any) -> str:
    """Return a ``<figure>``: a row a true class, a column an answer, the last one for no class.

    Args:
        counts: (C, C + 1) or (C, C) counts.
        classes: C names.
    Returns:
        "" when these are no matrix. Of more than 60 classes only what was mixed up most.
    """
    if not _fits(counts, classes):
        return ""
    names = [str(name) for name in classes]
    answers = [*names, NONE][: len(counts[0])]
    total = sum(map(sum, counts))
    right = sum(row[i] for i, row in enumerate(counts))
    mixed = sorted(
        ((n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j),
        reverse=True,
    )[:WORST]
    worst = " · ".join(f"{names[i]} → {answers[j]} {n:,}" for n, i, j in mixed)
    said = f"Most often mixed up: {worst}." if worst else "Nothing was mixed up."
    drawn = _svg(title, counts, names, answers) if len(names) <= MOST else ""
    return (
        f'<figure class="confusion"><figcaption>{escape(title)} <small>{right:,} of {total:,} '
        f'right</small></figcaption>{drawn}<p class="note">{escape(said)}</p></figure>'
    )


def _svg(title: str, counts: list[list[int]], names: list[str], answers: list[str]) -> str:
    cell = CELL if len(names) <= NUMBERED else SMALL
    longest, above = (max(len(_cut(name)) for name in of) for of in (names, answers))
    left, top = LETTER * longest + 12, 0.72 * LETTER * above + 16
    gap = 6  # before the answers that are no class
    at = lambda j: left + j * cell + (gap if j == len(names) else 0)
    out = []
    for j, name in enumerate(answers):
        x = at(j) + cell / 2
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{top - 6:.1f}" '
            f'transform="rotate(-45 {x:.1f} {top - 6:.1f})">{escape(_cut(name))}</text>'
        )
    for i, row in enumerate(counts):
        y, of = top + i * cell, sum(row)
        out.append(
            f'<text class="tick" x="{left - 8:.1f}" y="{y + cell / 2 + 4:.1f}" '
            f'text-anchor="end">{escape(_cut(names[i]))}</text>'
        )
        for j, n in enumerate(row):
            share = n / of if of else 0.0
            kind = " right" if i == j else ""
            says = f"{names[i]} answered as {answers[j]}: {n:,} of {of:,}"
            out.append(
                f'<g><title>{escape(says)}</title><rect class="cell{kind}" x="{at(j):.1f}" '
                f'y="{y:.1f}" width="{cell - 1}" height="{cell - 1}" rx="2" '
                f'style="--share:{share:.3f}"/>'
            )
            if n and cell == CELL:
                dark = " dark" if share > 0.55 else ""
                out.append(
                    f'<text class="count{dark}" x="{at(j) + cell / 2 - 0.5:.1f}" '
                    f'y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{n}</text>'
                )
            out.append("</g>")
    width = at(len(answers) - 1) + cell + 0.72 * LETTER * len(_cut(answers[-1])) + 4
    height = top + len(names) * cell + 2
    return (
        f'<div class="scroll"><svg width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="confusion of {escape(title, quote=True)}">{"".join(out)}</svg></div>'
    )


def _cut(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _fits(counts: Any, classes: Any) -> bool:
    if not (isinstance(counts, list) and isinstance(classes, list)):
        return False
    if not classes or len(counts) != len(classes):
        return False
    return all(
        isinstance(row, list)
        and len(row) == len(counts[0]) in (len(classes), len(classes) + 1)
        and all(isinstance(n, int) and 0 <= n < 10**12 for n in row)
        for row in counts
    )
