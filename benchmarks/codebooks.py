"""Four codebooks of a codec flat, by the delay pattern and by a depth transformer, side by side.

    python benchmarks/codebooks.py DIR [--seeds 3] [--steps 300]

DIR holds spoken-digits.tar (or what has its shape). Writes runs/members; a part that is done is not
done again. Bits a code are those of held-out recordings, given their words, an end counted as a
code. What it reached stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from members import OUT, PARTS, ROOT, mm

from mm.decoders.generate import Generator, generate_tokens
from mm.run import Run
from mm.specs import Segment
from mm.trainer.stage import make_stream
from mm.vocabulary import Vocabulary

WAYS = ("flattened", "delay", "depth")
CODEC = ("model.quantizer.n_codebooks=4", "model.quantizer.codebook_size=256")


def prepare(source: Path) -> None:
    """Recordings with their words, a codec of four codebooks, a text tokenizer, their tokens."""
    part = PARTS["digits"]
    data, tokens, made = (OUT / kind / "codes" for kind in ("data", "tokens", "tokenizers"))
    given = (str(source / part.archive), "--out", str(data), "--val-share", "0.1", *part.pack)
    mm("data", "pack", *given, done=data)
    for modality, config, *more in (("audio", "audio.yaml", *CODEC), part_of_text()):
        given = (str(ROOT / "configs" / "tokenizer" / config), "--data", str(data))
        to = made / modality
        mm("tokenizer", "train", *given, "--out", str(to), *more, done=to / "model")
    given = (str(data), "--tokenizers", str(made), "--out", str(tokens))
    mm("data", "pack", *given, done=tokens)


def part_of_text() -> tuple[str, ...]:
    """Modality, config and changes of the text tokenizer."""
    config, *changes = PARTS["digits"].tokenizers["text"].split()
    return "text", Path(config).name, *changes


def run(way: str, seed: int, steps: int) -> dict[str, float]:
    """Bits a code and accuracy of one run."""
    folder = OUT / f"{way}_{seed}"
    config = str(ROOT / "configs" / "members" / f"{way}.yaml")
    changes = (f"name={folder.name}", f"seed={seed}", f"stages.0.budget.steps={steps}")
    mm("train", config, *changes, done=folder / "model")
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        each = json.loads(line)
        if "val/audio/loss" in each:
            found["bits a code"] = each["val/audio/loss"] / math.log(2)
        for key, value in each.items():
            if key.endswith("audio_to_text_accuracy"):
                found["audio to text"] = float(value)
    return found


def costs(repeats: int) -> dict[str, tuple[float, float]]:
    """Processor seconds of a step's forward and backward, and of writing 40 recordings.

    Medians of one thread; the layouts take turns.
    """
    torch.set_num_threads(1)
    taken: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    ready = {}
    for way in WAYS:
        asked = Run.load(ROOT / "configs" / "members" / f"{way}.yaml")
        vocabulary = Vocabulary.load(OUT / "tokens" / "codes" / "vocabulary.json")
        objective: Any = asked.stages[0].objective.build(vocabulary)
        model = Generator.from_pretrained(OUT / f"{way}_0").model
        ready[way] = make_stream(asked, 0, objective, vocabulary), objective, model, vocabulary
    for _ in range(repeats):
        for way, (stream, objective, model, vocabulary) in ready.items():
            micros = stream.next()
            begun = time.process_time()
            for term in objective.terms(micros, {"model": model.train()}, None):
                torch.stack([*term.losses.values()]).sum().backward()
            middle = time.process_time()
            word = Segment("text", np.arange(3, dtype=np.int32), role="condition")
            settings: Any = {"max_tokens": 48, "rules": [never_ends]}
            generate_tokens(model, vocabulary, [[word]] * 40, "audio", **settings)
            taken[way][0].append(middle - begun)
            taken[way][1].append(time.process_time() - middle)
    return {way: (statistics.median(a), statistics.median(b)) for way, (a, b) in taken.items()}


def never_ends(logits: Any, session: Any) -> Any:
    """A rule that keeps the span's end out before its limit, so that all write as much."""
    going = session.length < session.limit
    ends = logits[:, session.range.end].masked_fill(going, -math.inf)
    return logits.index_copy(1, torch.tensor([session.range.end]), ends[:, None])


def main() -> None:
    """Print a line a layout: means, each seed behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the archive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    prepare(args.source)
    for way in WAYS:
        found = [run(way, seed, args.steps) for seed in range(args.seeds)]
        cells = []
        for name in found[0]:
            values = [each[name] for each in found]
            each = ", ".join(f"{v:.3f}" for v in values)
            cells.append(f"{name} {statistics.mean(values):.3f} ({each})")
        print(f"{way}: {'; '.join(cells)}")
    first = None
    for way, (step, writing) in costs(args.repeats).items():
        first = first or (step, writing)
        print(
            f"{way}: step {step:.3f} s, {step / first[0]:.2f} of flat; 40 recordings written in "
            f"{writing:.2f} s, {writing / first[1]:.2f} of flat"
        )


if __name__ == "__main__":
    main()
