"""Child of test_other_world, under torchrun: checkpoints cut anew and saved as they are.

Of every pair of a run YAML and a folder: build the run's stage from its newest checkpoint, and save
what each process then holds into the folder, before a step is taken. Beside it ``read.N.json`` says
how many values process N read, by the file that they are of.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from mm.launch import environment

environment.prepare()

if __name__ == "__main__":
    from mm.model.slices import Slices
    from mm.run import Run
    from mm.trainer.callbacks.base import Callback, Training
    from mm.trainer.checkpoint import format as checkpoint
    from mm.trainer.checkpoint.collect import collect
    from mm.trainer.checkpoint.held import spread, whole
    from mm.trainer.checkpoint.meeting import Meeting
    from mm.trainer.checkpoint.save import Moment, save
    from mm.trainer.checkpoint.writer import meet
    from mm.trainer.loop import Trainer

    values: Counter[str] = Counter()
    read = Slices.read

    def counted(self: Slices, file: str, name: str, start: int = 0, n: int | None = None):
        out = read(self, file, name, start, n)
        values[file] += out.numel()
        return out

    Slices.read = counted

    class Done(Exception):
        pass

    class Again(Callback):
        def __init__(self, root: Path):
            self.root = root

        def on_stage_start(self, trainer: Training) -> None:
            me = environment.ranks()
            told = self.root.with_name(f"read.{me.rank}.json")
            told.write_text(json.dumps(values))
            found = checkpoint.newest(trainer.folder / "checkpoints")
            assert found is not None
            files, scalars = collect(trainer.stage)
            files["probe"] = {n: whole(t, 0, me.rank) for n, t in found.tensors("probe").items()}
            state = {**found.state, "optimizers": scalars, "world": me.world}
            state["config"] = trainer.run.to_dict()
            moment = Moment(state, spread(files, me.rank, me.world))
            save(self.root, moment, 9, meeting=Meeting.of_all(), wrote=meet)
            raise Done

    for path, root in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        values.clear()
        try:
            Trainer(Run.load(path), [Again(Path(root))]).fit()
        except Done:
            meet()
