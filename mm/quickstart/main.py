"""The quickstart: the ordinary commands in order, timed and safe to re-run."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

from mm.quickstart.steps import Steps

DEFAULT_OUT = Path("runs/quickstart")


def quickstart(
    out: str | Path = DEFAULT_OUT,
    *,
    config: str = "configs/quickstart/hybrid.yaml",
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Build data, train tokenizers and backbone, evaluate and report.

    Args:
        out: run folder; everything is written below it.
        config: the backbone's run YAML; ``configs/quickstart/backbone.yaml`` is attention only.
        seed: of all trainings; the data split does not depend on it.
        scale: share of every training budget (CI runs a fraction; figures then mean little).
    Returns:
        the content of ``results.json``.
    Raises:
        UserError: a step failed; running the same command again goes on there.
    """
    from mm import config as configs
    from mm.quickstart.source import make_source

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    steps, start = Steps(out, "quickstart"), time.monotonic()
    data, tokens, tokenizers = out / "data", out / "tokens", out / "tokenizers"

    folder = out / "source"
    source = f"python -m mm.quickstart.source {shlex.quote(str(folder))}"
    steps.echo(source)
    before = time.monotonic()
    counts = make_source(folder)
    steps.console.print(
        "  ".join(
            f"{s}: {c['triples']} image+audio+caption, {c['texts']} texts"
            for s, c in counts.items()
        )
    )
    steps.record(source, time.monotonic() - before)

    steps.run("data", "pack", out / "source" / "manifest.jsonl", "--out", data / "digits")
    steps.run("data", "pack", out / "source" / "text.jsonl", "--out", data / "text")
    steps.run(
        "tokenizer",
        "train",
        "configs/quickstart/text.yaml",
        "--data",
        data / "text",
        "--out",
        tokenizers / "text",
    )
    jobs = []
    for modality in ("image", "audio"):
        file, folder = f"configs/quickstart/{modality}.yaml", tokenizers / modality
        budget = configs.read(file)["stages"][0]["budget"]["steps"]
        n = max(2, round(budget * scale))
        words = ["tokenizer", "train", file, "--data", str(data / "digits"), "--out", str(folder)]
        words += [f"seed={seed}"] * (seed != 0) + [f"stages.0.budget.steps={n}"] * (n != budget)
        jobs.append(([words, _report(folder, data / "digits")], folder, n))
    steps.run_side_by_side(jobs)
    steps.run(*_report(tokenizers / "text", data / "text"))
    # Workers would start torch anew, which takes longer than they save here.
    steps.run(
        "data", "pack", data / "digits", "--tokenizers", tokenizers, "--out", tokens / "digits",
        "--workers", "1",
    )  # fmt: skip
    steps.run(
        "data", "pack", data / "text", "--tokenizers", tokenizers,
        "--vocabulary", tokens / "digits" / "vocabulary.json",
        "--out", tokens / "text", "--workers", "1",
    )  # fmt: skip
    changes = _backbone_changes(configs.read(config), out, seed, scale)
    steps.launch(2, "train", config, *changes)
    steps.launch(2, "eval", out, "--json", out / "results.json")
    results = json.loads((out / "results.json").read_text())
    results["figures"] += _tokenizer_figures(tokenizers)
    results["seconds"]["total"] = round(time.monotonic() - start, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    steps.run("report", out)
    steps.console.print(
        f"\ndone in {time.monotonic() - start:.0f} s; open {out / 'report' / 'index.html'}"
    )
    return results


def _report(tokenizer: Path, shards: Path) -> list[str]:
    """Words of the command that measures a tokenizer on held-out data."""
    return [
        "tokenizer", "eval", str(tokenizer), "--data", str(shards), "--split", "test",
        "--out", str(tokenizer / "eval"), "--json", str(tokenizer / "eval.json"),
    ]  # fmt: skip


def _tokenizer_figures(tokenizers: Path) -> list[dict[str, Any]]:
    """Rows for results.json from what `mm tokenizer eval` wrote, beside their bars."""
    rows: list[dict[str, Any]] = []

    def add(
        modality: str, name: str, value: float, unit: str, bar: float | None = None, **beside: Any
    ) -> None:
        rows.append(
            {
                "name": f"{modality}_tokenizer_{name}",
                "value": value,
                "unit": unit,
                "bar": bar,
                **beside,
            }
        )

    for modality in ("text", "image", "audio"):
        found = json.loads((tokenizers / modality / "eval.json").read_text())
        if modality == "text":
            add(modality, "bytes_per_token", found["bytes_per_token"], "bytes", n=found["items"])
            continue
        usage = found["codebook_usage_share"]
        lowest = min(usage) if isinstance(usage, list) else usage
        if modality == "image":
            add(modality, "psnr_db", found["psnr_db"], "dB", 24.0, n=found["items"])
            add(modality, "codebook_usage_share", lowest, "share", 0.9)
        else:
            ratio = found["mel_distance_ratio"]
            add(modality, "mel_distance_ratio", ratio, "ratio", 0.5, n=found["items"],
                lower_is_better=True)  # fmt: skip
            add(modality, "codebook_usage_share", lowest, "share", 0.5)
    return rows


def _backbone_changes(values: dict[str, Any], out: Path, seed: int, scale: float) -> list[str]:
    """Overrides that move the YAML's paths to ``out`` and set seed and budget."""
    home = str(Path(values.get("out", "runs")) / values["name"])
    changes = []

    def move(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                move(value, f"{path}.{key}" if path else str(key))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                move(value, f"{path}.{i}")
        elif isinstance(node, str) and node.startswith(home + "/"):
            changes.append(f"{path}={out}{node[len(home) :]}")

    if str(out) != home:
        move(values, "")
        changes += [f"name={out.name}", f"out={out.parent}"]
    if seed:
        changes.append(f"seed={seed}")
    budget = values["stages"][0]["budget"]["steps"]
    if scale != 1.0:
        changes.append(f"stages.0.budget.steps={max(2, round(budget * scale))}")
    return changes
