"""One run of `mm verify` in processes of its own: ``-m mm.verify.child ROLE ROOT...``.

``ROOT/<role>.yaml`` is what it trains; it ends once it has seen its steps. Several roots: in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.launch import environment
from mm.reading import parse_json


def main(role: str, root: Path) -> int:
    """Train, and write ``<role>.json``, or ``<role>.error_<rank>`` with what the user can mend."""
    from mm.config import places_from
    from mm.model import noise
    from mm.run import Run
    from mm.trainer.loop import Trainer
    from mm.verify import record

    job = parse_json((root / "job.json").read_text())
    made: Any
    if role == "reference":
        from mm.kernels.op import Op

        Op.everywhere = "reference"
        precision = parse_json((root / "setting.json").read_text())["precision"]
        asked = Run.load(root / "setting.yaml").engine.communication.dtype
        precision = "bf16" if asked == "bf16" else precision  # gradients are rounded on their way
        made = record.Reference(root, role, job["steps"], precision)
    else:
        kind = record.Setting if role == "setting" else record.Resumed
        made = kind(root, role, job["steps"])
    plain = noise._hash

    def counted(name: str) -> int:
        made.told["noise"] = True
        return plain(name)

    noise._hash = counted  # what draws noise asks it for a seed
    run = Run.load(root / f"{role}.yaml")
    try:
        with places_from(run, job["config"]):
            Trainer(run, [made]).fit()
    except record.Done:
        return 0
    except UserError as error:
        rank = environment.ranks().rank
        (root / f"{role}.error_{rank}").write_text(str(error))
        return 2
    return 1


if __name__ == "__main__":
    environment.prepare()
    sys.exit(max(main(sys.argv[1], Path(root)) for root in sys.argv[2:]))
