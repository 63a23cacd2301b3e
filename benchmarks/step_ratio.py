"""One training step of this tree beside another's: the trainer whole, ratio of medians.

    git worktree add ../before <commit>
    python benchmarks/step_ratio.py ../before --pairs 6

Each tree makes its own small quickstart (`--scale .05`, a minute) once. This tree's stream makes 60
steps of rows, which are kept. Then the hybrid backbone trains on those rows on two processes by
each tree in turn, without tasks, samples and held-out losses; a run's figure is the median of
`perf/step_seconds` after the first eight. The last loss of both trees is printed: equal bits say
that they did the same work. What a tree's own order of the data costs is no part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
STEPS = 60
UNUSED = re.compile(r"^(stages\.0\.tasks\.|callbacks\.|name=|out=|stages\.0\.budget)")


def environment(tree: Path) -> dict[str, str]:
    """The environment in which ``tree`` is the program."""
    return {**os.environ, "PYTHONPATH": str(tree), "WANDB_MODE": "disabled"}


def prepare(tree: Path, out: Path) -> list[str]:
    """Shards and tokenizers of ``tree`` in ``out``; the overrides that name them."""
    if not (out / "results.json").is_file():
        command = [sys.executable, "-m", "mm", "quickstart", "--scale", ".05", "--out", str(out)]
        subprocess.run(command, cwd=tree, env=environment(tree), check=True)
    lines = [c["command"] for c in json.loads((out / "commands.json").read_text())]
    train = next(c for c in lines if "-m mm train" in c or c.startswith("mm train"))
    words = shlex.split(train.split(" && ")[0])
    return [w for w in words if "=" in w and not w.startswith("--") and not UNUSED.match(w)]


def child(rows: Path, record: bool, overrides: list[str]) -> None:
    """In a process of one tree: train, and keep the rows of every step, or be given kept ones."""
    from mm.data.batching.collate import to_batch
    from mm.data.streams import packed
    from mm.run import Run
    from mm.specs import Segment
    from mm.trainer.loop import Trainer

    file = rows.with_suffix(f".{os.environ['RANK']}.pickle")  # our own, written a moment ago
    trainer = Trainer(Run.load("configs/quickstart/hybrid.yaml", overrides))
    if record:
        kept: list[Any] = []

        def keep(given: Any, vocabulary: Any, *sizes: Any, **more: Any) -> Any:
            kept.append(([[[s._asdict() for s in d] for d in row] for row in given], sizes[:2]))
            return to_batch(given, vocabulary, *sizes, **more)

        packed.to_batch = keep
        trainer.fit()
        file.write_bytes(pickle.dumps(kept))
        return
    steps = iter(pickle.loads(file.read_bytes()))
    own = packed.PackedStream.next

    fresh = [True]

    def give(stream: Any) -> Any:
        if fresh:  # the counts of one step, for what reads them
            fresh.clear()
            own(stream)
            stream.close()
        given, sizes = next(steps)
        # An older tree knows fewer fields of a segment.
        own_fields = lambda s: Segment(**{k: v for k, v in s.items() if k in Segment._fields})
        again = [[[own_fields(s) for s in d] for d in row] for row in given]
        return [to_batch(again, stream.vocabulary, *sizes)]

    packed.PackedStream.next = give
    trainer.fit()


def seconds(
    tree: Path, data: list[str], out: Path, rows: Path, record: bool = False
) -> tuple[float, float]:
    """Median seconds of a step, and the last loss, of one run on ``rows``."""
    shutil.rmtree(out, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = [f"name={out.name}", f"out={out.parent}", "callbacks=[]", "stages.0.tasks=[]"]
    settings += [f"stages.0.budget.steps={STEPS}", "stages.0.eval_every=0"]
    script = [__file__, "--child", str(rows), *(["--record"] if record else [])]
    subprocess.run(
        [*torchrun, *script, *data, *settings],
        cwd=tree,
        env=environment(tree),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["perf/step_seconds"] for row in found if "perf/step_seconds" in row][8:]
    return statistics.median(steps), found[-1]["loss/total"]


def main() -> None:
    """Print a line a pair, then the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="source tree of the other version")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE / "build" / "step_ratio")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.child is not None:
        given = [args.before and str(args.before), *overrides]
        return child(args.child, args.record, [word for word in given if word])
    if args.before is None or overrides:
        parser.error("give the source tree of the other version")
    trees = {"before": args.before.resolve(), "now": HERE}
    data = {name: prepare(tree, args.out / f"{name}-data") for name, tree in trees.items()}
    rows = args.out / "rows"
    seconds(HERE, data["now"], args.out / "recorded", rows, record=True)
    found: dict[str, list[float]] = {"before": [], "now": []}
    for pair in range(args.pairs):
        losses = {}
        for name in ("before", "now") if pair % 2 == 0 else ("now", "before"):
            step, losses[name] = seconds(trees[name], data[name], args.out / name, rows)
            found[name].append(step)
        ms = {name: 1e3 * steps[-1] for name, steps in found.items()}
        ratio = ms["now"] / ms["before"]
        print(f"{ms['before']:.1f} {ms['now']:.1f} ms, ratio {ratio:.3f}, losses {losses}")
    medians = {name: statistics.median(steps) for name, steps in found.items()}
    print(f"ratio of medians {medians['now'] / medians['before']:.3f}")


if __name__ == "__main__":
    main()
