"""Parts of a training step alone: gradients, optimizers, networks, forward-only passes, saves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.batch import Batch, Sum
from mm.errors import UserError
from mm.objectives.objective import Network
from mm.registry import OPTIMIZERS
from mm.trainer import export, forward_only, ranks
from mm.trainer.begin_weights import load_weights
from mm.trainer.checkpoint import held, resume_check
from mm.trainer.checkpoint.collect import collect
from mm.trainer.checkpoint.save import Moment
from mm.trainer.checkpoint.writer import Writer
from mm.trainer.ema import Averages
from mm.trainer.engine import deepspeed
from mm.trainer.engine.gradients import Gradients, unclip
from mm.trainer.env import Nets
from mm.trainer.health.signals import Stop
from mm.trainer.log.clock import StepClock
from mm.trainer.optimizers.adafactor import Adafactor
from mm.trainer.optimizers.sgd_sai import SgdSai
from mm.trainer.stateful import CarriedStates
from mm.trainer.step import _update

CPU = torch.device("cpu")


class Shards:
    """Of one process at ZeRO stage 0: every parameter is whole."""

    def __init__(self, *named: tuple[str, torch.Tensor]) -> None:
        self.spans = {x: [SimpleNamespace(name=name)] for name, x in named}

    def full(self, x: torch.Tensor, value: torch.Tensor, span: Any) -> torch.Tensor:
        return value

    def sums(self, x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.double().sum().reshape(1) for part in parts])

    def sizes(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([x.numel()])


def test_gradients_are_handed_over_until_nobody_looks() -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    engine: Any = SimpleNamespace(base=optimizer, shards=Shards(("a", a), ("b", b)))
    seen: list[tuple[str, list[float]]] = []
    look = Gradients(engine, ["a", "b"], lambda name, grad: seen.append((name, grad.tolist())))
    a.grad = torch.tensor([1.0, 2.0])  # b has none
    optimizer.step()
    assert seen == [("a", [1.0, 2.0])]
    look.remove()
    optimizer.step()
    assert len(seen) == 1


def test_a_clipped_gradient_is_told_as_it_was() -> None:
    """DeepSpeed divides by the norm and a millionth."""
    assert unclip(0.5, 1.0) == unclip(1.0, 1.0) == unclip(9.0, 0.0) == 1.0
    assert unclip(10.0, 2.0) == pytest.approx(5.0000005, abs=1e-12)


def test_precision_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, want in ((True, "autocast_bf16"), (False, "fp32")):
        monkeypatch.setattr(deepspeed.environment, "cpu_has_bf16", lambda fast=fast: fast)
        # what an old card says of itself where emulation counts
        emulated = lambda including_emulation=True, fast=fast: including_emulation or not fast
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
        assert deepspeed.resolve_precision("auto", CPU) == want
        assert deepspeed.resolve_precision("auto", torch.device("cuda")) != want
        assert deepspeed.resolve_precision("bf16", CPU) == "bf16"


def test_deepspeed_says_nothing_in_a_run_of_any_length(tmp_path: Path) -> None:
    told = deepspeed.deepspeed_json(make_run(tmp_path).engine, "fp32", 1000, deepspeed.here())
    assert told["steps_per_print"] >= 10**9


def test_saved_states_are_not_those_that_train() -> None:
    """The file is written while the next steps change them; the next save takes their memory."""
    x = nn.Parameter(torch.zeros(3))
    moment, whole = torch.ones(3), torch.ones(2)
    found = {"exp_avg": moment, "row": whole, "step": torch.tensor(4.0)}
    engine: Any = SimpleNamespace(
        base=None,
        shards=Shards(("x", x)),
        states=lambda p: found,
        in_memory=lambda p: contextlib.nullcontext(False),
        ema=None,
        zero_stage=0,
    )
    frozen = nn.Linear(2, 2)
    stage: Any = SimpleNamespace(
        engines={}, frozen={"ema": frozen}, from_folders=(), nets=SimpleNamespace(carried=None)
    )
    tensors, scalars = held.states(engine)
    files = held.spread({"optimizer": tensors, **collect(stage)[0]}, 0, 1)
    copies = held.Copies()
    first, finish = copies.of(files)
    finish()
    values = lambda file, made: {k: h.mine.tolist() for k, h in made[file].items()}
    for t in (moment, whole, frozen.weight.detach()):
        t.zero_()
    assert scalars == {"step": 4.0}
    assert values("optimizer", first) == {"exp_avg/x": [1.0] * 3, "row/x": [1.0] * 2}
    assert any(any(row) for row in values("ema", first)["weight"])
    second, finish = copies.of(files)
    assert values("optimizer", second) == values("optimizer", first), "an update waits for it"
    finish()
    assert values("optimizer", second) == {"exp_avg/x": [0.0] * 3, "row/x": [0.0] * 2}
    where = lambda made: [h.mine.data_ptr() for table in made.values() for h in table.values()]
    assert where(first) == where(second)


def test_the_default_optimizer_is_given_its_settings() -> None:
    made = OPTIMIZERS.get("adamw")(lr=0.25, betas=(0.5, 0.75), eps=1e-3).build(nn.Linear(2, 2))
    found = {k: made.defaults[k] for k in ("lr", "betas", "eps", "fused")}
    assert found == {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-3, "fused": True}


def test_factored_moments_are_those_of_the_last_two_axes() -> None:
    """Shazeer & Stern 2018 (arXiv:1804.04235), section 3: of a stack of matrices each its own."""
    state = Adafactor.init_state(SimpleNamespace(), torch.zeros(2, 3, 4), {"factored": True})  # type: ignore[arg-type]
    assert (state["row"].shape, state["column"].shape) == ((2, 3), (2, 4))


def test_a_gradient_of_nothing_has_the_ratio_of_one_without_noise() -> None:
    """Xu et al. 2024 (arXiv:2412.11768): its norm over its deviation; both are nothing here."""
    self: Any = SimpleNamespace(shards=Shards())
    x = torch.zeros(4)
    for g, want in ((torch.zeros(4), 2.0), (torch.full((4,), 3.0), 2.0)):
        assert SgdSai._rates(self, x, g, 1e-8).tolist() == [want]
    g = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert SgdSai._rates(self, x, g, 0.0).item() == pytest.approx(30**0.5 / g.std().item())


def test_networks_are_given_the_step_s_values_and_only_the_model_its_states() -> None:
    asked: dict[str, Any] = {}

    def network(name: str) -> Any:
        return lambda batch, **kw: asked.update({name: kw}) or SimpleNamespace(aux={})

    env: Any = SimpleNamespace(
        scheduled={"books": 0.5},
        seed_of=lambda b: 3,
        number=lambda b: 1,
        autocast=contextlib.nullcontext,
    )
    engines: Any = {"model": network("model"), "critic": network("critic")}
    frozen: Any = {"teacher": network("teacher")}
    nets = Nets(engines, frozen, env)
    noted: list[int] = []
    nets.carried = SimpleNamespace(  # type: ignore[assignment]
        before=lambda n: f"state {n}", after=lambda n, out: noted.append(n)
    )
    batch = Batch.of_ids(torch.zeros(1, 2, dtype=torch.int64))
    for name in nets:
        nets[name](batch)
    shared = {"scheduled": {"books": 0.5}, "seed": 3}
    assert asked == {"model": shared | {"state": "state 1"}, "critic": shared, "teacher": shared}
    assert noted == [1]


def test_parts_of_a_step_begin_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 7.0])
    monkeypatch.setattr("mm.trainer.log.clock.time.perf_counter", lambda: next(times))
    clock = StepClock(CPU)
    clock.start()
    clock.mark("forward")
    clock.mark("optimizer")
    found = clock.seconds()
    assert found == {"forward": 2.0, "backward": 0.0, "optimizer": 4.0, "communication": 0.0}


class Event:
    """Of a GPU's stream, at so many milliseconds; passed or not."""

    def __init__(self, at: float, passed: bool = True) -> None:
        self.at, self.passed = at, passed

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_on_a_gpu_the_step_before_is_told_once_its_last_event_has_passed() -> None:
    clock = StepClock(CPU)
    clock._on_gpu = True
    assert clock.seconds() == {}
    marks = [("", Event(0.0)), ("forward", Event(500.0))]
    clock._before = marks
    assert clock.seconds()["forward"] == 0.5
    clock._before = [*marks, ("optimizer", Event(900.0, passed=False))]
    assert clock.seconds() == {}


def stage_of(module: nn.Module, compiled: bool = False) -> Any:
    engines = {"model": SimpleNamespace(raw=module)}
    return SimpleNamespace(engines=engines, nets=SimpleNamespace(carried="own"), compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_eval_mode_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    asked: list[str] = []
    stance = lambda name: asked.append(name) or contextlib.nullcontext()
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    module = nn.Sequential(nn.Dropout(), nn.Dropout())
    module[1].eval()
    stage = stage_of(module, compiled)
    with forward_only.in_eval_mode(stage, carried=None):
        assert [m.training for m in module.modules()] == [False] * 3
        assert stage.nets.carried is None and not torch.is_grad_enabled()
    assert [m.training for m in module.modules()] == [True, True, False]
    assert stage.nets.carried == "own"
    assert asked == (["force_eager"] if compiled else [])


def test_losses_of_a_held_out_batch_know_their_micro_batches() -> None:
    known: list[Any] = []
    batches: Any = ["a", "b"]
    term = SimpleNamespace(losses={"x": torch.tensor(2.0)})
    stage: Any = SimpleNamespace(
        nets=SimpleNamespace(carried=None),
        objective=SimpleNamespace(
            corrupt=lambda b, rng, scheduled: b.upper(),
            counts=lambda b: {"x": torch.tensor(3.0)},
            terms=lambda micros, nets, env: [term for _ in known],
        ),
        env=SimpleNamespace(take=lambda b: b, rng=None, know=known.extend),
    )
    sums, counts = forward_only.losses(stage, batches, {})
    assert known == ["A", "B"] and (float(sums["x"]), float(counts["x"])) == (4.0, 6.0)


def test_losses_of_the_kept_batch_are_means(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"x": torch.tensor(6.0), "y": torch.tensor(0.0)}
    counts = {"x": torch.tensor(4.0), "y": torch.tensor(0.0)}
    within = lambda *a, **k: contextlib.nullcontext()
    monkeypatch.setattr(resume_check.forward_only, "in_eval_mode", within)
    monkeypatch.setattr(resume_check.forward_only, "losses", lambda *a: (sums, counts))
    stage: Any = SimpleNamespace(begin_step=lambda step: {}, env=SimpleNamespace(sequence=None))
    assert resume_check.losses(stage, 3, "batch") == {"x": 1.5, "y": 0.0}  # type: ignore[arg-type]


def test_saves_in_the_background_come_one_after_the_other(tmp_path: Path) -> None:
    order: list[str] = []
    first_may_end, writer = threading.Event(), Writer(background=True)

    def save(step: int, told: Callable[[], Any]) -> None:
        moment = Moment.of({"step": step}, {"model": {"w": torch.ones(2)}})
        writer(tmp_path, moment, keep_last=9, on_file=lambda path: path.is_dir() and told())

    def first() -> None:
        first_may_end.wait(5)
        order.append("first")

    save(1, first)
    threading.Timer(0.1, first_may_end.set).start()
    save(2, lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]

    def fails() -> None:
        raise UserError("the disk is full")

    save(3, fails)
    with pytest.raises(UserError, match="disk is full"):
        save(4, lambda: order.append("third"))
    assert order == ["first", "second"]


def test_an_average_begins_as_what_it_follows() -> None:
    model, slow = nn.Linear(2, 2), nn.Linear(2, 2)
    engines: Any = {"model": SimpleNamespace(raw=model)}
    networks = {"slow": Network(mode="ema", of="model")}
    Averages(networks, engines, {"slow": slow}, None)
    assert torch.equal(slow.weight, model.weight) and torch.equal(slow.bias, model.bias)


def test_weights_of_another_shape_are_refused_though_they_would_fit() -> None:
    """A bias of one number could be spread over two."""
    own = nn.Linear(2, 2)
    weights = {"weight": torch.zeros(2, 2), "bias": torch.zeros(1)}
    with pytest.raises(UserError, match=r"'bias' is \(1,\) there and \(2,\) in the model"):
        load_weights(own, weights, "x")
    with pytest.raises(UserError, match="'more' is .* absent"):
        load_weights(own, {"more": torch.zeros(1)}, "x")


def test_states_of_a_rank_s_rows_are_counted_from_its_first_row() -> None:
    class Rows:
        def leaves(self) -> Any:
            return iter([torch.zeros(1)])

        def select(self, at: torch.Tensor) -> list[int]:
            return at.tolist()

    carried = CarriedStates(Rows(), [range(4, 6), range(6, 8)])  # type: ignore[arg-type]
    assert [carried.before(n) for n in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("applied", [True, False])
def test_a_network_is_told_its_sums_after_a_step_that_was_applied(applied: bool) -> None:
    told: list[Any] = []
    follow: list[str] = []
    engine = SimpleNamespace(
        reduce=lambda: None,
        set_lr=lambda factor: 0.1 * factor,
        step=lambda norm: order.append("update") or (applied, 2.0),
        raw=SimpleNamespace(after_step=told.append),
    )
    order: list[str] = []
    stage: Any = SimpleNamespace(
        engines={"model": engine},
        env=SimpleNamespace(before_update=lambda: order.append("copied")),
        clock=SimpleNamespace(mark=lambda part: None),
        lr_factor=lambda step: 0.5,
        averages=SimpleNamespace(follow=follow.append),
    )
    metrics: Any = SimpleNamespace(aux={"load": Sum(torch.tensor(6.0), torch.tensor(3.0))})
    row = _update(stage, 4, "model", metrics, {"loss/total": torch.tensor(1.5)})
    assert row == {"loss/total": 1.5, "optim/lr": 0.05, "optim/grad_norm": 2.0}
    assert [float(aux["load"].total) for aux in told] == ([6.0] if applied else [])
    assert follow == (["model"] if applied else []) and order == ["copied", "update"]
    engine.raw = SimpleNamespace()
    _update(stage, 4, "model", metrics, {"loss/total": torch.tensor(1.5)})


class Weights:
    def __init__(self, step: int) -> None:
        self.state = {"step": step}

    def tensors(self, name: str) -> str:
        return f"{name} of step {self.state['step']}"


def test_the_exported_weights_are_of_the_best_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(
        export="best", folder=Path("run"), stages=[SimpleNamespace(best_by=None)]
    )
    monkeypatch.setattr(export.checkpoint, "load", lambda folder, step: Weights(step))
    monkeypatch.setattr(export, "stage_result", lambda stage, saved, name: saved.tensors(name))
    best = lambda step: SimpleNamespace(step=step, loss=1.0)
    chosen = lambda step: export.chosen_weights(run, Weights(9), best(step))  # type: ignore[arg-type]
    assert (chosen(4), chosen(9)) == ("model of step 4", "model of step 9")
    run.export = "last"
    assert chosen(4) == "model of step 9"


def test_the_state_of_all_rows_is_made_where_others_have_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "merge_states", lambda states: {"of": [s["rows"] for s in states]})
    mine, theirs = {"rows": "mine"}, {"rows": "theirs"}
    assert ranks.of_all_rows([mine]) == mine
    assert ranks.of_all_rows([mine, theirs]) == {"of": ["mine", "theirs"]}
    assert ranks.of_all_rows([mine, mine, theirs, theirs], 2) == {"of": ["mine", "theirs"]}
    assert ranks.of_all_rows([{"step": 4}, {"step": 4}]) == {"step": 4}


def test_alone_a_signal_before_the_first_step_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranks, "on_any", lambda flag, device: flag)
    stop, reached = Stop(), False
    with pytest.raises(SystemExit) as left, ranks.leave_before_step(stop, lambda: 3, CPU):
        stop._ask(15, None)
        reached = True
    assert left.value.code == 75 and not reached


def test_a_second_signal_does_not_break_what_the_first_one_ends() -> None:
    from mm.trainer.health.signals import Interrupted

    stop, ended = Stop(), False
    with pytest.raises(Interrupted), stop.at_once():
        try:
            stop._ask(15, None)
        finally:
            stop._ask(15, None)
            ended = True
    assert ended and stop.asked
