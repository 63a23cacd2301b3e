"""Pictures of healthy and sick runs for docs/monitoring.md, each from a run that really was sick.

python benchmarks/sick_runs.py [--out docs/images] [--steps 160] [--keep FOLDER]

Small models on the source code of this repository and on coloured waves; some minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("MPLBACKEND", "Agg")

SIDE, TRAIN, VAL = 16, 480, 60


def make_data(root: Path) -> None:
    """``root/{raw,few,leaked}-tokens``, ``root/shards``; both splits of ``leaked`` are the same."""
    import numpy as np
    from PIL import Image

    from mm.data.pack.job import pack
    from mm.faults.bench import Codes

    sources = sorted((Path(__file__).parents[1] / "mm").rglob("*.py"))
    text = "\n".join(file.read_text() for file in sources[:60])
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE

    def sample(folder: Path, i: int, at: int) -> None:
        phase, turns = rng.random(3), rng.integers(1, 4, 2)
        wave = [np.sin(6.28 * (turns[0] * x + turns[1] * y + p)) for p in phase]
        pixels = (127 + 120 * np.stack(wave, -1)).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(text[at : at + 100])

    codes = {"text": Codes("text", 256), "image": Codes("image", 64)}
    for name, n_train in (("raw", TRAIN), ("few", VAL)):
        for i in range(n_train):
            sample(root / name / "train", i, 131 * i)
        for i in range(VAL):
            sample(root / name / "val", i, 131 * (TRAIN + i))
    for file in sorted((root / "few" / "train").iterdir()):  # the leak
        (root / "leaked" / "train").mkdir(parents=True, exist_ok=True)
        (root / "leaked" / "val").mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (root / "leaked" / split / file.name).write_bytes(file.read_bytes())
    for name in ("raw", "few", "leaked"):
        # Equal files in two splits are what this is about: the packer must not mend it.
        pack(root / name, root / f"{name}-tokens", tokenizers=codes, progress=False)
    pack(root / "raw", root / "shards", progress=False)


def language(root: Path, name: str, steps: int, **change: Any) -> dict[str, Any]:
    tokens = root / f"{change.pop('data', 'raw')}-tokens"
    objective = {"kind": "next_token", **change.pop("objective", {})}
    data = {"kind": "packed", "sources": [{"path": str(tokens)}], "seq_len": 128, "batch_size": 8}
    stage = {
        "data": data | change.pop("packed", {}),
        "objective": objective,
        "optimizer": {"kind": "adamw", "lr": change.pop("lr", 3e-3)},
        "schedule": {"warmup": 10},
        "budget": {"steps": steps},
        "eval_every": max(1, steps // 16),
    }
    ffn, mixers = {"kind": "swiglu", "hidden": 128}, {"attention": {"heads": 2}}
    backbone = {"kind": "stack", "pattern": "attention", "mixers": mixers, "ffn": ffn, "depth": 2}
    return {
        "name": name,
        "out": str(root / "runs"),
        "vocabulary": str(tokens / "vocabulary.json"),
        "model": {"kind": "lm", "d_model": 64, "backbone": backbone},
        "stages": [stage],
        "engine": {"zero_stage": 0, "precision": "fp32", "threads": 1, "grad_clip": 1.0} | change,
        "callbacks": [{"kind": "modalities", "every": 5}],
        "checkpoints": {"every": 0},
    }


def tokenizer(root: Path, name: str, steps: int, **quantizer: Any) -> dict[str, Any]:
    data = {"kind": "items", "path": str(root / "shards"), "modality": "image", "size": SIDE}
    stage = {
        "data": data | {"batch_size": 16},
        "objective": {"kind": "vq"},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"warmup": 10},
        "budget": {"steps": steps},
    }
    model = {"kind": "image_vq", "size": SIDE, "channels": 3, "down": [4], "widths": [32]}
    model |= {"blocks": [1], "quantizer": {"kind": "vq", "codebook_size": 256, **quantizer}}
    return {
        "name": name,
        "out": str(root / "runs"),
        "model": model,
        "stages": [stage],
        "engine": {"zero_stage": 0, "precision": "fp32", "threads": 1},
        "checkpoints": {"every": 0},
    }


def train(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; those up to its end where the run is stopped by its guard."""
    from mm.errors import UserError
    from mm.run import Run
    from mm.trainer.log import metrics
    from mm.trainer.loop import Trainer

    run = Run.model_validate(config)
    try:
        Trainer(run).fit()
    except UserError as error:
        print(f"{run.name}: {error}")
    return metrics.read(run.folder / "metrics.jsonl")


def draw(
    file: Path,
    panels: list[tuple[str, list[tuple[str, str, str]]]],
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    """One picture: a panel for each of ``panels``, with lines (run, metric, style) in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 2.6), dpi=90, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for run, metric, style in lines:
            found = [(r["step"], r[metric]) for r in rows[run] if r.get(metric) is not None]
            label = f"{run}: {metric}" if len({m for _, m, _ in lines}) > 1 else run
            axes.plot(*zip(*found, strict=True), style, label=label, lw=1.3)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--only", choices=("rate", "leak", "starved", "codes"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mm-sick-") as temporary:
        root, n = Path(temporary), asked.steps
        make_data(root)
        starved = {"objective": {"weights": {"text": 0.001}}}
        configs = [
            language(root, "healthy", n),
            language(root, "rate too high", n, lr=0.3),
            language(root, "few data", n, data="few"),
            language(root, "leaked data", n, data="leaked"),
            language(root, "starved text", n, **starved),
            tokenizer(root, "healthy codes", n),
            tokenizer(root, "dead codes", n, restart_below=0.0, kmeans_steps=0, normalize="none"),
        ]
        named = lambda c: asked.only is None or (asked.only == "codes") == ("codes" in c["name"])
        rows = {
            c["name"]: train(c | {"name": c["name"].replace(" ", "-")}) for c in configs if named(c)
        }
    pair = lambda sick, key, healthy="healthy": [(healthy, key, "C0"), (sick, key, "C3")]
    pictures: dict[str, list[Any]] = {
        "rate": [
            ("training loss", pair("rate too high", "loss/total")),
            ("gradient norm", pair("rate too high", "optim/grad_norm")),
            ("held-out loss", pair("rate too high", "val/loss")),
        ],
        "leak": [
            (
                "few data, honest split",
                [("few data", "loss/total", "C0"), ("few data", "val/loss", "C1--")],
            ),
            (
                "held out = trained on",
                [("leaked data", "loss/total", "C3"), ("leaked data", "val/loss", "C1--")],
            ),
        ],
        "starved": [
            ("loss of text", pair("starved text", "loss/text")),
            ("accuracy of text", pair("starved text", "accuracy/text")),
            ("gradient in text's head rows", pair("starved text", "grad/text_head")),
        ],
        "codes": [
            ("codebook usage", pair("dead codes", "codebook/usage", "healthy codes")),
            ("dead codes", pair("dead codes", "codebook/dead_codes", "healthy codes")),
            ("loss", pair("dead codes", "loss/total", "healthy codes")),
        ],
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, panels in pictures.items():
        if asked.only not in (None, name):
            continue
        draw(asked.out / f"monitoring-{name}.png", panels, rows)
    last = {
        name: {
            k: round(v, 4)
            for k, v in ({key: v for r in found for key, v in r.items()}).items()
            if isinstance(v, float)
            and k.startswith(("loss/", "val/", "accuracy", "grad/", "codeb"))
        }
        for name, found in rows.items()
    }
    print(json.dumps(last, indent=1))


if __name__ == "__main__":
    main()
