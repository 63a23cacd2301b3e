"""What `mm plan` predicts beside what real steps hold and send, on the CPU.

python benchmarks/plan.py [--d-model 768] [--stages 0,1,2,3] [--only dense] [--json FILE]

Three models of 100 million parameters and more, each at every ZeRO stage on two processes: peak of
live tensor bytes, bytes of collectives, and seconds of a step. Each run takes up to a minute and
6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

PATTERNS = {
    "dense": "attention",
    "hybrid": "2*rg_lru attention",
    "linear": "gated_deltanet mamba2",
}
RUN = """
name: plan
out: {out}/runs
vocabulary: {out}/tokens/vocabulary.json
model:
  kind: lm
  d_model: {d_model}
  backbone: {{kind: stack, depth: {depth}, pattern: "{pattern}", ffn: {{kind: swiglu}}}}
stages:
  - data:
      kind: packed
      sources: [{{path: {out}/tokens}}]
      seq_len: {tokens}
      batch_size: {rows}
      cut: true
    objective: {{kind: next_token}}
    optimizer: {{kind: adamw}}
engine: {{precision: {precision}, threads: 1}}
"""


def prepare(out: Path, asked: argparse.Namespace, name: str) -> Path:
    """Tokens of this repository's own files as bytes, once, and the YAML of a model."""
    if not (out / "tokens").is_dir():
        from mm.data.pack.job import pack
        from mm.tokenizers.text.bytes import BytesConfig

        folder = out / "text"
        folder.mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(sorted((Path(__file__).parents[1] / "mm").glob("*.py"))):
            text = file.read_text()
            for at in range(0, len(text), 90):  # many short documents, of unlike lengths
                (folder / f"{i:03}-{at:06}.txt").write_text(text[at : at + 20 + (at * 7) % 70])
        BytesConfig().fit([]).save(out / "tokenizers" / "bytes")
        pack(folder, out / "tokens", tokenizers=out / "tokenizers", progress=False)
    config = out / f"{name}.yaml"
    values = vars(asked) | {"out": out, "pattern": PATTERNS[name]}
    config.write_text(RUN.format(**values))
    return config


def compare(config: Path, stage: int, processes: int, rows: int | None = None) -> dict[str, Any]:
    """Prediction and measurement of one run."""
    from mm.plan.gpus import find
    from mm.plan.measured import measure_run
    from mm.plan.plan import Cluster, make_plan
    from mm.run import Run

    changes = [f"engine.zero_stage={stage}"]
    if rows is not None:
        changes.append(f"stages.0.data.micro_batch_size={rows}")
    file = config.with_suffix(".json")
    measured = measure_run(config, changes, file, processes, os.environ)
    cluster = Cluster(find("cpu"), 1, processes)
    planned = make_plan(Run.load(config, changes), cluster, longest=False, variants=False)
    peak, sent = planned["memory"]["total_bytes"], sum(planned["collectives"].values())
    counted = sum(measured["collectives"].values())
    return {
        "parameters": planned["parameters"]["total"],
        "stage": stage,
        "predicted_peak": peak,
        "measured_peak": measured["peak_bytes"],
        "peak_error": peak / measured["peak_bytes"] - 1,
        "predicted_sent": sent,
        "counted_sent": counted,
        "sent_error": sent / counted - 1 if counted else 0.0,
        "predicted_seconds": planned["step"]["seconds"],
        "measured_seconds": measured["seconds"],
        "peak_in": planned["memory"]["peak_in"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--depth", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="of a step, over both processes")
    parser.add_argument(
        "--micro", type=int, help="rows of a micro-batch; default: all of a process"
    )
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--only", choices=PATTERNS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [asked.only] if asked.only else PATTERNS:
            config = prepare(Path(folder), asked, name)
            for stage in map(int, asked.stages.split(",")):
                row = {"model": name, **compare(config, stage, asked.processes, asked.micro)}
                rows.append(row)
                print(
                    f"{name:>7} {row['parameters'] / 1e6:.0f} M stage {stage}: peak "
                    f"{row['predicted_peak'] / 1e6:,.0f} of {row['measured_peak'] / 1e6:,.0f} MB "
                    f"({row['peak_error']:+.2%}), sent {row['predicted_sent'] / 1e6:,.2f} of "
                    f"{row['counted_sent'] / 1e6:,.2f} MB ({row['sent_error']:+.4%}), step "
                    f"{row['predicted_seconds']:.2f} of {row['measured_seconds']:.2f} s",
                    flush=True,
                )
                if asked.json:
                    asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
