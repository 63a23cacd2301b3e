"""Child of test_cost_of_a_save, under torchrun: what the saves of a run cost this process.

Of every run YAML: train it; ``<name>.<rank>.json`` beside it has a row a save, with the bytes of
the own slices, of collectives, and the peaks of new tensors and of what Python allocates, in
collecting and in writing, whose end is waited for.
"""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

from mm.launch import environment

environment.prepare()

if __name__ == "__main__":
    from torch.utils._python_dispatch import TorchDispatchMode

    from mm.plan.tally import Measure
    from mm.trainer import state
    from mm.trainer.checkpoint import writer
    from mm.trainer.loop import train

    rows: list[dict[str, int]] = []
    now = {"sent": 0, "tensors": 0, "python": 0}
    collect, save, call = state.collect, writer.save, writer.Writer.__call__

    class Sent(Measure):
        """Of a thread: modes of torch are of one."""

        __enter__: Any = TorchDispatchMode.__enter__

    def measured(work: Any, *args: Any) -> Any:
        found = Measure()
        with found:  # which lists all objects: before Python's are counted
            before = found.live.now
            tracemalloc.start()
            out = work(*args)
            now["python"] = max(now["python"], tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        now["sent"] += sum(found.collectives.values())
        now["tensors"] = max(now["tensors"], found.live.peak - before)
        return out

    def counted(*args: Any, **kw: Any) -> Any:
        with Sent() as found:
            out = save(*args, **kw)
        now["sent"] += sum(found.collectives.values())
        return out

    def write(self: writer.Writer, root: Path, moment: Any, **keep: Any) -> None:
        held = [h.mine for table in moment.files.values() for h in table.values()]
        own = sum(t.numel() * t.element_size() for t in held if t is not None)

        def all_of_it() -> None:
            call(self, root, moment, **keep)
            self.wait()

        measured(all_of_it)
        rows.append({"own": own, **now})
        now.update(sent=0, tensors=0, python=0)

    state.collect = lambda stage: measured(collect, stage)
    writer.save = counted
    writer.Writer.__call__ = write
    for path in map(Path, sys.argv[1:]):
        train(path)
        told = path.with_name(f"{path.stem}.{environment.ranks().rank}.json")
        told.write_text(json.dumps(rows))
        rows.clear()
