"""Line charts as inline SVG. Colours are CSS variables: one page for light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from mm.data.modalities.base import table
from mm.report.folder import Series

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 30
POINTS = 280  # a series is averaged into this many columns: more than a screen shows
# Losses in the colour of what they are of; "total" of everything.
LOSSES = {"codec": "audio", "vq": "image"}


class Line(NamedTuple):
    """A series with a look of its own.

    ``colour`` 0..7 (None: by its name), ``dashed``, and a ring around the value at step ``ring``.
    """

    series: Series
    colour: int | None = None
    dashed: bool = False
    ring: float | None = None


def line_chart(
    title: str,
    series: Mapping[str, Series | Line],
    *,
    unit: str = "",
    log: bool | None = None,
    low: float | None = None,
    note: str = "",
) -> str:
    """Return a ``<figure>`` with one line a series, or "" when there is nothing to draw.

    Args:
        title: heading of the figure.
        series: label -> values over steps.
        unit: written behind the values.
        log: logarithmic values; None chooses it when they span more than a factor 100 and are
            positive.
        low: lower end of the value axis at the latest (0 for rates and shares).
        note: a sentence below it.
    """
    lines = {k: s if isinstance(s, Line) else Line(s) for k, s in series.items()}
    lines = {k: line for k, line in lines.items() if line.series.steps}
    drawn = {name: _thin(line.series) for name, line in lines.items()}
    if not drawn:
        return ""
    xs = [x for s in drawn.values() for x in s.steps]
    ys = sorted(y for s in drawn.values() for y in s.values)
    if log is None:
        log = ys[0] > 0 and ys[-1] / ys[max(0, len(ys) // 50)] > 100
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    # One spike of the first steps must not flatten the rest: the axis ends at the 99.5th
    # percentile.
    top, bottom = ys[min(len(ys) - 1, int(len(ys) * 0.995))], ys[0]
    if low is not None and not log:  # a logarithmic axis has no zero
        bottom = min(low, bottom)
    ticks = _log_ticks(bottom, top) if log else _ticks(bottom, top)
    y0, y1 = min(ticks[0], bottom), max(ticks[-1], top)

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        y = min(max(y, y0), y1)
        share = math.log(y / y0) / math.log(y1 / y0) if log else (y - y0) / (y1 - y0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        for t in ticks
    ]
    parts += [
        f'<text class="tick" x="{LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{short(t)}</text>'
        for t in ticks
    ]
    for t in _ticks(x0, x1, 5):
        if x0 <= t <= x1:
            parts.append(
                f'<text class="tick" x="{px(t):.1f}" y="{HEIGHT - 9}" '
                f'text-anchor="middle">{short(t)}</text>'
            )
    legend, data, used = [], [], set()
    for name, s in drawn.items():
        look = lines[name]
        colour = _colour(name, used) if look.colour is None else look.colour
        used.add(colour)
        dashed = " dashed" if look.dashed else ""
        if len(s.steps) == 1:
            mark = (
                f'<circle class="dot s{colour}" cx="{px(s.steps[0]):.1f}" '
                f'cy="{py(s.values[0]):.1f}" r="3.5"/>'
            )
        else:
            points = " ".join(
                f"{px(x):.1f},{py(y):.1f}" for x, y in zip(s.steps, s.values, strict=True)
            )
            mark = f'<polyline class="line s{colour}{dashed}" points="{points}"/>'
        parts.append(mark)
        last = f"{short(s.values[-1])}{unit}"
        ring = ""
        if look.ring in look.series.steps:
            at = look.series.values[look.series.steps.index(look.ring)]
            parts.append(
                f'<circle class="ring s{colour}" cx="{px(look.ring):.1f}" cy="{py(at):.1f}" r="5"/>'
            )
            ring = f" (best {short(at)}{unit} at step {short(look.ring)})"
        legend.append(
            f'<li><i class="s{colour}{dashed}"></i>{escape(name)} <b>{escape(last)}</b>'
            f"{escape(ring)}</li>"
        )
        data.append(
            {
                "n": name,
                "c": colour,
                "x": [round(px(x), 1) for x in s.steps],
                "s": s.steps,
                "y": s.values,
            }
        )
    parts.append(f'<text class="tick" x="2" y="{HEIGHT - 9}">step</text>')
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    payload = escape(json.dumps(data, separators=(",", ":"), default=float), quote=True)
    return (
        f'<figure class="chart" data-series="{payload}" '
        f'data-unit="{escape(unit, quote=True)}"><figcaption>{escape(title)}'
        f"{' <small>log</small>' if log else ''}</figcaption><ul "
        f'class="legend">{"".join(legend)}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)} over steps">{"".join(parts)}'
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg><div '
        f'class="tip" hidden></div>{below}</figure>'
    )


def short(value: float) -> str:
    """Format an axis or legend number: three significant digits, k and M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _thin(series: Series) -> Series:
    """Average neighbours until at most POINTS are left."""
    n = len(series.steps)
    if n <= POINTS:
        return Series(series.steps, [float(f"{v:.5g}") for v in series.values])
    steps, values = [], []
    for i in range(POINTS):
        a, b = i * n // POINTS, (i + 1) * n // POINTS
        steps.append(series.steps[b - 1])
        values.append(float(f"{sum(series.values[a:b]) / (b - a):.5g}"))
    return Series(steps, values)


def _colour(name: str, used: set[int]) -> int:
    stem = name.split("/")[-1].split("_")[0].split(" ")[0]
    # A modality has the same colour in every chart of the page.
    wanted = 0 if stem == "total" else table().colours.get(LOSSES.get(stem, stem))
    if wanted is not None and wanted not in used:
        return wanted
    return next((c for c in (1, 2, 3, 4, 5, 6, 7, 0) if c not in used), 7)


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover ``low`` to ``high``."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= raw), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, (last - first) // 5)
    return [10.0**e for e in range(first, last + 1, every)]
