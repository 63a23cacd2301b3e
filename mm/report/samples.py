"""What the fixed prompts gave over time, each beside its own picture, sound or words."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from mm.data.modalities.base import table
from mm.report import media
from mm.report.folder import Sampled
from mm.report.read import RunData
from mm.report.words import pretty, spread

MAX_STEPS, MAX_PROMPTS = 6, 16


def samples(run: RunData) -> str:
    """A row a prompt, a column a step, evenly spread with the first and the last."""
    if not run.samples:
        return ""
    shown = run.samples[:MAX_PROMPTS]
    every = sorted({step for one in shown for step in one.files})
    steps = spread(every, MAX_STEPS)
    head = "".join(f"<th>step {step:,}</th>" for step in steps)
    body = []
    for one in shown:
        cells = "".join(f"<td>{_cell(one.files.get(step, []))}</td>" for step in steps)
        body.append(f"<tr><th>{prompt(one)}</th>{cells}</tr>")
    left_out = [
        f"{len(some)} of {len(all_)} {what}"
        for what, some, all_ in (("prompts", shown, run.samples), ("steps", steps, every))
        if len(some) < len(all_)
    ]
    note = f"<p class='note'>{', '.join(left_out)}: all in samples/.</p>" if left_out else ""
    return (
        '<div class="scroll"><table class="samples"><thead><tr><th>prompt</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{note}"
    )


def _cell(files: list[Path]) -> str:
    return "".join(media.figure(file, small=True) for file in files) or "–"


def prompt(one: Sampled) -> str:
    """The prompt itself and what was asked of it; of an older run the name of its files."""
    if one.prompt is None:
        return escape(_by_name(one.name))
    parts = []
    for value in one.prompt.values():
        if isinstance(value, Path):
            parts.append(media.figure(value, small=True))
        else:
            cut = f"{value[:300]}…" if len(value) > 300 else value
            parts.append(f"<blockquote>{escape(cut)}</blockquote>")
    given = " + ".join(one.prompt) or "nothing"
    asked = f"{given} → {one.to}" if one.to else given
    return f'<small>{escape(asked)}</small><div class="media">{"".join(parts)}</div>'


def _by_name(stem: str) -> str:
    """``00_text-seven_to_image`` to ``Text: seven → image``."""
    name = f"({'|'.join(map(re.escape, table().raw))})-"
    words = re.sub(f"^{name}", r"\1: ", re.sub(r"^\d+_", "", stem))
    return pretty(re.sub(f"_{name}", r" + \1: ", words))
