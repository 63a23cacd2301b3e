"""One training step of this tree beside another's: the trainer whole, ratio of medians.

    git worktree add ../before <commit>
    python benchmarks/step_ratio.py ../before --pairs 6

Each tree makes its own small quickstart (`--scale .05`, a minute) once. Then its hybrid backbone
trains 60 steps on two processes by each tree in turn, without tasks, samples and held-out losses; a
run's figure is the median of `perf/step_seconds` after the first eight rows. The last loss of both
trees is printed: equal bits say that they did the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
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


def seconds(tree: Path, data: list[str], out: Path) -> tuple[float, float]:
    """Median seconds of a step, and the last loss, of one run."""
    shutil.rmtree(out, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = [f"name={out.name}", f"out={out.parent}", "callbacks=[]", "stages.0.tasks=[]"]
    config = ["-m", "mm", "train", "configs/quickstart/hybrid.yaml", "stages.0.budget.steps=60"]
    if (tree / "mm" / "trainer" / "held_out.py").is_file():  # older trees have no held-out loss
        settings.append("stages.0.eval_every=0")
    subprocess.run(
        [*torchrun, *config, *data, *settings],
        cwd=tree,
        env=environment(tree),
        check=True,
        capture_output=True,
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row][8:]
    return statistics.median(steps), rows[-1]["loss/total"]


def main() -> None:
    """Print a line a pair, then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="source tree of the other version")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=HERE / "build" / "step_ratio")
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "now": HERE}
    data = {name: prepare(tree, args.out / f"{name}-data") for name, tree in trees.items()}
    found: dict[str, list[float]] = {"before": [], "now": []}
    for pair in range(args.pairs):
        losses = {}
        for name in ("before", "now") if pair % 2 == 0 else ("now", "before"):
            step, losses[name] = seconds(trees[name], data[name], args.out / name)
            found[name].append(step)
        ms = {name: 1e3 * steps[-1] for name, steps in found.items()}
        ratio = ms["now"] / ms["before"]
        print(f"{ms['before']:.1f} {ms['now']:.1f} ms, ratio {ratio:.3f}, losses {losses}")
    medians = {name: statistics.median(steps) for name, steps in found.items()}
    print(f"ratio of medians {medians['now'] / medians['before']:.3f}")


if __name__ == "__main__":
    main()
