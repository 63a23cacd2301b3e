"""Curves of a training: its losses, what it reached on held-out data, speed, and its events."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from mm.report.charts import Line, line_chart, short
from mm.report.figures import PREFIX
from mm.report.folder import Series
from mm.report.read import RunData
from mm.report.words import as_text, pretty, spread

HELD_OUT = "val/"
# Endings of figures that stand beside another one and are no curve of their own.
BESIDE = ("_chance", "_n", "_bar", "_tokens", "_bytes", "_nats_per_token")
MAX_EVENTS = 20
MAX_LAYERS = 8  # lines of a chart: the first, the last and some between


def curves(run: RunData) -> str:
    """Losses, throughput, learning rate, gradient norm, codebook usage, and each task over time."""
    m = run.metrics
    targets, tokens = (
        {
            name.removesuffix("_share"): s
            for name, s in below(run, place).items()
            if name.endswith("_share")
        }
        for place in ("targets/", "tokens/")
    )
    rate = {k: s for k, s in below(run, "perf/").items() if k.endswith("per_second")}
    bits = {
        name.removeprefix("bits_per_byte").strip("/_") or "all": s
        for name, s in m.items()
        if name.startswith("bits_per_byte")
    }
    drawn = held_out(run)
    measured = {n for n in bits if f"{HELD_OUT}{n}/bits_per_byte" in m}
    loss, note = losses(run)
    seconds = {
        name: m[key]
        for key, name in (("perf/step_seconds", "step"), ("data/wait_seconds", "waiting for data"))
        if key in m
    }
    optim = below(run, "optim/")
    charts = [
        line_chart("Loss per modality" if len(loss) > 1 else "Loss", loss, note=note),
        *drawn,
        line_chart(
            "Bits per byte of the training data",
            {k: s for k, s in bits.items() if k not in measured},
        ),
        *_tasks(run),
        line_chart(
            "Tokens per second" if "tokens_per_second" in rate else "Throughput",
            {pretty(k): s for k, s in rate.items()},
            low=0,
        ),
        line_chart(
            "Learning rate",
            {k: s for k, s in optim.items() if k.startswith("lr")},
            log=False,
            low=0,
        ),
        line_chart(
            "Gradient norm", {k: s for k, s in optim.items() if k.startswith("grad_norm")}, low=0
        ),
        line_chart("Codebook usage", usage(run), log=False, low=0),
        line_chart(
            "Codebook perplexity",
            {k: s for k, s in below(run, "codebook/").items() if "perplexity" in k},
            low=0,
        ),
        line_chart("Share of target tokens", shares(targets), log=False, low=0),
        line_chart("Share of tokens", shares(tokens), log=False, low=0),
        line_chart("Accuracy of the next token", below(run, "accuracy/"), log=False, low=0),
        line_chart("Gradient norm in the tables", below(run, "grad/"), low=0),
        line_chart("Seconds of a step", seconds, unit=" s"),
        line_chart("Seconds of its parts", below(run, "time/"), unit=" s", low=0),
        *layers(run),
    ]
    body = f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    return body + events(run)


def shares(of: Mapping[str, Series]) -> Mapping[str, Series]:
    """Lines of shares; none where all is one thing's."""
    return of if len(of) > 1 else {}


def below(run: RunData, prefix: str) -> dict[str, Series]:
    """Metrics whose name begins with ``prefix``, without it."""
    return {n.removeprefix(prefix): s for n, s in run.metrics.items() if n.startswith(prefix)}


def losses(run: RunData) -> tuple[dict[str, Series | Line], str]:
    """Training losses, and a sentence on what the total is when it is no plain mean of them."""
    loss: dict[str, Series | Line] = dict(below(run, "loss/"))
    total = run.metrics.get("loss/total")
    parts = {k: s for k, s in below(run, "loss/").items() if k != "total"}
    if total is None or not parts:
        return loss, ""
    if len(parts) == 1:
        (only,) = parts.values()
        if len(only.values) == len(total.values) and all(map(_close, only.values, total.values)):
            return dict(parts), ""  # a total of one loss is that loss: drawn once
    objective = run.stages[-1].get("objective") if run.stages else None
    objective = objective if isinstance(objective, Mapping) else {}
    weights = {**_numbers(objective.get("weights")), **_numbers(objective.get("aux_weights"))}
    weights = {k: w for k, w in weights.items() if k in parts and w != 1}
    if not weights:
        return loss, ""
    by_tokens = objective.get("balance", "tokens") == "tokens"
    note = f"The total counts {', '.join(f'{k} {short(w)} times' for k, w in weights.items())}"
    note += ", and each modality by its share of the tokens" if by_tokens else ""
    plain = _per_token(run, parts)
    if plain is None:
        return loss, note + "."
    loss["per token"] = Line(plain, colour=0, dashed=True)
    return loss, note + "; dashed: the mean of a token, without these weights."


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)  # one is summed in another order


def _per_token(run: RunData, parts: Mapping[str, Series]) -> Series | None:
    """Mean loss of a token over all modalities, at the steps where all is known."""
    get = run.metrics.get
    shares = {k: get(f"targets/{k}_share") or get(f"tokens/{k}_share") for k in parts}
    known = {k: (parts[k], share) for k, share in shares.items() if share is not None}
    if len(known) < 2:
        return None
    values = {
        k: (dict(zip(a.steps, a.values, strict=True)), dict(zip(b.steps, b.values, strict=True)))
        for k, (a, b) in known.items()
    }
    steps, means = [], []
    for step in run.metrics["loss/total"].steps:
        here = [(a[step], b[step]) for a, b in values.values() if step in a and step in b]
        tokens = sum(share for _, share in here)
        if tokens > 0:
            steps.append(step)
            means.append(sum(loss * share for loss, share in here) / tokens)
    return Series(steps, means) if steps else None


def best_step(run: RunData) -> float | None:
    """The step of the lowest held-out loss of the last stage; None where there is none."""
    series = run.metrics.get(f"{HELD_OUT}loss")
    if series is None:
        return None
    budgets = [stage.get("budget") for stage in run.stages[:-1]]
    begin = sum(b.get("steps", 0) for b in budgets if isinstance(b, Mapping))
    here = [(v, s) for s, v in zip(series.steps, series.values, strict=True) if s > begin]
    # A stage that ended early begins the next one before its budget: then all steps compare.
    return min(here or zip(series.values, series.steps, strict=True))[1]


def held_out(run: RunData) -> list[str]:
    """Held-out losses beside the training's: chance dashed, the best step ringed.

    Bits per byte where they are known, else nats a token; one chart a modality, and the total.
    """
    best, charts = best_step(run), []
    found = below(run, HELD_OUT)
    if "loss" in found:
        lines = {
            "training": _faint(run.metrics.get("loss/total")),
            "held out": Line(found["loss"], colour=1, ring=best),
        }
        charts.append(line_chart("Total loss, held out", _drawn(lines)))
    for name in dict.fromkeys(k.rpartition("/")[0] for k in found if "/" in k):
        for figure, ours, title in (
            ("bits_per_byte", f"bits_per_byte/{name}", f"Bits per byte of {name}, held out"),
            ("loss", f"loss/{name}", f"Loss of {name}, held out"),
        ):
            series = found.get(f"{name}/{figure}")
            if series is None:
                continue
            chance = found.get(f"{name}/{figure}_chance")
            lines = {
                "training": _faint(run.metrics.get(ours)),
                name: Line(series, ring=best),
                "chance": Line(chance, colour=0, dashed=True) if chance else None,
            }
            worse = chance is not None and series.values[-1] > chance.values[-1]
            note = "At the end it is worse than chance: guessing would do better." if worse else ""
            charts.append(line_chart(title, _drawn(lines), note=note))
            break
    return charts


def _faint(series: Series | None) -> Line | None:
    return Line(series, colour=8) if series else None


def _drawn(lines: Mapping[str, Line | None]) -> dict[str, Line]:
    return {name: line for name, line in lines.items() if line is not None}


def _tasks(run: RunData) -> list[str]:
    """A chart of each figure that a task measured more than once, its chance dashed."""
    charts = []
    measured = below(run, PREFIX)
    for name, series in measured.items():
        if len(series.steps) < 2 or name.endswith(BESIDE):
            continue
        task, _, figure = name.rpartition("/")
        stem = figure.removesuffix("_accuracy")
        chance = measured.get(f"{task}/{stem}_chance")
        lines: dict[str, Line | None] = {
            "held out": Line(series, colour=1),
            "chance": Line(chance, colour=0, dashed=True) if chance else None,
        }
        title = f"{pretty(figure)} ({task})" if task else pretty(figure)
        charts.append(line_chart(title, _drawn(lines), log=False, low=0))
    return charts


def layers(run: RunData) -> list[str]:
    """A chart of each figure that was taken layer by layer (callback `layers`)."""
    found: dict[str, dict[str, Series | Line]] = {}
    for name, series in below(run, "layers/").items():
        path, _, figure = name.rpartition("/")
        found.setdefault(figure, {})[path] = series
    return [
        line_chart(f"{pretty(figure)} by layer", dict(spread(list(lines.items()), MAX_LAYERS)))
        for figure, lines in sorted(found.items())
    ]


def usage(run: RunData) -> dict[str, Series]:
    """Codebook usage of this run, and of the tokenizer runs below it by modality."""
    own = {k: s for k, s in below(run, "codebook/").items() if "usage" in k}
    for modality, part in run.tokenizers.items():
        for key, series in usage(part).items():
            inner = key.removeprefix("usage").strip("_/")
            own[f"{modality} {inner}".strip()] = series
    return own


def events(run: RunData) -> str:
    """What happened besides: spikes, returns to a checkpoint, alarms of the held-out loss."""
    rows = []
    for event in run.events[-MAX_EVENTS:]:
        rest = {k: v for k, v in event.items() if k not in ("step", "event", "why", "time")}
        told = [str(event.get("why") or "")]
        told += [f"{k} {text}" for k, v in rest.items() if (text := as_text(v)) is not None]
        what = escape("; ".join(filter(None, told))[:400])
        step, kind = escape(as_text(event.get("step")) or "–"), escape(str(event.get("event", "")))
        rows.append(f"<tr><th>step {step}</th><td><b>{kind}</b> {what}</td></tr>")
    if not rows:
        return ""
    more = len(run.events) - len(rows)
    left_out = f"<p class='note'>{more} earlier ones in events.jsonl.</p>" if more else ""
    return (
        '<h3>Events</h3><div class="scroll"><table class="facts"><tbody>'
        f"{''.join(rows)}</tbody></table></div>{left_out}"
    )


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    return {str(k): v for k, v in values.items() if type(v) in (int, float)}
