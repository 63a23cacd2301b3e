"""The sections of the page.

Each takes the run and returns HTML, or "" when the run has nothing for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mm.data.modalities.base import table
from mm.report import media
from mm.report.charts import line_chart, short
from mm.report.read import RunData, Series

LOWER_IS_BETTER = re.compile(r"distance|bits_per|perplexity|loss|error|nats|fertility|wer\b")
WORDS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "stoi": "STOI",
    "sisdr": "SI-SDR",
    "vq": "VQ",
    "si": "SI",
    "sdr": "SDR",
    "db": "dB",
}
BEFORE = ("original", "source", "input", "real", "before", "target", "reference")
AFTER = ("reconstructed", "reconstruction", "decoded", "output", "after", "recon", "rec")
MAX_STEPS, MAX_PROMPTS, MAX_PAIRS = 6, 16, 6


def pretty(name: str) -> str:
    """``image_to_text_accuracy`` to ``image → text accuracy``."""
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


def figures(run: RunData) -> str:
    """Headline figures of results.json, each beside its bar and chance level.

    Beside them stands the judge's own accuracy.
    """
    rows = run.results.get("figures")
    if not isinstance(rows, list):
        return ""
    cards = [_card(row) for row in rows if isinstance(row, Mapping) and "name" in row]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(row: Mapping[str, Any]) -> str:
    unit = str(row.get("unit") or "")
    value, bar, chance, judge = (row.get(key) for key in ("value", "bar", "chance", "judge"))
    lower = (
        row.get("better") == "lower"
        if "better" in row
        else bool(LOWER_IS_BETTER.search(str(row["name"])))
    )
    sign = "≤" if lower else "≥"
    chip = ""
    if isinstance(value, (int, float)) and isinstance(bar, (int, float)):
        met = value <= bar if lower else value >= bar
        said = "bar met" if met else "above the bar" if lower else "below the bar"
        chip = f'<span class="chip {"met" if met else "missed"}">{said}</span>'
    notes = []
    if isinstance(bar, (int, float)):
        notes.append(f"bar {sign} {amount(bar, unit)}")
    if isinstance(chance, (int, float)):
        notes.append(f"chance {amount(chance, unit)}")
    if isinstance(judge, (int, float)):
        notes.append(f"judge on real data {amount(judge, unit)}")
    if isinstance(row.get("n"), int):
        notes.append(f"n = {row['n']:,}")
    meter = ""
    if unit == "share" and isinstance(value, (int, float)):
        marks = "".join(
            f'<i class="{kind}" style="left:{100 * min(1, max(0, mark)):.1f}%" title="{kind}"></i>'
            for kind, mark in (("chance", chance), ("bar", bar), ("judge", judge))
            if isinstance(mark, (int, float))
        )
        meter = (
            '<div class="meter"><span '
            f'style="width:{100 * min(1, max(0, value)):.1f}%"></span>{marks}</div>'
        )
    return (
        f'<div class="card"><h3>{escape(pretty(str(row["name"])))}</h3><p '
        f'class="value">{escape(amount(value, unit))}{chip}</p>'
        f'{meter}<p class="note">{escape(" · ".join(notes))}</p></div>'
    )


def samples(run: RunData) -> str:
    """Samples of the fixed prompts over time: a row a prompt, a column a step."""
    if not run.samples:
        return ""
    steps = _spread(sorted(run.samples), MAX_STEPS)
    rows: dict[str, dict[int, list[Path]]] = {}
    for step in steps:
        for file in run.samples[step]:
            rows.setdefault(_stem(file), {}).setdefault(step, []).append(file)
    head = "".join(f"<th>step {step:,}</th>" for step in steps)
    body = []
    for name in sorted(rows)[:MAX_PROMPTS]:
        shown = [[media.figure(f, small=True) for f in rows[name].get(step, ())] for step in steps]
        cells = "".join(f"<td>{''.join(cell) or '–'}</td>" for cell in shown)
        body.append(f"<tr><th>{escape(_prompt(name))}</th>{cells}</tr>")
    left_out = (
        f"<p>{len(rows) - MAX_PROMPTS} more prompts in the folder samples/.</p>"
        if len(rows) > MAX_PROMPTS
        else ""
    )
    return (
        '<div class="scroll"><table '
        f'class="samples"><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>{left_out}'
    )


def _prompt(stem: str) -> str:
    """``00_text-seven_to_image`` to ``Text: seven → image``."""
    name = f"({'|'.join(map(re.escape, table().raw))})-"
    words = re.sub(f"^{name}", r"\1: ", re.sub(r"^\d+_", "", stem))
    return pretty(re.sub(f"_{name}", r" + \1: ", words))


def _stem(file: Path) -> str:
    return file.name.split(".")[0]


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of ``values``, evenly, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def curves(run: RunData) -> str:
    """Loss per modality, throughput, learning rate, gradient norm and codebook usage.

    Then what else was logged.
    """
    m = run.metrics
    pick: Callable[..., dict[str, Series]] = lambda prefix, cut=None: {
        name.removeprefix(cut if cut is not None else prefix) or name: s
        for name, s in m.items()
        if name.startswith(prefix)
    }
    # A total of one loss is that loss: drawn once.
    loss = pick("loss/")
    if len(loss) == 2 and "total" in loss:
        other = next(s for name, s in loss.items() if name != "total")
        if other.values == loss["total"].values:
            del loss["total"]
    rate = {k: s for k, s in pick("perf/").items() if k.endswith("per_second")}
    waiting = {
        name: m[key]
        for key, name in (("perf/step_seconds", "step"), ("data/wait_seconds", "waiting for data"))
        if key in m
    }
    shares = {
        name.removesuffix("_share"): s
        for name, s in pick("tokens/").items()
        if name.endswith("_share")
    }
    bits = {
        name.removeprefix("bits_per_byte").strip("/_") or "all": s
        for name, s in m.items()
        if "bits_per_byte" in name and "eval" not in name
    }
    charts = [
        line_chart("Loss per modality" if len(loss) > 1 else "Loss", loss),
        line_chart("Bits per byte", bits),
        line_chart(
            "Tokens per second" if "tokens_per_second" in rate else "Throughput",
            {pretty(k): s for k, s in rate.items()},
            low=0,
        ),
        line_chart("Learning rate", pick("optim/lr", "optim/"), log=False, low=0),
        line_chart("Gradient norm", pick("optim/grad_norm", "optim/"), low=0),
        line_chart("Codebook usage", _usage(run), log=False, low=0),
        line_chart(
            "Codebook perplexity",
            {k: s for k, s in pick("codebook/").items() if "perplexity" in k},
            low=0,
        ),
        line_chart("Share of target tokens", shares, log=False, low=0),
        line_chart("Seconds", waiting, unit=" s"),
    ]
    measured = pick("eval/")
    charts += [
        line_chart(pretty(f"evaluation {name}"), {name: s})
        for name, s in measured.items()
        if len(s.steps) > 1
    ]
    # A single value is no curve; results.json has it with its bar and chance, if it is there.
    once = {
        name: s.values[-1] for name, s in measured.items() if len(s.steps) == 1 and not run.results
    }
    table = f"<h3>Evaluation</h3>{facts(once)}" if once else ""
    return f'<div class="charts">{"".join(charts)}</div>{table}' if any(charts) or table else ""


def _usage(run: RunData) -> dict[str, Series]:
    """Codebook usage of this run, and of the tokenizer runs below it by modality."""
    own = {
        k.removeprefix("codebook/"): s
        for k, s in run.metrics.items()
        if k.startswith("codebook/") and "usage" in k
    }
    for modality, part in run.tokenizers.items():
        for key, series in _usage(part).items():
            own[
                modality
                if key == "usage"
                else f"{modality} {key.removeprefix('usage').strip('_/')}"
            ] = series
    return own


def tokenizers(run: RunData) -> str:
    """Each tokenizer run: what `mm tokenizer eval` measured, before/after, and its own curves."""
    out = []
    parts = dict(run.tokenizers)
    if run.reconstructions or run.evaluation:
        parts = {run.name: run, **parts}
    for modality, part in parts.items():
        pairs = reconstructions(part.reconstructions)
        table = facts(part.evaluation)
        drawn = "" if part is run else curves(part)
        more = (
            f"<details><summary>Training curves of this tokenizer ({part.steps:,} "
            f"steps)</summary>{drawn}</details>"
            if drawn
            else ""
        )
        if pairs or table or more:
            out.append(f"<h3>{escape(pretty(modality))}</h3>{_split(pairs, table)}{more}")
    return "".join(out)


def _split(left: str, right: str) -> str:
    return (
        f'<div class="split"><div>{left}</div><div>{right}</div></div>'
        if left and right
        else left or right
    )


def reconstructions(files: Sequence[Path]) -> str:
    """Originals beside what the tokenizer made of them; a file without a partner stands alone."""
    groups: dict[str, dict[str, Path]] = {}
    alone = []
    for file in files:
        words = re.split(r"[_\-. ]", file.stem)
        role = (
            "before"
            if any(w in BEFORE for w in words)
            else "after"
            if any(w in AFTER for w in words)
            else ""
        )
        key = "_".join(w for w in words if w not in BEFORE and w not in AFTER)
        if role:
            groups.setdefault(f"{file.parent.name}/{key}{file.suffix}", {})[role] = file
        else:
            alone.append(file)
    pairs = [
        "".join(media.figure(pair[r], r, small=True) for r in ("before", "after") if r in pair)
        for pair in list(groups.values())[:MAX_PAIRS]
    ]
    pairs = [f'<div class="pair">{pair}</div>' for pair in pairs]
    singles = [media.figure(file, pretty(file.stem)) for file in alone[:MAX_PAIRS]]
    return f'<div class="pairs">{"".join(pairs + singles)}</div>' if pairs or singles else ""


def commands(run: RunData) -> str:
    """The commands that were run, each to copy, with their seconds."""
    rows = []
    known = [
        float(c["seconds"]) for c in run.commands if isinstance(c.get("seconds"), (int, float))
    ]
    longest = max(known, default=0) or 1
    for entry in run.commands:
        seconds = entry.get("seconds")
        timed = isinstance(seconds, (int, float))
        width = 100 * float(seconds) / longest if timed else 0  # type: ignore[arg-type]
        command = escape(str(entry.get("command", "")))
        rows.append(
            f'<li><div class="command"><code>{command}</code>'
            '<button type="button">copy</button></div>'
            f'<div class="time"><span style="width:{width:.1f}%"></span></div>'
            f"<b>{f'{seconds:.1f} s' if timed else '–'}</b></li>"
        )
    total = f"<p class='note'>Together {sum(known):.0f} s.</p>" if len(known) > 1 else ""
    return f'<ol class="commands">{"".join(rows)}</ol>{total}' if rows else ""


def facts(values: Mapping[str, Any]) -> str:
    """A mapping, nested or not, as a table of two columns; long lists are left to the JSON file."""
    rows = []
    for name, value in _flat(values):
        if isinstance(value, float):
            value = short(value)
        elif isinstance(value, bool) or value is None:
            value = {True: "yes", False: "no", None: "–"}[value]
        elif isinstance(value, list):
            if len(value) > 12 or any(isinstance(item, (list, dict)) for item in value):
                continue
            value = ", ".join(short(v) if isinstance(v, float) else str(v) for v in value)
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>")
    return (
        f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'
        if rows
        else ""
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}".replace("_", " "), value))
    return out


def environment(run: RunData) -> str:
    return facts(run.environment)


def config(run: RunData) -> str:
    if not run.config_text.strip():
        return ""
    lines = run.config_text.count("\n")
    return (
        f"<details><summary>config.yaml, {lines} "
        f"lines</summary><pre>{escape(run.config_text)}</pre></details>"
    )


def sampling(run: RunData) -> str:
    """How the samples and the generated figures were drawn, and where the seconds went."""
    chosen = run.results.get("sampling")
    seconds = run.results.get("seconds")
    left = (
        f"<h3>Sampling settings</h3>{facts(chosen)}"
        if isinstance(chosen, Mapping) and chosen
        else ""
    )
    right = f"<h3>Seconds</h3>{facts(seconds)}" if isinstance(seconds, Mapping) and seconds else ""
    return _split(left, right)
