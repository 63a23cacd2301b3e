"""Predicted step time and MFU of models on cards, eager and compiled, with what they launch.

python benchmarks/gpu_predictions.py [--only 300M-dense,1B-hybrid] [--cards h100,a100]

No GPU is asked: a step on fake CUDA tensors is counted, and every operator timed by the rates of
`mm plan`. `make gpu` puts what it measures beside the same figures.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_models import DOCUMENTS, IDS, TOKENS, run_of

MODELS = {  # ZeRO stage and GPUs, each with one row of 8,192 tokens
    "300M-dense": (0, 1),
    "1B-dense": (0, 1),
    "1B-hybrid": (0, 1),
    "7B-dense": (3, 8),
}
CARDS = ("h100", "a100")
WAYS = ("eager", "compiled")


@functools.cache
def counted(model: str, documents: str) -> tuple[Any, Any, Any]:
    """Launches of its layers and of a step, and its networks."""
    from mm.plan.inputs import Assumed, open_subject
    from mm.plan.launches import step_launches
    from mm.plan.networks import Networks
    from mm.plan.trace import fake_mode

    run = run_of(*model.split("-"))
    subject = open_subject(run, 0, "autocast_bf16", Assumed(DOCUMENTS[documents], IDS))
    batch = subject.batches(1)[0]
    layers, step = step_launches(run, 0, subject.vocabulary, batch, whole=True)
    with fake_mode():
        net = Networks.of(run.stages[0].optimizer, *subject.networks())
    return layers, step, net


def predicted_step(model: str, card: str, compiled: bool, documents: str = "plain") -> Any:
    """A `GpuStep`, of one GPU."""
    from mm.plan.gpu_step import predict
    from mm.trainer.data_sheets import GPUS

    layers, step, net = counted(model, documents)
    stage, world = MODELS.get(model, (0, 1))
    return predict(layers, step, net, GPUS[card], TOKENS, compiled, stage, world)


def rows(models: Sequence[str], cards: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Cells of the table."""
    for model in models:
        world = MODELS[model][1]
        name = model.replace("-", " ") + (f", {world} GPUs" if world > 1 else "")
        for card in cards:
            for way in WAYS:
                found = predicted_step(model, card, way == "compiled")
                yield (
                    name, card, way, f"{found.launches:,}", f"{1e3 * found.busy:.0f}",
                    f"{1e3 * found.issue:.0f}", f"{1e3 * found.seconds:.0f}", f"{found.mfu:.0%}",
                    f"{found.tokens / found.seconds:,.0f}",
                )  # fmt: skip


def stored(model: str, card: str, blocks: str) -> dict[str, float]:
    """What docs/how-to/gpu.md predicts, MFU as a share; empty: it does not say."""
    page = Path(__file__).resolve().parents[1] / "docs" / "how-to" / "gpu.md"
    begins = f"| {model.replace('-', ' ')} | {card} | {blocks} | "
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith(begins):
            cells = [cell.strip().replace(",", "") for cell in line.strip("| ").split("|")]
            numbers = {k: float(v.rstrip("%")) for k, v in zip(COLUMNS[3:], cells[3:], strict=True)}
            return numbers | {"MFU": numbers["MFU"] / 100}
    return {}


COLUMNS = (
    "model", "card", "blocks", "launches", "GPU ms", "Python ms", "step ms", "MFU", "tokens/s a GPU"
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--cards", default=",".join(CARDS), help="comma-separated")
    asked = parser.parse_args(words)
    warnings.simplefilter("ignore")
    print("predicted, not measured")
    for cells in (COLUMNS, *rows(asked.only.split(","), asked.cards.split(","))):
        print(f"{cells[0]:18}{cells[1]:6}" + "".join(f"{c:>12}" for c in cells[2:]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
