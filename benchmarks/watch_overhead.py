"""What watching a run costs: share of a training step, always on and with every layer looked at.

python benchmarks/watch_overhead.py [--steps 120] [--every 100] [--json FILE]

A model of about 150 ms a step on one thread, tracked by Weights & Biases offline. Always on are the
figures of machine and modalities, the alerts and the tracker; their cost is the processor time of
the main thread in their hooks, and of the tracker's own thread, which shares the interpreter with
it. A look into the layers is the difference of neighbouring steps with and without one: medians of
processor time, so that other jobs on the machine matter little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

ALWAYS, LAYERS = 0.01, 0.05  # bars, as shares of a step
WARM = 4  # steps before the first that counts
HOOKS = ("pre_step", "post_step", "on_phase")


class Spent:
    """Processor seconds of the calling thread in named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def count(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time added to ``name``."""

        def counting(*args: Any, **kw: Any) -> Any:
            begun = time.thread_time()
            try:
                return call(*args, **kw)
            finally:
                took = time.thread_time() - begun
                self.seconds[name] = self.seconds.get(name, 0.0) + took

        return counting


def train(out: Path, steps: int, layers: int) -> tuple[list[float], Spent]:
    """Processor seconds of each step, and what the watchers spent of them in the counted ones."""
    from overhead import prepare

    os.environ["WANDB_MODE"] = "offline"  # the other benchmark switches it off
    from mm.run import Run
    from mm.trainer.callbacks import alerts, machine, modalities
    from mm.trainer.callbacks.base import Callback, Training
    from mm.trainer.engine import gradients
    from mm.trainer.log import tracker
    from mm.trainer.log.sinks import wandb_sink
    from mm.trainer.loop import Trainer

    config = prepare(out, "quickstart", steps)
    config |= {"name": f"watched{layers}", "evaluate": False}
    config["callbacks"] = [{"kind": "layers", "every": layers}] if layers else []
    config["stages"][0]["eval_every"] = 0
    spent, seconds = Spent(), list[float]()
    watched = (machine.Machine, modalities.Modalities, alerts.Alerts, tracker.Tracker)
    before = [(cls, hook, getattr(cls, hook)) for cls in watched for hook in HOOKS]
    before += [(modalities.Modalities, "_guess", modalities.Modalities._guess)]
    before += [(gradients.Gradients, "_read", gradients.Gradients._read)]
    before += [(wandb_sink.WandbSink, "log", wandb_sink.WandbSink.log)]
    for cls, hook, method in before:
        setattr(cls, hook, spent.count(cls.__name__, method))

    class Steps(Callback):
        def pre_step(self, trainer: Training, batches: list[Any]) -> None:
            self.begun = time.thread_time()
            if trainer.step == WARM:
                spent.seconds.clear()

        def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
            if step > WARM:
                seconds.append(time.thread_time() - self.begun)

    try:
        trainer = Trainer(Run.model_validate(config))
        trainer.callbacks.insert(0, Steps())  # its step begins before all others'
        trainer.fit()
    finally:
        for cls, hook, method in before:
            setattr(cls, hook, method)
    return seconds, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--every", type=int, default=100, help="steps between looks into the layers"
    )
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mm-watch-") as out:
        plain, spent = train(Path(out), asked.steps, 0)
        every_other, _ = train(Path(out), asked.steps, 2)
    step = statistics.median(plain)
    parts = {name: s / len(plain) / step for name, s in sorted(spent.seconds.items())}
    always = sum(parts.values())
    # WARM is even: steps that are due and those that are not take turns, the second one first.
    pairs = zip(every_other[1::2], every_other[0::2], strict=False)
    look = statistics.median(a - b for a, b in pairs)
    with_layers = always + look / step / asked.every
    print(f"step {1000 * step:.0f} ms of processor time, {len(plain)} steps")
    for name, share in parts.items():
        print(f"  {name}: {share:.3%}")
    for name, found, bar in (
        ("always on", always, ALWAYS),
        (f"with every layer each {asked.every} steps", with_layers, LAYERS),
    ):
        print(
            f"{name}: {found:.2%} of a step; bar {bar:.0%}: {'met' if found <= bar else 'MISSED'}"
        )
    print(
        f"one look into all layers: {look / step:.1%} of a step; {LAYERS:.0%} all in all from "
        f"every {max(1, round(look / step / max(1e-9, LAYERS - always)))} steps on"
    )
    if asked.json:
        row = {"step_seconds": step, "parts": parts, "always": always, "look": look / step}
        asked.json.write_text(json.dumps(row | {"with_layers": with_layers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
