"""Loss curves of ZeRO stages 0-3 in each precision: same model, data and seed.

python benchmarks/zero_stages.py [--steps 30] [--processes 1] [--out runs/zero_stages]

In fp32 with AdamW the four curves are equal to printed precision (the `stages and ranks` law,
tests/trainer/test_contract_training.py). In bf16 there is no bar: DeepSpeed wraps the optimizer
differently at stage 0, by design.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PRECISIONS = ("fp32", "autocast_bf16", "bf16")
RUN = """
name: zero
vocabulary: {out}/tokens/vocabulary.json
model: {{kind: lm, d_model: 64, backbone: {{kind: stack, depth: 3, pattern: "2*rg_lru attention"}}}}
stages:
  - data:
      {{kind: packed, sources: [{{path: {out}/tokens}}], seq_len: 128, batch_size: 4, cut: true}}
    objective: {{kind: next_token}}
    optimizer: {{kind: adamw, lr: 3.0e-3}}
    schedule: {{shape: constant, warmup: 5}}
"""


def prepare(out: Path) -> Path:
    """Tokenise this repository's own Python files as bytes, and write the run's YAML."""
    from mm.data.pack.job import pack
    from mm.tokenizers.text.bytes import BytesConfig

    out.mkdir(parents=True, exist_ok=True)
    text = out / "source.txt"
    sources = sorted((Path(__file__).parents[1] / "mm").glob("*.py"))
    text.write_text("\n\n".join(file.read_text() for file in sources))
    BytesConfig().fit([]).save(out / "tokenizers" / "bytes")
    pack(text, out / "tokens", tokenizers=out / "tokenizers", overwrite=True, progress=False)
    config = out / "run.yaml"
    config.write_text(RUN.format(out=out))
    return config


def curve(config: Path, out: Path, precision: str, stage: int, steps: int, n: int) -> list[float]:
    """Losses of one run."""
    name = f"{precision}-{stage}-{n}"
    shutil.rmtree(out / name, ignore_errors=True)  # a run of before may have read other text
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    changes = [f"name={name}", f"out={out}", f"engine.precision={precision}"]
    changes += [f"engine.zero_stage={stage}", f"stages.0.budget.steps={steps}"]
    changes += ["tracking.mode=disabled"]
    command = [sys.executable, *launch, "-m", "mm", "train", str(config), *changes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-1500:])
        return []
    rows = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
    return [row["loss/total"] for row in rows if "loss/total" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/zero_stages"))
    asked = parser.parse_args()
    config = prepare(asked.out)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PRECISIONS), figsize=(13, 4), sharey=True)
    for axis, precision in zip(axes, PRECISIONS, strict=True):
        for stage in range(4):
            losses = curve(config, asked.out, precision, stage, asked.steps, asked.processes)
            shown = " ".join(f"{x:.5f}" for x in losses[:: max(1, asked.steps // 6)])
            print(f"{precision:>14} stage {stage}: {shown}", flush=True)
            axis.plot(losses, label=f"stage {stage}", alpha=0.7)
        axis.set(title=precision, xlabel="step", ylabel="nats per byte")
        axis.legend()
    figure.tight_layout()
    figure.savefig(asked.out / "zero_stages.png", dpi=110)
    print(f"wrote {asked.out / 'zero_stages.png'}")


if __name__ == "__main__":
    main()
