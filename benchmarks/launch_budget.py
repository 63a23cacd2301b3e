"""Launches a layer: what one block of each mixer of every backbone launches in a training step.

python benchmarks/launch_budget.py [--only griffin,samba] [--d-model N] [--tokens T] [--json FILE]
    [--combo-kernels]

Counted on fake CUDA tensors under bf16 autocast; no GPU is asked. "eager": kernels of forward and
backward, one Python call or more each; "compiled": what Inductor's code launches for the same
block (`engine.compile: true`), without CUDA graphs; with --combo-kernels what it launches under
`engine.combo_kernels: true`. "packed": 12 documents in the row.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKED = 12  # documents
FEW = 256  # tokens
IDS = 1024  # of the vocabulary: the head is not counted


def run_of(backbone: Any, d_model: int, tokens: int, combo_kernels: bool = False) -> Any:
    """A language model on a backbone, with one layer of each of its mixers."""
    from mm.plan.launches import one_of_each
    from mm.registry import BACKBONES
    from mm.run import Run

    data = {"kind": "packed", "sources": [{"path": "absent"}], "seq_len": tokens, "batch_size": 1}
    stage = {"data": data, "objective": "next_token", "optimizer": "adamw"}
    run = Run.model_validate(
        {
            "name": "launches",
            "vocabulary": "absent",
            "model": {"kind": "lm", "d_model": d_model, "backbone": backbone},
            "stages": [stage],
            "engine": {"compile": True, "combo_kernels": combo_kernels},
        }
    )
    shallow = one_of_each(BACKBONES.parse(backbone))
    model = run.model.model_copy(update={"backbone": shallow})
    return run.model_copy(update={"model": model})


def backbones() -> dict[str, Any]:
    """The dense transformer, then every file of configs/backbone/, by name."""
    from mm import config

    folder = ROOT / "configs" / "backbone"
    named = {f.stem: config.read(f) for f in sorted(folder.glob("*.yaml"))}
    hybrid = {"kind": "stack", "pattern": "gated_deltanet attention"}
    return {"attention": {"kind": "stack", "pattern": "attention"}, "hybrid": hybrid} | named


def rows_of(
    backbone: Any,
    d_model: int,
    tokens: int,
    documents: int,
    compiled: bool = True,
    combo_kernels: bool = False,
) -> list[Any]:
    """Launches of each kind of block of a backbone."""
    from mm.plan.inputs import Assumed, open_subject
    from mm.plan.launches import step_launches

    run = run_of(backbone, d_model, tokens, combo_kernels)
    subject = open_subject(run, 0, "autocast_bf16", Assumed(tokens // documents, IDS))
    return step_launches(run, 0, subject.vocabulary, subject.batches(1)[0], compiled)[0]


def budget(
    names: Sequence[str], d_model: int, tokens: int, combo_kernels: bool = False
) -> Iterator[dict[str, Any]]:
    """A row a kind of block: plain and packed, eager and compiled.

    Where a layer walks over the tokens, the row is of `FEW`: one of thousands takes minutes.
    """
    from mm.plan.launches import MOST

    for name in names:
        tried = rows_of(backbones()[name], d_model, min(FEW, tokens), 1, compiled=False)
        taken = FEW if any(row.eager > MOST for row in tried) else tokens
        one, many = (
            rows_of(backbones()[name], d_model, taken, n, combo_kernels=combo_kernels)
            for n in (1, PACKED)
        )
        for plain, packed in zip(one, many, strict=True):
            yield {
                "backbone": name,
                "layer": plain.name,
                "tokens": taken,
                "eager": plain.eager,
                "compiled": plain.compiled,
                "packed eager": packed.eager,
                "packed compiled": packed.compiled,
                "graphs": max(plain.graphs, packed.graphs),
                "refusals": [*plain.refusals, *packed.refusals],
                "most frequent": plain.kernels.most_common(6),
            }


def main(words: Sequence[str] | None = None) -> int:
    from mm.plan.launches import GOAL

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(backbones()), help="comma-separated")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048, help="of the row")
    parser.add_argument("--combo-kernels", action="store_true", help="as the engine's setting")
    parser.add_argument("--json", type=Path, help="also write the rows")
    asked = parser.parse_args(words)
    warnings.simplefilter("ignore")
    columns = ("tokens", "eager", "compiled", "packed eager", "packed compiled", "graphs")
    print(f"{'backbone':22}{'layer':34}" + "".join(f"{c:>17}" for c in columns))
    rows = []
    for row in budget(asked.only.split(","), asked.d_model, asked.tokens, asked.combo_kernels):
        rows.append(row)
        cells = ["–" if row[c] is None else str(row[c]) for c in columns]
        print(f"{row['backbone']:22}{row['layer']:34}" + "".join(f"{c:>17}" for c in cells))
        often = ", ".join(f"{op.partition('::')[2]} {n}" for op, n in row["most frequent"])
        print(f"{'':22}{often}", flush=True)
        for why in row["refusals"]:
            print(f"{'':22}no CUDA graph: {why}")
    within = sum(1 for r in rows if r["compiled"] is not None and r["compiled"] <= GOAL)
    print(f"{within} of {len(rows)} kinds of layers launch at most {GOAL} kernels compiled")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
