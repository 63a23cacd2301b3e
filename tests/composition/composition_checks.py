"""The law composed = alone over a case. B rows, T tokens."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from composition_cases import MASKS, Call, Piece, Step, lay, steps
from composition_cases import packed_rows as whole_rows
from composition_configs import Case, Refused, build
from torch import Tensor, nn

from mm.batch import Sum
from mm.errors import UserError
from mm.model.context import Ctx
from mm.model.layer import Backbone, Layer, ModelOut, Out
from mm.model.model import Model

RTOL, ATOL = 1e-7, 1e-8


class Fault(NamedTuple):
    """Which part of the law does not hold, and by how much."""

    check: str
    message: str


# ---- one pass ----


def run(model: Model, case: Case, call: Call, state: Any = None, **settings: Any) -> ModelOut:
    if case["mask"] == "window":
        settings["mask"] = MASKS["window"]
    settings.setdefault("return_intermediates", frozenset({"drafts"}))
    return model(call.batch, state=state, path=case.get("path"), loss=False, **settings)


def said(dist: Any) -> list[Tensor]:
    """`(P, .)` of each place: logits, the mean of a density, the first frame of alignments."""
    found = [getattr(dist, "logits", None), getattr(dist, "mean", None)]
    found += [dist.drafts.flatten(1)] if hasattr(dist, "drafts") else []
    found += [dist.log_probs[:, 0]] if hasattr(dist, "log_probs") else []
    known = [t for t in found if t is not None]
    assert known, type(dist)
    return known


def outputs(out: ModelOut, call: Call) -> list[Tensor]:
    """`(L, .)` of each piece: hidden states and what every head says at each place."""
    parts = [out.hidden.flatten(0, 1)]
    for head in out.heads.values():
        parts += said(head.dist)
    y = torch.cat(parts, -1)
    return [y[at] for at in call.at]


def difference(got: Tensor, wanted: Tensor, scale: float = 0.0) -> str | None:
    """What to say of two tensors that are not the same; ``scale``.

    The largest number that sums behind them may have held, whose rounding is no difference.
    """
    if got.shape != wanted.shape:
        return f"shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if torch.allclose(got, wanted, rtol=RTOL, atol=ATOL + 1e-13 * scale):
        return None
    far = (got - wanted).abs().flatten(1) if got.dim() > 1 else (got - wanted).abs()[:, None]
    worst = far.amax(1)
    places = (~(worst <= 1e-6)).nonzero()[:, 0].tolist() if len(worst) else []
    return f"differs by {float(far.max()):.3g} at {places[:12]}"


# ---- every layer alone ----


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[Layer, Tensor, Ctx, Any, Out]]]:
    """Calls of every layer but backbones: the layer, its input, Ctx and State, and its Out."""
    calls: list[tuple[Layer, Tensor, Ctx, Any, Out]] = []

    def hook(layer: Any, args: tuple[Any, ...], out: Any) -> None:
        x, ctx, *state = args
        calls.append((layer, x, ctx, state[0] if state else None, out))

    handles = [
        m.register_forward_hook(hook)
        for m in model.modules()
        if isinstance(m, Layer) and not isinstance(m, Backbone)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def own_context(ctx: Ctx) -> Ctx:
    """``ctx`` without what was made of its layout and mask: the layer makes its own."""
    return replace(ctx, layout=replace(ctx.layout))


# ---- the law ----


def faults(case: Case, chunks: bool = True) -> Iterator[Fault]:
    """What does not hold, cheapest first; ``chunks``: cut documents at random borders, too.

    Raises:
        Refused: the composition is refused, when it is built or (`RefusedLate`) when it runs.
    """
    model = build(case)
    model.train()
    names = [name for name, _ in model.named_parameters()]
    weights = list(model.parameters())
    n = len(case["documents"])
    try:
        alone = [
            lay(case, [[Piece(i, 0, d["length"])]], spare=False)
            for i, d in enumerate(case["documents"])
        ]
        wanted = [outputs(run(model, case, call), call)[0] for call in alone]
    except UserError as error:
        raise RefusedLate(str(error)) from error
    readers = [
        torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(i))
        for i, y in enumerate(wanted)
    ]

    def gradients(ys: list[Tensor]) -> tuple[Tensor | None, ...]:
        loss = sum((y * r).sum() for y, r in zip(ys, readers, strict=True))
        return torch.autograd.grad(loss, weights, allow_unused=True)  # type: ignore[arg-type]

    wanted_gradients = gradients(wanted)
    wanted = [y.detach() for y in wanted]

    # Packed rows = separate documents; every layer in it = the layer alone.
    call = lay(case, whole_rows(case), pad=1)
    with recorded(model) as calls:
        out = run(model, case, call)
    got = outputs(out, call)
    for p, y in zip(call.pieces, got, strict=True):
        if (far := difference(y.detach(), wanted[p.document])) is not None:
            yield Fault("packed = separate", f"document {p.document}: {far}")
    qualified = {m: name for name, m in model.named_modules()}
    with torch.no_grad():
        for layer, x, ctx, _, done in calls:
            y = layer(x, own_context(ctx)).y
            real = ctx.layout.fields.document > 0
            if (far := difference(done.y[real].detach(), y[real])) is not None:
                yield Fault("composed = alone", f"{qualified[layer]}: {far}")
    found = gradients(got)
    # Where a layer divides by almost nothing, gradients are large and cancel.
    largest = max((float(g.abs().max()) for g in wanted_gradients if g is not None), default=0.0)
    for name, a, b in zip(names, found, wanted_gradients, strict=True):
        if a is None and not case.get("path"):
            yield Fault("every parameter is used", name)
        zero = lambda g, other: torch.zeros_like(other) if g is None else g
        if a is not None or b is not None:
            a, b = zero(a, b), zero(b, a)
            far = difference(a.reshape(-1, 1), b.reshape(-1, 1), largest)
            if far is not None:
                yield Fault("packed = separate", f"gradient of {name}: {far}")

    # Serving = training, in whole documents and in chunks.
    if case["mask"] != "full":
        in_slots = [[p._replace(slot=p.document) for p in row] for row in whole_rows(case)]
        plans = {"serving = training": [Step(in_slots[::-1])]}
        # The mean over a document is that of no part of it.
        if chunks and not any(getattr(h, "pool", "") == "mean" for h in model.heads.values()):
            plans["chunked = whole"] = list(steps(case, random.Random(case["seed"])))
        length = max(d["length"] + sum(_spare(d)) for d in case["documents"])
        for check, plan in plans.items():
            with torch.no_grad():
                state = model.initial_state(n, length, case.get("path"))
                for rows, accepted in plan:
                    call = lay(case, rows, pad=len(rows) % 2)
                    out = run(model, case, call, state, draft=accepted is not None)
                    state = out.state
                    if accepted is not None and state is not None:
                        state = state.accept(torch.tensor(accepted))
                    for p, y in zip(call.pieces, outputs(out, call), strict=True):
                        far = difference(y, wanted[p.document][p.start : p.stop])
                        if far is not None:
                            said = f"document {p.document}, tokens {p.start} to {p.stop}: {far}"
                            yield Fault(check, said)

    # Statistics arrive at their module.
    yield from statistics(model, case, n)


class RefusedLate(Refused):
    """Refused when it runs, though its config was accepted."""


def _spare(document: dict[str, Any]) -> Iterator[int]:
    if document.get("item"):
        yield document["item"][2] - document["item"][1]


def listeners(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that take statistics for themselves: `after_step` of their own, and buffers."""
    return {
        name: m
        for name, m in model.named_modules()
        if name
        and callable(getattr(m, "after_step", None))
        and getattr(type(m), "after_step", None) is not Layer.after_step
        and any(b.is_floating_point() for b in m.buffers(recurse=False))
    }


@contextmanager
def listening(modules: dict[str, nn.Module], given: dict[str, dict[str, Sum]]) -> Iterator[None]:
    """Note what each module's `after_step` is given, and pass it on."""

    def spy(name: str, m: nn.Module) -> None:
        after = m.after_step

        def told(stats: Any) -> None:
            given[name] = given.get(name, {}) | dict(stats)
            after(stats)  # type: ignore[operator]

        m.after_step = told  # type: ignore[assignment]

    for name, m in modules.items():
        spy(name, m)
    try:
        yield
    finally:
        for m in modules.values():
            del m.after_step


def statistics(model: Model, case: Case, n: int) -> Iterator[Fault]:
    own = listeners(model)
    if not own:
        return
    call = lay(case, whole_rows(case), pad=1)
    with recorded(model) as calls:
        out = run(model, case, call)
    alone = {name: copy.deepcopy(m) for name, m in own.items()}
    wanted, given = {}, {}
    with torch.no_grad():
        for name, m in own.items():
            sums: dict[str, Sum] = {}
            for layer, _, _, _, done in calls:
                if layer is m:
                    for key, value in done.aux.items():
                        sums[key] = sums[key] + value if key in sums else value
            for key, value in sums.items():
                there = out.aux.get(key)
                if not key.startswith(f"{name}."):
                    yield Fault("losses are reported by name", f"{name}: {key}")
                elif there is None:
                    yield Fault("losses are reported by name", f"{key} is lost")
                elif far := difference(there.total.reshape(-1, 1), value.total.reshape(-1, 1)):
                    yield Fault("losses are reported by name", f"{key}: {far}")
            wanted[name] = {k.removeprefix(f"{name}."): v.detach() for k, v in sums.items()}
            alone[name].after_step(wanted[name])  # type: ignore[operator]
        before = {name: [b.clone() for b in m.buffers()] for name, m in own.items()}
        with listening(own, given):
            model.after_step({k: v.detach() for k, v in out.aux.items()})
        for name, m in own.items():
            told = given.get(name, {})
            if told.keys() != wanted[name].keys():
                yield Fault("statistics arrive", f"{name}: told {[*told]}, not {[*wanted[name]]}")
            for old, a, b in zip(before[name], m.buffers(), alone[name].buffers(), strict=True):
                if (far := difference(a.reshape(-1, 1), b.reshape(-1, 1))) is not None:
                    still = "did not move" if torch.equal(old, a) else far
                    yield Fault("statistics arrive", f"{name}: {still}")


def first_fault(case: Case, chunks: bool = True) -> Fault | None:
    """The first fault of a case; an error that is no refusal is one, too."""
    try:
        return next(faults(case, chunks), None)
    except Refused:
        raise
    except Exception as error:  # noqa: BLE001  whatever a composition raises is a finding
        return Fault(f"raises {type(error).__name__}", " ".join(str(error).split())[:200])
