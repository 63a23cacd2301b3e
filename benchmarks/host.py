"""Goals of the trainer's own cost (P12) and of reading shards (P13), in processor time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Children, Figure, Missing, at_least, at_most, ratios, timed
from torch import nn
from zero_stages import prepare

from mm.batch import Batch
from mm.layout import Layout
from mm.model.layer import init_weights
from mm.run import Run
from mm.vocabulary import Vocabulary

B, T = 4, 128  # of zero_stages' run
TINY = ["model.d_model=32", "model.backbone.depth=2", "model.backbone.pattern=attention"]
SMALL = ["model.d_model=256", "model.backbone.depth=4", "model.backbone.pattern=attention"]


def bare(config: Path, changes: list[str]) -> float:
    """Processor milliseconds of a step of the same model in the shortest loop there is."""
    run = Run.load(config, changes)
    vocabulary = Vocabulary.load(run.vocabulary) if run.vocabulary else None
    model: nn.Module = run.model.build(vocabulary)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(10, 200, (B, T))
    batch = Batch(Layout.plain(B, T), ids.int()[..., None], ids.int()[..., None], torch.ones(B, T))

    def step() -> None:
        model(batch).heads["tokens"].nll.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return 1e3 * statistics.median([timed(step) for _ in range(30)][5:])


def trained(config: Path, changes: list[str], out: Path, stage: int, more: int) -> float:
    """The same of `mm train`.

    What ``more`` steps take after the first 20, so that starting does not count; it varies by some
    0.2 s.
    """
    spent = []
    for steps in (20, 20 + more):
        own = [f"name=s{stage}-{steps}", f"out={out}", f"engine.zero_stage={stage}"]
        own += ["engine.precision=fp32", f"stages.0.budget.steps={steps}"]
        own += ["tracking.mode=disabled", "checkpoints.every=0"]
        command = [sys.executable, "-m", "mm", "train", str(config), *changes, *own]
        with Children() as children:
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise Missing(f"a run that works: {done.stderr.strip().splitlines()[-1]}")
        spent.append(children.seconds)
    return 1e3 * (spent[1] - spent[0]) / more


def p12() -> Iterator[Figure]:
    """Trainer over bare loop. One process, fp32: single runs, no repeats."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        config = prepare(out)
        own = trained(config, TINY, out / "tiny", 0, 1600) - bare(config, TINY)
        yield at_most("P12", "trainer over a bare loop, ms a step", 0.3, "HF 0.8 ms", own)
        alone = bare(config, SMALL)
        for stage, bar in ((0, 1.02), (1, 1.18), (2, 1.18), (3, 1.18)):
            share = trained(config, SMALL, out / "small", stage, 240) / alone
            yield at_most("P12", f"ZeRO-{stage} step / bare loop", bar, "1.00-1.16", share)


def pictures(out: Path, samples: int) -> Path:
    """Shards of 224 x 224 JPEG and a caption."""
    from PIL import Image

    from mm.data.pack.job import pack

    rng, raw = np.random.default_rng(0), out / "raw"
    raw.mkdir(parents=True)
    for i in range(samples):
        small = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(small).resize((224, 224)).save(raw / f"{i:06d}.jpg", quality=90)
        (raw / f"{i:06d}.txt").write_text(f"caption {i}")
    pack(raw, out / "shards", shard_mb=16, progress=False)
    return out / "shards"


def p13() -> Iterator[Figure]:
    from mm.data.pack.writer import secure_webdataset
    from mm.data.shards.reader import ShardSet

    try:
        module = secure_webdataset()
    except ImportError:
        raise Missing("webdataset") from None
    with tempfile.TemporaryDirectory() as folder:
        shards = pictures(Path(folder), 600)
        opened = ShardSet.open(shards)
        paths = [str(p) for p in sorted((shards / "train").glob("*.tar"))]
        theirs = lambda: module.WebDataset(paths, shardshuffle=False)
        n = range(len(opened))
        raw: Callable[[], object] = lambda: [
            (opened.raw(i, "image"), opened.raw(i, "text")) for i in n
        ]
        (found,) = ratios(raw, lambda: list(theirs()))
        yield at_least("P13", "undecoded samples / webdataset", 5, "15.8", found.inverse())
        decoded: Callable[[], object] = lambda: [opened[i].values for i in n]
        (found,) = ratios(decoded, lambda: list(theirs().decode("pil")))
        yield at_least("P13", "decoded samples / webdataset + PIL", 1.8, "2.0", found.inverse())
