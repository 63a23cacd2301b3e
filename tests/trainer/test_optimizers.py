"""Every registered optimizer: resume, ZeRO stages, oracles, refusals; EMA, schedules, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_toys as toys
from pydantic import ValidationError
from thinned import only
from torch import nn
from trainer_runs import losses, make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.registry import OPTIMIZERS
from mm.run import Run
from mm.schedule import Ema, Schedule
from mm.trainer.loop import INTERRUPTED, train
from mm.trainer.optimizers.muon import orthogonalize
from mm.trainer.stage import make_module

KINDS = sorted(OPTIMIZERS)
STAGES = [0, 1, 2, 3]
SOME = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
# Stage 3 takes seconds a run: by default optimizers of single values and of matrices.
BY_DEFAULT = ("adamw", "muon")
RESUMED = [
    pytest.param(
        kind,
        stage,
        marks=pytest.mark.slow if stage in (1, 2) or stage and kind != "muon" else (),
    )
    for kind in KINDS
    for stage in STAGES
]
RATES = {"lion": 2e-3, "sgd_sai": 5e-3}


def optimizer_run(out: Path, name: str, kind: str, *, steps: int, **change: Any) -> Run:
    """A run of the toy model with an optimizer and an EMA."""
    settings = change.pop("optimizer", {})
    ema = change.pop("ema", {"decay": 0.9})
    shape = "constant" if OPTIMIZERS.get(kind).own_schedule else "wsd"  # type: ignore[attr-defined]
    values = make_run(out, name, steps=steps, **change).to_dict()
    values["stages"][0]["optimizer"] = {"kind": kind, "lr": RATES.get(kind, 1e-2), **settings}
    values["stages"][0]["schedule"] = {"shape": shape, "warmup": 2}
    values["stages"][0]["ema"] = ema
    return Run.model_validate(values)


def saved(run: Run, step: int, kind: str) -> dict[str, torch.Tensor]:
    return toys.load_file(str(run.folder / f"checkpoints/step_{step:06d}/{kind}.safetensors"))


@pytest.mark.parametrize(("kind", "stage"), RESUMED)
def test_law_resume_is_bitwise(tmp_path: Path, kind: str, stage: int) -> None:
    """Train 10 = train 5, stop, train 5: losses, weights, every state, EMA and exported model."""
    change: dict[str, Any] = {"steps": 10, "stage": stage, "checkpoints": {"every": 0}}
    whole = optimizer_run(tmp_path, "whole", kind, **change)
    train(whole)
    halves = optimizer_run(tmp_path, "halves", kind, data={"signal_at": 4}, **change)
    with pytest.raises(SystemExit) as stopped:
        train(halves)
    assert stopped.value.code == INTERRUPTED and len(rows(halves)) == 5
    assert train(halves)["resumed_from"] == 5
    assert losses(whole) == losses(halves)
    assert losses(whole)[-1] < losses(whole)[0]
    for file in ("model", "model.optimizer"):
        a, b = saved(whole, 10, file), saved(halves, 10, file)
        assert a.keys() == b.keys() and a
        for key in a:
            assert torch.equal(a[key], b[key]), key
    a, b = toys.load_toy(whole.folder), toys.load_toy(halves.folder)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", only(KINDS, "adamw"))
def test_law_stages_are_equal_and_another_stage_goes_on(tmp_path: Path, kind: str) -> None:
    """Runs that change their ZeRO stage at step 3 have the losses of one that stays at stage 0."""
    whole = optimizer_run(tmp_path, "whole", kind, steps=6, stage=0)
    train(whole)
    for first, then in ((0, 2), (3, 0), (1, 3)):
        name = f"from{first}"
        half = optimizer_run(tmp_path, name, kind, steps=6, stage=first, data={"signal_at": 2})
        with pytest.raises(SystemExit):
            train(half)
        on = optimizer_run(tmp_path, name, kind, steps=6, stage=then)
        assert train(on)["resumed_from"] == 3
        assert losses(on) == pytest.approx(losses(whole), rel=5e-6), (first, then)


# ---- each against something that is not the same code


def steps_of(kind: str, grads: list[torch.Tensor], **settings: Any) -> list[torch.Tensor]:
    """Weights of a matrix after each of ``grads``, from zero-free start, on one tensor."""
    net = nn.Linear(grads[0].shape[1], grads[0].shape[0], bias=False)
    with torch.no_grad():
        net.weight.copy_(start(grads[0].shape))
    optimizer = OPTIMIZERS.get(kind).model_validate({"kind": kind, **settings}).build(net)
    out = []
    for g in grads:
        net.weight.grad = g.clone()
        optimizer.step()
        out.append(net.weight.detach().clone())
    return out


def start(shape: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def some_grads(n: int = 4, shape: tuple[int, int] = (6, 10)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g) for _ in range(n)]


def torch_steps(make: Any, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    p = nn.Parameter(start(grads[0].shape))
    optimizer, out = make([p]), []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        out.append(p.detach().clone())
    return out


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 10), (12, 5)])
def test_muon_is_as_torchs_own(scale: Any, shape: tuple[int, int]) -> None:
    """torch.optim.Muon iterates in bfloat16: equal to its precision."""
    grads = some_grads(shape=shape)
    mine = steps_of("muon", grads, lr=0.1, scale=scale, weight_decay=0.5)
    make = lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.5, adjust_lr_fn=scale)
    for a, b in zip(mine, torch_steps(make, grads), strict=True):
        assert torch.allclose(a, b, atol=5e-3)


def test_muon_orthogonalises() -> None:
    m = some_grads(1, (24, 9))[0].double()
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    ours = u.T @ orthogonalize(m) @ vt.T
    assert (ours - ours.diagonal().diag()).abs().max() < 0.05
    assert 0.6 < ours.diagonal().min() and ours.diagonal().max() < 1.3


def test_muons_other_half_is_torchs_adamw() -> None:
    grads = some_grads()
    mine = steps_of("muon", grads, lr=0.1, adamw=["weight"], weight_decay=0.3)
    make = lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.98), weight_decay=0.3)
    for a, b in zip(mine, torch_steps(make, grads), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_factored_adafactor_is_as_torchs_own() -> None:
    """torch.optim.Adafactor always has the relative rate; eps1 None is its dtype's."""
    grads = some_grads()
    mine = steps_of(
        "adafactor", grads, lr=0.1, factored=True, relative=True, eps=1e-30, weight_decay=0.3
    )
    eps = (1e-30, 1e-3)
    make = lambda p: torch.optim.Adafactor(p, lr=0.1, eps=eps, d=1.0, weight_decay=0.3)
    # its rate is min(lr, t ** -0.5): lr here
    for a, b in zip(mine, torch_steps(make, grads), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_unfactored_adafactor_keeps_the_whole_second_moment() -> None:
    grads = some_grads()
    found = steps_of("adafactor", grads, lr=0.1, weight_decay=0.0)
    x, v = start((6, 10)).double(), torch.zeros(6, 10, dtype=torch.float64)
    for t, g in enumerate(grads, 1):
        v = (1 - t**-0.8) * v + t**-0.8 * g.double() ** 2
        u = g.double() / v.sqrt()
        x = x - 0.1 * u / max(1.0, float((u**2).mean() ** 0.5))
        assert torch.allclose(found[t - 1].double(), x, atol=1e-5)


def test_lion_takes_signs() -> None:
    grads = some_grads()
    found = steps_of("lion", grads, lr=0.1, weight_decay=0.5)
    x, m = start((6, 10)).double(), torch.zeros(6, 10, dtype=torch.float64)
    for t, g in enumerate(grads):
        x = x - 0.1 * (torch.sign(0.9 * m + 0.1 * g.double()) + 0.5 * x)
        m = 0.99 * m + 0.01 * g.double()
        assert torch.allclose(found[t].double(), x, atol=1e-6)


def test_sgd_sai_measures_its_rate_once() -> None:
    """One state tensor; the rate is the first gradient's norm over its spread."""
    grads = [some_grads(1)[0] + 0.7, *some_grads(3)]
    found = steps_of("sgd_sai", grads, lr=0.1, weight_decay=0.5)
    x, m = start((6, 10)).double(), grads[0].double()
    rate = grads[0].double().norm() / grads[0].double().std()
    for t, g in enumerate(grads):
        m = m if t == 0 else 0.9 * m + 0.1 * g.double()
        x = 0.95 * x - 0.1 * rate * m
        assert torch.allclose(found[t].double(), x, atol=1e-4)
    net = nn.Linear(3, 1)
    optimizer = OPTIMIZERS.parse("sgd_sai").build(net)
    net(torch.ones(2, 3)).sum().backward()  # gradients without spread, one of one element
    optimizer.step()
    rates = [float(s["rate"]) for s in optimizer.state.values()]
    assert rates == pytest.approx([3**0.5, 1.0])
    assert [sorted(s) for s in optimizer.state.values()] == [["momentum", "rate", "step"]] * 2


def test_schedule_free_averages_what_the_plain_steps_visit() -> None:
    """x, kept apart in float64, is what `average` makes of y and z."""
    grads, (b1, b2), lr = some_grads(6), (0.9, 0.98), 0.1
    net = nn.Linear(10, 6, bias=False)
    with torch.no_grad():
        net.weight.copy_(start((6, 10)))
    values = {"kind": "schedule_free_adamw", "lr": lr, "weight_decay": 0.3}
    config = OPTIMIZERS.get("schedule_free_adamw").model_validate(values)
    optimizer = config.build(net)
    x = z = start((6, 10)).double()
    v, total = torch.zeros(6, 10, dtype=torch.float64), 0.0
    for t, g in enumerate(grads, 1):
        y = (1 - b1) * z + b1 * x
        assert torch.allclose(net.weight.detach().double(), y, atol=1e-5)
        net.weight.grad = g.clone()
        optimizer.step()
        v = b2 * v + (1 - b2) * g.double() ** 2
        rate = lr * (1 - b2**t) ** 0.5
        z = z - rate * (g.double() / (v.sqrt() + 1e-8) + 0.3 * y)
        total += rate**2
        x = x + (rate**2 / total) * (z - x)
        found = config.average(net.weight.detach(), optimizer.state[net.weight])
        assert torch.allclose(found.double(), x, atol=1e-5)


# ---- refusals, groups, EMA, schedules


def test_what_a_stage_cannot_do_is_refused_by_name_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'adafactor' as set needs whole tensors.*stage 2"):
        optimizer_run(tmp_path, "a", "adafactor", steps=2, stage=2, optimizer={"factored": True})
    values = make_run(tmp_path).to_dict()
    values["stages"][0]["optimizer"] = {"kind": "schedule_free_adamw"}
    with pytest.raises(ValidationError, match="schedule.shape to constant .it is wsd"):
        Run.model_validate(values)


def test_factored_adafactor_resumes_at_stage_0(tmp_path: Path) -> None:
    change: dict[str, Any] = {"steps": 6, "stage": 0, "optimizer": {"factored": True}}
    whole = optimizer_run(tmp_path, "whole", "adafactor", **change)
    train(whole)
    halves = optimizer_run(tmp_path, "halves", "adafactor", data={"signal_at": 2}, **change)
    with pytest.raises(SystemExit):
        train(halves)
    train(halves)
    a, b = saved(whole, 6, "model.optimizer"), saved(halves, 6, "model.optimizer")
    assert a["row/up.weight"].shape == (64,) and a["column/up.weight"].shape == (16,)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_optimizer_in_the_middle_is_refused(tmp_path: Path) -> None:
    train(optimizer_run(tmp_path, "run", "adamw", steps=3))
    with pytest.raises(UserError, match="no optimizer state 'z/.*another optimizer"):
        train(optimizer_run(tmp_path, "run", "schedule_free_adamw", steps=4))


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_weight_decay_groups(decay: str) -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(4, 3), "up": nn.Linear(3, 5), "n": nn.LayerNorm(5)})
    settings = {"kind": "adamw", "decay": decay, "weight_decay": 0.2}
    names = {p: name for name, p in net.named_parameters()}
    groups = OPTIMIZERS.parse(settings).build(net).param_groups
    found = {names[p]: g["weight_decay"] for g in groups for p in g["params"]}
    decayed = set(names.values()) if decay == "all" else {"up.weight"}
    assert found == {name: 0.2 if name in decayed else 0.0 for name in names.values()}


@pytest.mark.parametrize("stage", only([0, 3], 3))
def test_ema_is_saved_and_exported(tmp_path: Path, stage: int) -> None:
    """The exported model is the average of the checkpoints' weights, or the last ones if asked."""
    change: dict[str, Any] = {"steps": 4, "stage": stage}
    change["checkpoints"] = {"every": 1, "keep_last": 9}
    run = optimizer_run(tmp_path, "ema", "adamw", **change)
    train(run)
    plain = optimizer_run(tmp_path, "plain", "adamw", ema={"decay": 0.9, "export": False}, **change)
    train(plain)
    assert losses(run) == losses(plain)
    first = make_module(run.model, toys.vocabulary(), run.seed, torch.device("cpu"))
    average = first.up.weight.detach().clone()
    for step in range(1, 5):
        keep = min(0.9, step / (9 + step))
        average = keep * average + (1 - keep) * saved(run, step, "model")["up.weight"]
    assert torch.allclose(toys.load_toy(run.folder)["up.weight"], average, atol=1e-6)
    last = saved(plain, 4, "model")["up.weight"]
    assert torch.equal(toys.load_toy(plain.folder)["up.weight"], last)
    assert not torch.allclose(last, average, atol=1e-4)


def test_an_ema_may_begin_in_the_middle(tmp_path: Path) -> None:
    train(optimizer_run(tmp_path, "run", "lion", steps=3, ema=None))
    run = optimizer_run(tmp_path, "run", "lion", steps=4)
    train(run)
    before, after = saved(run, 3, "model")["up.weight"], saved(run, 4, "model")["up.weight"]
    found = saved(run, 4, "model.optimizer")["ema/up.weight"]
    assert torch.allclose(found, before + 0.9 * (after - before), atol=1e-6)
    assert Ema(decay=0.999).keep(10**6) == 0.999


def test_schedules_are_pure_functions_of_the_step() -> None:
    at = lambda shape, step, **kw: Schedule(shape=shape, warmup=10, **kw)(step, 110)
    for shape in ("constant", "cosine", "linear", "wsd"):
        assert [at(shape, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0], rel=0.02)
    assert at("constant", 109) == 1
    assert at("cosine", 60) == pytest.approx(0.5) and at("linear", 60) == pytest.approx(0.5)
    assert at("cosine", 35) == pytest.approx(0.8536, abs=1e-4)
    assert at("linear", 110, floor=0.1) == pytest.approx(0.1)
    assert at("wsd", 54, decay=0.5) == 1 and at("wsd", 99, decay=0.2) == pytest.approx(0.5)
    for shape in ("cosine", "linear", "wsd"):
        falls = [at(shape, s) for s in range(10, 111)]
        assert falls == sorted(falls, reverse=True) and falls[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("stage", only(STAGES, 0))
def test_a_network_that_follows_another(tmp_path: Path, stage: int) -> None:
    """mode "ema": the same losses at every stage; saved and resumed; the average it says it is."""
    change: dict[str, Any] = {"stage": stage, "objective": "toy_teacher", "steps": 4}
    whole = make_run(tmp_path, "whole", checkpoints={"every": 1, "keep_last": 9}, **change)
    train(whole)
    reference = make_run(tmp_path, "reference", **{**change, "stage": 0})
    train(reference)
    for name in ("loss/nll", "loss/near"):
        a, b = ([row[name] for row in rows(run)] for run in (whole, reference))
        assert a == pytest.approx(b, rel=2e-5, abs=1e-9), name
    assert rows(whole)[0]["loss/near"] == 0 < rows(whole)[1]["loss/near"]
    for step in (2, 3, 4):
        before, after = saved(whole, step - 1, "teacher"), saved(whole, step, "teacher")
        model = saved(whole, step, "model")
        wanted = 0.8 * before["up.weight"] + 0.2 * model["up.weight"]
        assert torch.allclose(after["up.weight"], wanted, atol=1e-6)
        assert torch.equal(after["seen"], model["seen"])
    halves = make_run(tmp_path, "halves", data={"signal_at": 1}, **change)
    with pytest.raises(SystemExit):
        train(halves)
    assert train(halves)["resumed_from"] == 2
    assert losses(halves) == losses(whole)
    a, b = saved(whole, 4, "teacher"), saved(halves, 4, "teacher")
    assert all(torch.equal(a[k], b[k]) for k in a)
