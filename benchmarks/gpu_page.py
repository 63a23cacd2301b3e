"""Tables of docs/how-to/gpu.md that come from the code: ops, mixers of many launches, predictions.

python benchmarks/gpu_page.py [--write] [--only ops,mixers,predictions]

No GPU is asked: everything is counted on fake CUDA tensors, as on an H100. A table stands between
two comments that name it; `--write` puts it there anew, without it the tables are printed.
"""

from __future__ import annotations

import argparse
import re
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from op_calls import Call
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from mm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "gpu.md"
T, H, K, D = 512, 8, 128, 1024  # tokens, heads and their width, model: of the calls below
LONG = 1024  # tokens of the second call, which shows what grows
FEW = (128, 256)  # tokens of the calls of a mixer
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def calls() -> dict[str, tuple[str, Call]]:
    """Op and its arguments by what the table calls it; a call of a training step."""
    from op_calls import Sizes, op_calls

    from mm.plan.fake_cuda import CUDA

    return op_calls(CUDA, Sizes(H, D))


# ---- ops ----


def launches_of(op: Any, way: str, given: tuple[Any, ...]) -> tuple[int, int | None, float]:
    """Kernels forward and backward of one implementation; None: it has no backward. Operations."""
    from mm.plan.fake_cuda import grad
    from mm.plan.launches import Launches

    ahead, back = Launches(), Launches()
    with op.using(way), ahead:
        made = op(*given)
    y, *rest = made if isinstance(made, tuple) else (made,)
    if not y.requires_grad:
        return ahead.total, None, ahead.flops
    # Not of states, which training drops; without a graph of the gradients, as the engine does.
    outs = [y, *(o for o in rest if o.shape == y.shape)]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    with back:
        grad(outs, leaves, [torch.empty_like(o) for o in outs])
    return ahead.total, back.total, ahead.flops


def cell(op: Any, way: str, call: Call) -> tuple[str, float]:
    """Forward and backward launches of an implementation, and how they grow; operations.

    References walk over the tokens: few say how they grow.
    """
    from mm.plan.fake_card import fake_card
    from mm.plan.fake_cuda import fake_cuda

    short, long = (16, 32) if way == "reference" else (T, LONG)
    with fake_cuda() as reads, fake_card():
        try:
            found = launches_of(op, way, call(short, torch.bfloat16, K))
        except DynamicOutputShapeException:
            return "not counted: a size that values say", 0.0
        asks = "; reads the device" if reads.places else ""
        longer = launches_of(op, way, call(long, torch.bfloat16, K))
    many, more = (sum(n or 0 for n in counts[:2]) for counts in (found, longer))
    numbers = " + ".join("–" if n is None else str(n) for n in found[:2])
    if more > 1.3 * many:
        numbers = f"{(more - many) / (long - short):,.2g} a token"
    return numbers + asks, found[2]


def choice(op: Any, call: Call) -> tuple[str, str, str, str | None]:
    """What runs, the dtypes that it takes, why it refuses others, and what runs then."""
    given = call(T, torch.bfloat16, K)
    taken = op.pick(*given)
    why_not = lambda way, *given: op.implementations[way][1](*given)
    able = [way for way in op.candidates(*given) if why_not(way, *given) is None]
    other = next((way for way in able[able.index(taken) + 1 :]), None)
    dtypes = [str(d).removeprefix("torch.") for d in DTYPES if op.pick(*call(T, d, K)) == taken]
    asked = ((torch.float64, K), (torch.bfloat16, 512), (torch.float32, K))
    refused = dict.fromkeys(why_not(taken, *call(T, d, k)) for d, k in asked)
    return taken, ", ".join(dtypes), "; ".join(r for r in refused if r) or "–", other


def op_rows() -> Iterator[tuple[str, ...]]:
    """A row a call."""
    from mm.kernels.op import Op
    from mm.plan.fake_card import fake_card
    from mm.plan.fake_cuda import fake_cuda

    for name, (op_name, call) in calls().items():
        op = Op.every[op_name]
        with fake_cuda(), fake_card():
            taken, dtypes, refused, other = choice(op, call)
        launches, flops = cell(op, taken, call)
        then = "–" if other is None else f"`{other}`: {cell(op, other, call)[0]}"
        operations = f"{flops / 1e9:.2g}" if flops else "–"
        yield name, f"`{taken}`", launches, dtypes, operations, refused, then


def ops_table() -> list[str]:
    columns = (
        "op", "on a GPU", "launches forward + backward", "dtypes", "GFLOP forward",
        "refuses", "then",
    )  # fmt: skip
    return table(columns, op_rows())


# ---- mixers ----


def growing() -> list[str]:
    """Mixers whose launches grow with the tokens: over 1.3 times at twice as many."""
    from gpu_parts import words

    found: list[tuple[str, ...]] = []
    alone: list[str] = []
    for word in words():
        try:
            few, many = (mixer_launches(word, tokens) for tokens in FEW)
            grows = many > 1.3 * few
            if grows and many < 1.9 * few:  # or other kernels are chosen from a length on
                grows = mixer_launches(word, 2 * FEW[1]) > 1.3 * many
        except (UserError, ValueError):
            alone.append(word)
            continue
        if grows:
            found.append((f"`{word}`", f"{few:,}", f"{many:,}"))
    found.append(("not counted", ", ".join(alone), "need an encoder, or settings"))
    return table(("mixer", *(f"launches forward, {n} tokens" for n in FEW)), found)


def _by_cudnn(x: Tensor, state: Any, *_: Any) -> tuple[Tensor, ...]:
    """`torch.gru` and its like as one launch: here there is no cuDNN, which a GPU has."""
    states = state if isinstance(state, tuple) else (state,)
    return (x.new_zeros(*x.shape[:2], states[0].shape[-1]), *states)


def mixer_launches(word: str, tokens: int) -> int:
    """Kernels of a mixer's forward, width 256, on one document, its settings the defaults."""
    from gpu_parts import layer_of

    from mm.layout import Doc, Layout
    from mm.mask import Causal, Full
    from mm.model.backbones.stack import StackConfig
    from mm.model.context import Ctx
    from mm.plan.fake_card import fake_card
    from mm.plan.fake_cuda import CUDA, fake_cuda
    from mm.plan.launches import Launches

    with fake_cuda(), fake_card():
        with torch.device(CUDA):
            try:
                layer = StackConfig(pattern=word).mixer(word).build(256)
            except ValueError:  # it asks for settings
                layer = layer_of(word, 256)
        layout = Layout.from_rows([[Doc(tokens)]], tokens)
        ids = torch.zeros(1, tokens, 1, dtype=torch.int32, device=CUDA)
        x = torch.empty(1, tokens, 256, device=CUDA)
        ctx = Ctx(layout.to(CUDA), Causal() if layer.caps.causal else Full(), ids)
        cells = {"gru": _by_cudnn, "lstm": _by_cudnn, "rnn_tanh": _by_cudnn}
        with unittest.mock.patch.multiple(torch, **cells), Launches() as found:
            with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
                layer(x, ctx)
    return found.total


# ---- predictions ----


def predictions() -> list[str]:
    from gpu_predictions import CARDS, COLUMNS, MODELS, rows

    return table(COLUMNS, rows(list(MODELS), CARDS))


# ---- the page ----


def table(columns: Sequence[str], rows: Any) -> list[str]:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


TABLES: dict[str, Callable[[], list[str]]] = {
    "ops": ops_table,
    "mixers": growing,
    "predictions": predictions,
}


def block(name: str) -> re.Pattern[str]:
    """Where a table stands in the page."""
    return re.compile(rf"(<!-- {name}: [^\n]*-->\n\n)(.*?)(\n\n<!-- end -->)", re.DOTALL)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the page")
    parser.add_argument("--only", default=",".join(TABLES), help="comma-separated")
    asked = parser.parse_args(words)
    warnings.simplefilter("ignore")
    import_kernels()
    for name in asked.only.split(","):
        made = "\n".join(TABLES[name]())
        print(made, flush=True)
        if asked.write:
            text = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(
                block(name).sub(lambda m, made=made: m[1] + made + m[3], text), encoding="utf-8"
            )
    return 0


def import_kernels() -> None:
    """All ops, so that they are registered."""
    import importlib
    import pkgutil

    import mm.kernels

    for module in pkgutil.iter_modules(mm.kernels.__path__):
        importlib.import_module(f"mm.kernels.{module.name}")


if __name__ == "__main__":
    sys.exit(main())
