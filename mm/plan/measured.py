"""Real steps, counted as `mm plan` predicts them: one process of `torchrun -m mm.plan.measured`.

It builds a stage and steps it as `mm train` does; it saves where `checkpoints.background` is on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.launch import environment
from mm.reading import parse_json

if TYPE_CHECKING:
    import torch

    from mm.trainer.stage import StageState

WARM = 1  # steps that make the optimizer's states


def child(config: str, file: str, settings: Sequence[Sequence[str]]) -> None:
    """Take steps of a run's first stage under each setting, one after the other.

    What was seen is written to ``file``: a list, in the order of ``settings`` (changes of the
    config). Bytes are those of the process that held most, messages those of the first.
    """
    environment.prepare()
    import torch.distributed as dist

    from mm.trainer.engine.process_group import join

    found, folder = [], Path(file).with_suffix("")  # of saves
    for changes in settings:
        device = join(None)
        all_saw: list[Any] = [None] * environment.ranks().world
        dist.all_gather_object(all_saw, _measure(config, changes, device, folder))
        most = max(all_saw, key=lambda saw: saw["peak_bytes"])
        found.append(all_saw[0] | {k: most[k] for k in ("peak_bytes", "at_peak")})
        gc.collect()
    if environment.ranks().is_main:
        Path(file).write_text(json.dumps(found, indent=1) + "\n")


def _measure(
    config: str, changes: Sequence[str], device: torch.device, folder: Path
) -> dict[str, Any]:
    """Figures of one setting; what it saves goes below ``folder``."""
    from mm.errors import UserError
    from mm.plan.tally import LiveBytes, Measure
    from mm.run import Run
    from mm.trainer.engine.deepspeed import resolve_precision
    from mm.trainer.env import TrainerEnv
    from mm.trainer.log.metrics import CodebookUsage
    from mm.trainer.stage import enter_stage
    from mm.trainer.step import optimizer_step
    from mm.vocabulary import Vocabulary

    run = Run.load(config, changes)
    if run.vocabulary is None:
        raise UserError(f"{config}: no vocabulary, so no token shards to measure with")
    before = LiveBytes()
    before.add_all()
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
    saved = measure_save(stage, folder) if run.checkpoints.background else {}
    return saved | {
        "peak_bytes": measure.live.peak - before.now,
        "collectives": dict(measure.collectives),
        "calls": dict(measure.calls),
        "at_peak": dict(measure.live.at_peak.most_common(12)),
        "seconds": seconds[-1],
    }


def measure_save(stage: StageState, folder: Path) -> dict[str, Any]:
    """Bytes that two saves of a stage take beside it: in the foreground, and from copies.

    Call on all ranks.
    """
    from mm.plan.tally import Measure
    from mm.trainer.checkpoint.collect import collect
    from mm.trainer.checkpoint.held import Copies, mine, spread
    from mm.trainer.checkpoint.meeting import Meeting
    from mm.trainer.checkpoint.save import Moment, save
    from mm.trainer.checkpoint.writer import meet

    me, copies = environment.ranks(), Copies()
    files = spread(collect(stage)[0], me.rank, me.world)
    out: dict[str, Any] = {"save_writes": sum(x.nbytes for _, _, x in mine(files))}
    for step, background in enumerate((False, True), 1):
        with Measure() as measure:
            before, given = measure.live.now, files
            if background:
                given, finish = copies.of(files)
                finish()
            moment = Moment({"step": step, "stage": 0}, given)
            save(folder, moment, 1, meeting=Meeting.of_all(), wrote=meet)
        out["background_save" if background else "save"] = measure.live.peak - before
        out["save_collectives"] = sum(measure.collectives.values())
    return out


def measure_settings(
    config: Path,
    settings: Sequence[Sequence[str]],
    file: Path,
    processes: int,
    environ: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What one process of ``processes`` holds and sends in a step, under each setting.

    All in one start. Raises RuntimeError.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launch, "-m", "mm.plan.measured", str(config), str(file)]
    words = json.dumps([list(changes) for changes in settings])
    done = subprocess.run([*command, words], capture_output=True, text=True, env=dict(environ))
    if done.returncode:
        # what the processes said stands before torchrun's own words of their end
        said = done.stderr.split("torch/distributed/elastic")[0]
        raise RuntimeError(f"exit code {done.returncode}: {said[-3000:]}")
    return parse_json(file.read_text())


def measure_run(
    config: Path, changes: Sequence[str], file: Path, processes: int, environ: Mapping[str, str]
) -> dict[str, Any]:
    """`measure_settings` of one setting."""
    return measure_settings(config, [changes], file, processes, environ)[0]


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], parse_json(sys.argv[3]))
