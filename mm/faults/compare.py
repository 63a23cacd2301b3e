"""What "as if unbroken" means: two run folders compared."""

from __future__ import annotations

from pathlib import Path

from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.log import metrics


def differences(whole: Path, other: Path, rel: float = 0.0) -> str:
    """What differs between two runs, "" when nothing: every loss, the last weights and states.

    ``rel`` = 0 asks for the same bits; otherwise losses may differ by that share, and tensors are
    not compared.
    """
    a, b = (metrics.read(folder / "metrics.jsonl") for folder in (whole, other))
    if [row["step"] for row in a] != [row["step"] for row in b]:
        return f"steps {[row['step'] for row in b]} instead of {[row['step'] for row in a]}"
    for x, y in zip(a, b, strict=True):
        for key in x:
            if not key.startswith("loss/") or x[key] == y.get(key):
                continue
            if x[key] is None or y.get(key) is None or abs(x[key] - y[key]) > rel * abs(x[key]):
                return f"{key} of step {x['step']} is {y.get(key)} instead of {x[key]}"
    if rel:
        return ""
    for folder in (whole, other):
        if not (folder / "model" / "config.json").is_file():
            return f"{folder.name} saved no model"
    first, second = (checkpoint.newest(folder / "checkpoints") for folder in (whole, other))
    if first is None or second is None or first.folder.name != second.folder.name:
        return "the last checkpoints are not of the same step"
    for path in sorted(first.folder.glob("*.safetensors")):
        if path.read_bytes() != (second.folder / path.name).read_bytes():
            return f"{path.name} differs"
    same = lambda saved: {k: saved.state[k] for k in ("data", "optimizers", "step")}
    return "" if same(first) == same(second) else "the data or optimizer state differs"
