"""The report's section on data: configured weights beside what was reached, padding, rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from mm.report.charts import line_chart
from mm.report.curves import shares
from mm.report.folder import Series
from mm.report.read import RunData
from mm.report.start import start
from mm.report.words import facts

SHARES = "data/{}_shares/"


class Share(NamedTuple):
    """One bar: what was reached, and what the config asks for.

    None where it follows a schedule or where nothing was asked for.
    """

    name: str
    reached: float
    wanted: float | None


def data(run: RunData) -> str:
    """Achieved shares of tokens and samples as bars with a mark at the configured weight.

    Before them what the run said at its start; below them their course, the padding share and the
    rejects of the last stage.
    """
    config = _stage_data(run.config)
    sources = [s for s in config.get("sources") or [config.get("source")] if isinstance(s, Mapping)]
    names = [_source_name(s, n) for n, s in enumerate(sources)]
    weights = [s.get("weight", 1.0) for s in sources]
    modality_tokens = config.get("modality_tokens") or {}
    by_tokens = config.get("weights") == "tokens"
    groups = [
        (
            "Tokens by modality",
            _last(run, "token"),
            _shares(modality_tokens),
            "data.modality_tokens" if modality_tokens else "",
        ),
    ]
    if len(sources) > 1:
        wanted = {str(n): w for n, w in _shares(dict(enumerate(weights))).items()}
        # Token shares of modalities override what the weights would give.
        asked = "" if modality_tokens else "the sources' weights"
        groups += [
            (
                f"{unit} by source",
                _last(run, kind),
                wanted if asked and by_tokens == (kind == "source") else {},
                asked if by_tokens == (kind == "source") else "",
            )
            for unit, kind in (("Samples", "sample"), ("Tokens", "source"))
        ]
    bars = ""
    for title, reached, wanted, origin in groups:
        found = [Share(_named(names, k), v, wanted.get(k)) for k, v in reached.items()]
        bars += _bars(title, found, origin)
    padding = run.metrics.get("data/padding_share")
    by_source = _series(run, "sample") if len(sources) > 1 else {}
    drawn = {
        "Padding share": {"padding": padding} if padding else {},
        "Share of tokens so far": shares(_series(run, "token")),
        "Share of samples so far": {_named(names, k): s for k, s in by_source.items()},
    }
    charts = "".join(line_chart(title, s, log=False, low=0) for title, s in drawn.items())
    counts: dict[str, Any] = {}
    if padding and padding.values:
        counts["mean padding share"] = f"{100 * sum(padding.values) / len(padding.values):.1f} %"
    prefix = "data/rejects/"
    counts |= {
        f"samples {k.removeprefix(prefix)} so far": f"{s.values[-1]:,.0f}"
        for k, s in run.metrics.items()
        if k.startswith(prefix)
    }
    body = start(run) + bars + facts(counts)
    return f'{body}<div class="charts">{charts}</div>' if body and charts else body


def _bars(title: str, shares: Sequence[Share], origin: str) -> str:
    """A bar for each share, with a mark at the wanted one.

    One that is off by more than a twentieth of what was asked for is said to be.
    """
    if not shares:
        return ""
    rows = []
    for name, reached, wanted in shares:
        mark = said = ""
        if wanted is not None:
            mark = f'<i class="bar" style="left:{100 * wanted:.1f}%" title="configured"></i>'
            off = abs(reached - wanted) > 0.05 * max(wanted, 1e-9)
            chip = '<span class="chip missed">off</span>' if off else ""
            said = f"configured {100 * wanted:.1f} % {chip}"
        rows.append(
            f'<tr><th>{escape(name)}</th><td class="bars"><div class="meter">'
            f'<span style="width:{100 * min(1.0, reached):.1f}%"></span>{mark}</div></td>'
            f"<td>{100 * reached:.1f} %</td><td>{said}</td></tr>"
        )
    note = f" <small>mark: {escape(origin)}</small>" if origin else ""
    return (
        f"<h3>{escape(title)}{note}</h3>"
        f'<div class="scroll"><table class="facts shares"><tbody>{"".join(rows)}'
        "</tbody></table></div>"
    )


def _stage_data(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data config of the last stage: sums of a run start again with each stage."""
    stages = config.get("stages")
    last = stages[-1] if isinstance(stages, list) and stages else config
    found = last.get("data") if isinstance(last, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _source_name(source: Mapping[str, Any], number: int) -> str:
    """The end of its path, where that tells it from others; with its number in any case."""
    path = str(source.get("path") or "").rstrip("/")
    return f"{number}: {PurePosixPath(path).name}" if path else str(number)


def _named(names: Sequence[str], key: str) -> str:
    """Name of a source's number; a modality is its own name."""
    return names[int(key)] if key.isdigit() and int(key) < len(names) else key


def _shares(weights: Mapping[Any, Any]) -> dict[Any, float]:
    """Constant weights as shares of their sum; {} where one follows a schedule."""
    if not all(isinstance(w, (int, float)) for w in weights.values()):
        return {}
    total = sum(weights.values())
    return {name: w / total for name, w in weights.items()} if total > 0 else {}


def _series(run: RunData, kind: str) -> dict[str, Series]:
    prefix = SHARES.format(kind)
    return {k[len(prefix) :]: s for k, s in run.metrics.items() if k.startswith(prefix)}


def _last(run: RunData, kind: str) -> dict[str, float]:
    return {k: s.values[-1] for k, s in sorted(_series(run, kind).items()) if s.values}
