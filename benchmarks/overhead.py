"""What a training step costs beside forward, backward and update: our share and DeepSpeed's.

python benchmarks/overhead.py [--only 20M --only 100M --only quickstart] [--steps 8] [--json FILE]

Ours is everything outside the engine's forward, backward, reduction and step: fetching, counting,
the losses' sums, clipping's bookkeeping, metrics.jsonl, callbacks, heartbeats (saves are no part of
a step). DeepSpeed's is what its engine takes more than a plain PyTorch loop over the same model,
optimizer and batches. Shares are medians over steps, of the main thread's processor time, so that
other jobs on the machine matter little; wall time stands beside them. One thread, fp32.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["WANDB_MODE"] = "disabled"

ENGINE = ("forward", "backward", "reduce", "update")
WARM = 2  # steps before the first that counts
SIZES: dict[str, dict[str, Any]] = {
    "20M": {"d_model": 384, "depth": 11, "rows": 2, "seq_len": 512},
    "100M": {"d_model": 768, "depth": 14, "rows": 2, "seq_len": 512},
    "quickstart": {"d_model": 128, "depth": 4, "rows": 8, "seq_len": 256},
}
BARS = {"20M": ("ours", 0.03), "100M": ("ours", 0.03), "quickstart": ("data wait", 0.02)}


class _Enough(Exception):
    """All steps are measured."""


class Spans:
    """Processor and wall seconds of named parts of the current step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self._now: dict[str, tuple[float, float]] = {}
        self._begun = self._clock()

    @staticmethod
    def _clock() -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time added to part ``name``; a part inside a part counts once."""

        def timing(*args: Any, **kw: Any) -> Any:
            begun = self._clock()
            try:
                return call(*args, **kw)
            finally:
                self._add(name, begun)

        return timing

    def _add(self, name: str, begun: tuple[float, float]) -> None:
        old, now = self._now.get(name, (0.0, 0.0)), self._clock()
        self._now[name] = (old[0] + now[0] - begun[0], old[1] + now[1] - begun[1])

    def step(self) -> None:
        """End a step."""
        self._add("step", self._begun)
        self.steps.append(self._now)
        self._now, self._begun = {}, self._clock()

    def medians(self) -> dict[str, dict[str, float]]:
        """Median seconds of each part over the steps after the warm ones.

        "ours" is what a step takes outside the engine.
        """
        kept = [step | {"ours": _outside(step)} for step in self.steps[WARM:]]
        names = sorted({name for step in kept for name in step})
        of = lambda name, i: statistics.median(s.get(name, (0.0, 0.0))[i] for s in kept)
        return {name: {"cpu": of(name, 0), "wall": of(name, 1)} for name in names}


def _outside(step: dict[str, tuple[float, float]]) -> tuple[float, float]:
    inside = [step[name] for name in ENGINE if name in step]
    cpu, wall = (step["step"][i] - sum(part[i] for part in inside) for i in range(2))
    return cpu, wall


def prepare(out: Path, size: str, steps: int) -> dict[str, Any]:
    """Pack data once and return the config of the run."""
    from mm.data.pack.job import pack
    from mm.faults.bench import Codes

    tokens = out / "tokens"
    if not tokens.is_dir():
        import numpy as np
        from PIL import Image

        raw = out / "raw"
        raw.mkdir(parents=True)
        sources = sorted((Path(__file__).parents[1] / "mm").rglob("*.py"))
        text = "\n".join(file.read_text() for file in sources[:120])
        rng, rows = np.random.default_rng(0), []
        for i in range(1500):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / f"{i}.png")
            at = (i * 307) % (len(text) - 200)
            rows.append({"key": f"s{i}", "text": text[at : at + 40 + i % 90], "image": f"{i}.png"})
        (raw / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        codes = {"text": Codes("text", 256), "image": Codes("image", 512)}
        pack(raw / "rows.jsonl", tokens, tokenizers=codes, progress=False)
    s = SIZES[size]
    objective: Any = "next_token"
    if size == "quickstart":
        tasks = {"image>text": 0.5, "text>image": 0.5}
        transform = {"kind": "any_to_any", "condition_dropout": 0.1, "tasks": tasks}
        objective = {"kind": "next_token", "transform": transform}
    heads = max(2, s["d_model"] // 64)
    return {
        "name": size,
        "out": str(out / "runs"),
        "vocabulary": str(tokens / "vocabulary.json"),
        "model": {
            "kind": "lm",
            "d_model": s["d_model"],
            "backbone": {
                "kind": "stack",
                "depth": s["depth"],
                "pattern": "attention",
                "mixers": {"attention": {"heads": heads}},
                "ffn": {"kind": "swiglu", "hidden": s["d_model"] * 8 // 3 // 16 * 16},
            },
        },
        "stages": [
            {
                "data": {
                    "kind": "packed",
                    "sources": [{"path": str(tokens)}],
                    "seq_len": s["seq_len"],
                    "batch_size": s["rows"],
                    "prefetch": 2,
                },
                "objective": objective,
                "optimizer": {"kind": "adamw", "lr": 1e-3},
                "budget": {"steps": steps},
            }
        ],
        "engine": {"zero_stage": 1, "precision": "fp32", "threads": 1},
        "checkpoints": {"every": 0},
    }


def ours(config: dict[str, Any]) -> dict[str, Any]:
    """The trainer's steps, by part."""
    from mm.run import Run
    from mm.trainer.callbacks.base import Callback, Training
    from mm.trainer.engine.deepspeed import Engine
    from mm.trainer.loop import Trainer

    spans = Spans()
    for name, method in {
        "forward": "__call__",
        "backward": "backward",
        "reduce": "reduce",
        "update": "step",
    }.items():
        setattr(Engine, method, spans.timed(name, getattr(Engine, method)))

    class Measured(Callback):
        def on_stage_start(self, trainer: Training) -> None:
            trainer.stream.next = spans.timed("data wait", trainer.stream.next)
            spans._begun = spans._clock()

        def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
            spans.step()
            if step == trainer.steps:
                raise _Enough

    trainer = Trainer(Run.model_validate(config), [Measured()])
    try:
        trainer.fit()
    except _Enough:
        module = trainer.stage.engines["model"].raw
        parameters = sum(p.numel() for p in module.parameters())
    return {"parts": spans.medians(), "parameters": parameters}


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """The same model, optimizer and batches in a plain loop."""
    import torch

    from mm.run import Run
    from mm.trainer.stage import build, make_module
    from mm.vocabulary import Vocabulary

    torch.set_num_threads(1)
    run = Run.model_validate(config)
    stage, vocabulary = run.stages[0], Vocabulary.load(run.vocabulary or "")
    objective = build(stage.objective, vocabulary=vocabulary)
    model = make_module(run.model, vocabulary, run.seed, torch.device("cpu")).train()
    optimizer = stage.optimizer.build(model)
    stream = build(stage.data, vocabulary=vocabulary, transform=objective.transform, seed=run.seed)
    spans = Spans()
    forward = spans.timed("forward", model)
    backward = spans.timed("backward", torch.Tensor.backward)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.engine.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    update = spans.timed("update", update)
    for _ in range(stage.budget.steps):
        (batch,) = stream.next()
        weight = batch.weight.flatten()[batch.places["tokens"]]
        nll = forward(batch).heads["tokens"].nll
        backward((nll * weight).sum() / weight.sum())
        update()
        spans.step()
    stream.close()
    gc.collect()
    return {"parts": spans.medians()}


def measure(out: Path, size: str, steps: int) -> dict[str, Any]:
    """One row: figures of both loops, each in a process of its own."""
    found = {}
    for what in ("ours", "bare"):
        file = out / f"{size}-{what}.json"
        command = [sys.executable, __file__, "--child", what, "--only", size]
        subprocess.run(
            [*command, "--steps", str(steps), "--out", str(out), "--json", str(file)], check=True
        )
        found[what] = json.loads(file.read_text())
    parts, plain = found["ours"]["parts"], found["bare"]["parts"]
    row: dict[str, Any] = {"size": size, "parameters": found["ours"]["parameters"], "steps": steps}
    for clock in ("cpu", "wall"):
        total = parts["step"][clock]
        inside = sum(parts[name][clock] for name in ENGINE)
        loop = sum(plain[name][clock] for name in ENGINE if name in plain)
        row[clock] = {
            "step_seconds": total,
            "ours": parts["ours"][clock] / total,
            "data wait": parts["data wait"][clock] / total,
            "engine": inside / total,
            "deepspeed": (inside - loop) / total,
            "bare_seconds": loop,
        }
    row["parts"], row["bare"] = parts, plain
    name, bar = BARS[size]
    # A wait costs no processor time: it is the one figure that has to be taken from the wall clock.
    row["bar"] = {"of": name, "at_most": bar}
    row["bar"]["found"] = row["wall" if name == "data wait" else "cpu"][name]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", action="append", choices=SIZES)
    parser.add_argument("--steps", type=int, help="default: 12; 6 at 100M; 60 of the quickstart")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    parser.add_argument("--child", choices=("ours", "bare"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = asked.only or list(SIZES)
    if asked.child:
        config = prepare(asked.out, sizes[0], asked.steps)
        found = {"ours": ours, "bare": bare}[asked.child](config)
        asked.json.write_text(json.dumps(found))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="mm-overhead-") as temporary:
        out = asked.out or Path(temporary)
        for size in sizes:
            steps = asked.steps or {"20M": 12, "100M": 6}.get(size, 60)
            row = measure(out, size, steps)
            rows.append(row)
            bar, cpu, wall = row["bar"], row["cpu"], row["wall"]
            print(
                f"{size} ({row['parameters'] / 1e6:.1f} M parameters, {steps} steps): "
                f"ours {cpu['ours']:.2%} of processor time ({wall['ours']:.2%} of wall), "
                f"data wait {wall['data wait']:.2%} of wall, "
                f"DeepSpeed over a bare loop {cpu['deepspeed']:+.2%} ({wall['deepspeed']:+.2%}), "
                f"step {wall['step_seconds']:.3f} s; bar: {bar['of']} <= {bar['at_most']:.0%}: "
                f"{'met' if bar['found'] <= bar['at_most'] else 'MISSED'}",
                flush=True,
            )
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
