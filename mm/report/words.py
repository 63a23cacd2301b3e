"""Names, numbers and tables as the page writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mm.report.charts import short

WORDS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "stoi": "STOI",
    "sisdr": "SI-SDR",
    "vq": "VQ",
    "si": "SI",
    "sdr": "SDR",
    "db": "dB",
    "lr": "LR",
}
LONGEST = 12  # items of a list that a table shows


def pretty(name: str) -> str:
    """``image_to_text_accuracy`` to ``Image → text accuracy``."""
    words = (
        name.replace("_to_", " → ")
        .replace("/", " · ")
        .replace(".", " · ")
        .replace("_", " ")
        .split(" ")
    )
    text = " ".join(WORDS.get(word.lower(), word) for word in words)
    return text[:1].upper() + text[1:]


def amount(value: Any, unit: str) -> str:
    """Write a value with its unit; a share becomes per cent."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "–"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{short(float(value))} {unit}".strip()


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``10 min 47 s``, ``3 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def as_text(value: Any) -> str | None:
    """A value of a table as text; None of what a table does not show: nothing, or too much."""
    if value is None or value in ("", [], {}):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{str(value)[:12]}…"
    if isinstance(value, float):
        return short(value)
    if isinstance(value, list):
        if len(value) > LONGEST or any(isinstance(item, (list, dict)) for item in value):
            return None
        return ", ".join(as_text(item) or "–" for item in value)
    return str(value)


def facts(values: Mapping[str, Any]) -> str:
    """A mapping, nested or not, as a table of two columns; what is empty is left out."""
    rows = [
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, value in _flat(values)
        if (text := as_text(value)) is not None
    ]
    return _table("facts", rows) if rows else ""


def chips(values: Mapping[str, Any]) -> str:
    """A few facts beside each other, each below its name; what is empty is left out."""
    items = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
        for name, value in _flat(values)
        if (text := as_text(value)) is not None
    ]
    return f'<dl class="chips">{"".join(items)}</dl>' if items else ""


def grid(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """Rows of equal kind as one table: a column for each key that one of them has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    shown = {
        key: [as_text(row.get(key)) for row in rows.values()]
        for key in columns
        if any(as_text(row.get(key)) is not None for row in rows.values())
    }
    if not shown:
        return ""
    head = "".join(f"<th>{escape(key.replace('_', ' '))}</th>" for key in shown)
    body = []
    for i, name in enumerate(rows):
        cells = "".join(f"<td>{escape(column[i] or '–')}</td>" for column in shown.values())
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return _table("grid", body, f"<thead><tr><th>{escape(corner)}</th>{head}</tr></thead>")


def side_by_side(left: str, right: str) -> str:
    """Two parts in columns where the page is wide; one alone takes all of it."""
    if not (left and right):
        return left or right
    return f'<div class="split"><div>{left}</div><div>{right}</div></div>'


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``values``, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _table(kind: str, rows: Sequence[str], head: str = "") -> str:
    return (
        f'<div class="scroll"><table class="{kind}">{head}<tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}".replace("_", " "), value))
    return out
