"""Four codebooks of a codec flat, by the delay pattern and by a depth transformer, side by side.

    python benchmarks/codebooks.py DIR [--seeds 3] [--steps 300] [--small]
    python benchmarks/codebooks.py --head

DIR holds spoken-digits.tar (or what has its shape). Writes runs/members; a part that is done is not
done again. Bits a code are those of held-out recordings, given their words, an end counted as a
code. `--small`: everything once in some minutes, in a folder of its own, to see that it runs.
`--head`: what a place's codes cost the depth transformer by its State, of running all codes before
one again. What it reached stands in docs/results.md and docs/lab-notes.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from members import OUT, PARTS, ROOT, mm

from mm.decoders.generate import Generator, generate_tokens
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.registry import HEADS
from mm.run import Run
from mm.specs import Segment, TokenSpec
from mm.trainer.stage import make_stream
from mm.vocabulary import Vocabulary

WAYS = ("flattened", "delay", "depth")
CODEC = ("model.quantizer.n_codebooks=4", "model.quantizer.codebook_size=256")
FEW = ("model.quantizer.n_codebooks=4", "model.quantizer.codebook_size=16")
SMALL = 100  # recordings, evenly spread


def prepare(source: Path, codec: Sequence[str] = CODEC) -> None:
    """Recordings with their words, a codec of four codebooks, a text tokenizer, their tokens."""
    part = PARTS["digits"]
    data, tokens, made = (OUT / kind / "codes" for kind in ("data", "tokens", "tokenizers"))
    given = (str(source / part.archive), "--out", str(data), "--val-share", "0.1", *part.pack)
    mm("data", "pack", *given, done=data)
    for modality, config, *more in (("audio", "audio.yaml", *codec), part_of_text()):
        given = (str(ROOT / "configs" / "tokenizer" / config), "--data", str(data))
        to = made / modality
        mm("tokenizer", "train", *given, "--out", str(to), *more, done=to / "model")
    given = (str(data), "--tokenizers", str(made), "--out", str(tokens))
    mm("data", "pack", *given, done=tokens)


def part_of_text() -> tuple[str, ...]:
    """Modality, config and changes of the text tokenizer."""
    config, *changes = PARTS["digits"].tokenizers["text"].split()
    return "text", Path(config).name, *changes


def run(way: str, seed: int, steps: int, more: Sequence[str] = ()) -> dict[str, float]:
    """Bits a code and accuracy of one run; ``more``: changes of its config."""
    folder = OUT / f"{way}_{seed}"
    config = str(ROOT / "configs" / "members" / f"{way}.yaml")
    changes = (f"name={folder.name}", f"seed={seed}", f"stages.0.budget.steps={steps}", *more)
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


def cost_of_codes(repeats: int) -> None:
    """Print what the codes of P places take by the head's State, of all run again for each."""
    torch.set_num_threads(1)
    for n, width, places in itertools.product((4, 8, 16, 32), (96, 512), (1, 40)):
        vocabulary = Vocabulary().add(TokenSpec("audio", 256, n))
        layers = {"kind": "stack", "depth": 2, "pattern": "attention"}
        layers["mixers"] = {"attention": {"heads": 4}}
        config = {"kind": "depth", "width": width, "backbone": layers}
        head: Any = HEADS.parse(config | {"delays": {"audio": [0] * n}}).build(96, vocabulary.size)
        init_weights(head)
        head.eval().vocabulary = vocabulary
        first = vocabulary.range("audio").first
        known = first + torch.arange(n) * 256 + torch.randint(0, 256, (places, n))
        hidden, at = torch.randn(1, places, 96), torch.arange(places)
        ctx = Ctx(Layout.from_rows([[Doc(places)]]), Causal())
        taken: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(1 + repeats):
            for stepped, seconds in taken.items():
                begun = time.process_time()
                with torch.no_grad():
                    state = head.fresh(places, n - 1) if stepped else None
                    for q in range(1, n):
                        state = head(hidden, ctx, at, state=state, known=known[:, :q]).state
                seconds.append(time.process_time() - begun)
        again, step = (statistics.median(seconds[1:]) for seconds in taken.values())
        chosen = head.initial_state(places, n - 1) is not None
        print(
            f"{n} codebooks, width {width}, {places} places: {step * 1e3:.1f} ms by its State, "
            f"{step / again:.2f} of all again; {'the State' if chosen else 'again'} is taken"
        )


def never_ends(logits: Any, session: Any) -> Any:
    """A rule that keeps the span's end out before its limit, so that all write as much."""
    going = session.length < session.limit
    ends = logits[:, session.range.end].masked_fill(going, -math.inf)
    return logits.index_copy(1, torch.tensor([session.range.end]), ends[:, None])


def main() -> None:
    """Print a line a layout: means, each seed behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="folder with the archive")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a short form, to see that it runs")
    parser.add_argument("--head", action="store_true", help="of the head `depth` alone")
    args = parser.parse_args()
    if args.head:
        return cost_of_codes(args.repeats)
    if args.source is None:
        parser.error("DIR: the folder with spoken-digits.tar")
    if not args.small:
        return measure(args.source, args.seeds, args.steps, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        few(args.source / PARTS["digits"].archive, Path(folder) / PARTS["digits"].archive)
        os.chdir(folder)  # the configs name runs/members
        small = ("stages.0.tasks.0.limit=10", "stages.0.schedule.warmup=2")
        measure(Path(folder), 1, 10, 1, (*FEW, "stages.0.budget.steps=20"), small)
        os.chdir(ROOT)


def few(archive: Path, to: Path) -> None:
    """Write some files of an archive."""
    with tarfile.open(archive) as whole, tarfile.open(to, "w") as part:
        files = [member for member in whole if member.isfile()]
        for member in files[:: max(1, len(files) // SMALL)]:
            part.addfile(member, whole.extractfile(member))


def measure(
    source: Path,
    seeds: int,
    steps: int,
    repeats: int,
    codec: Sequence[str] = CODEC,
    more: Sequence[str] = (),
) -> None:
    """Train and print; ``codec``, ``more``: changes of the codec's config and of the models'."""
    prepare(source, codec)
    for way in WAYS:
        found = [run(way, seed, steps, more) for seed in range(seeds)]
        cells = []
        for name in found[0]:
            values = [each[name] for each in found]
            each = ", ".join(f"{v:.3f}" for v in values)
            cells.append(f"{name} {statistics.mean(values):.3f} ({each})")
        print(f"{way}: {'; '.join(cells)}")
    first = None
    for way, (step, writing) in costs(repeats).items():
        first = first or (step, writing)
        print(
            f"{way}: step {step:.3f} s, {step / first[0]:.2f} of flat; 40 recordings written in "
            f"{writing:.2f} s, {writing / first[1]:.2f} of flat"
        )


if __name__ == "__main__":
    main()
