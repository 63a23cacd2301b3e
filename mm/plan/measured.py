"""Real steps, counted as `mm plan` predicts them: one process of `torchrun -m mm.plan.measured`.

It builds a stage and steps it as `mm train` does, and saves nothing.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.launch import environment
from mm.reading import parse_json

WARM = 1  # steps that make the optimizer's states


def child(config: str, file: str, changes: Sequence[str]) -> None:
    """Take steps of a run's first stage, and write what the first process saw to ``file``."""
    environment.prepare()
    from mm.errors import UserError
    from mm.plan.tally import Measure
    from mm.run import Run
    from mm.trainer.engine.deepspeed import resolve_precision
    from mm.trainer.engine.process_group import join
    from mm.trainer.env import TrainerEnv
    from mm.trainer.log.metrics import CodebookUsage
    from mm.trainer.stage import enter_stage
    from mm.trainer.step import optimizer_step
    from mm.vocabulary import Vocabulary

    run = Run.load(config, changes)
    if run.vocabulary is None:
        raise UserError(f"{config}: no vocabulary, so no token shards to measure with")
    device = join(run.engine.threads)
    env = TrainerEnv(run.seed, device, resolve_precision(run.engine.precision, device))
    vocabulary = Vocabulary.load(run.vocabulary)
    stage = enter_stage(run, 0, 0, env, None, vocabulary, dict)
    usage = CodebookUsage()
    measure, seconds = Measure(), []
    for step in range(WARM + 2):
        batches = list(stage.stream.next())
        with measure if step == WARM else contextlib.nullcontext():
            begun = time.perf_counter()
            optimizer_step(stage, step, batches, usage, vocabulary.modalities, False)
            seconds.append(time.perf_counter() - begun)
    stage.stream.close()
    if environment.ranks().is_main:
        found = {
            "peak_bytes": measure.live.peak,
            "collectives": dict(measure.collectives),
            "calls": dict(measure.calls),
            "at_peak": dict(measure.live.at_peak.most_common(12)),
            "seconds": seconds[-1],
        }
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


def measure_run(
    config: Path, changes: Sequence[str], file: Path, processes: int, environ: Mapping[str, str]
) -> dict[str, Any]:
    """What one process of ``processes`` holds and sends in a step. Raises RuntimeError."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, "-m", "mm.plan.measured", str(config), str(file)]
    done = subprocess.run([*command, *changes], capture_output=True, text=True, env=dict(environ))
    if done.returncode:
        # what the processes said stands before torchrun's own words of their end
        said = done.stderr.split("torch/distributed/elastic")[0]
        raise RuntimeError(f"exit code {done.returncode}: {said[-3000:]}")
    return parse_json(file.read_text())


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], sys.argv[3:])
