"""THE trainer: language models, tokenizers and whatever comes train in this one loop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.batch import Batch, Sum
from mm.errors import UserError
from mm.launch import environment
from mm.objectives.objective import Objective, Term
from mm.registry import CALLBACKS
from mm.run import Run, Stage
from mm.trainer import final_eval, folder
from mm.trainer.callbacks.base import Callback
from mm.trainer.checkpoint import collect as saving
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import resume_check as probe
from mm.trainer.ema import Averages
from mm.trainer.engine.deepspeed import Engine, join, resolve_precision
from mm.trainer.env import Nets, TrainerEnv
from mm.trainer.export import export
from mm.trainer.health import heartbeat
from mm.trainer.health.anomaly import Guard, RollBack, out_of_memory
from mm.trainer.health.signals import INTERRUPTED, Interrupted, Stop
from mm.trainer.log.metrics import (
    BytesPerToken,
    MetricsFile,
    Tally,
    Usage,
    all_reduce,
    n_items,
    of_stream,
    tokens_by_modality,
)
from mm.trainer.log.tracker import Tracker
from mm.trainer.stage import (
    all_networks,
    build,
    compile_blocks,
    load_weights,
    make_module,
)
from mm.trainer.stateful import Lanes
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")

LN2 = 0.6931471805599453


class Trainer:
    """Train a `Run` to its end, from its newest checkpoint when it has one.

    Attributes that callbacks may use: ``run, folder, nets, vocabulary, tokenizers, tracker,
    is_main, step, steps`` and `whole`.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = run.folder
        self.vocabulary = Vocabulary.load(run.vocabulary) if run.vocabulary is not None else None
        self.is_main = environment.ranks().is_main
        self.world = environment.ranks().world
        self.steps = sum(stage.budget.steps for stage in run.stages)
        self.step = 0  # optimizer steps done, over all stages
        self.guard = Guard(run, self.is_main)
        self.engines: dict[str, Engine] = {}
        self.frozen: dict[str, nn.Module] = {}
        self.tracker = Tracker.none()
        self.metrics: dict[str, Any] = {}  # of the last step
        self._usage = Usage()
        self._stop = Stop()
        self._writer = checkpoint.Writer(run.checkpoints.background)
        self.batches: list[Batch] = []  # host micro-batches of the last step
        self.bytes_per_token = BytesPerToken()
        self._tokenizers: dict[str, Any] | None = None

    def fit(self) -> dict[str, Any]:
        """Train, save ``<run folder>/model`` and return the last metrics.

        Raises:
            UserError: something the user can mend (config, data, disk, a diverged run).
            SystemExit: code 75 after a SIGTERM, SIGUSR1 or SIGINT; a checkpoint was saved.
        """
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            if self.is_main:
                stack.enter_context(folder.locked(self.folder))
                checkpoint.clean(self.folder / "checkpoints")
                heartbeat.clear(self.folder / "health")
            stack.enter_context(self._stop)
            # DeepSpeed puts its own linear() there at stage 3 and leaves it to whatever runs next.
            stack.callback(setattr, torch.nn.functional, "linear", torch.nn.functional.linear)
            self.device = join(self.run.engine.threads)
            with self._starting():
                saved = saving.resume(self)
                first = self.step
                if final_eval.is_done(self.run, self.step):
                    log.info("%s: nothing to do, all %d steps are done", self.folder, self.steps)
                    place = str(self.folder)
                    return {"step": first, "new_steps": 0, "resumed_from": first, "folder": place}
                self._open(saved, stack)
            weights: dict[str, dict[str, Tensor]] = {}
            end, last = 0, len(self.run.stages) - 1
            for index, stage in enumerate(self.run.stages):
                begin, end = end, end + stage.budget.steps
                if self.step < end or index == last:
                    with self._starting():
                        self._enter(index, stage, begin, saved, weights)
                    try:
                        self._train(end)
                    finally:
                        self.stream.close()
                    weights = {name: engine.result() for name, engine in self.engines.items()}
                    saved = None
            export(self, weights["model"])
            dist.barrier()
            self.heart.phase("evaluate", self.step)
            evaluated = final_eval.evaluate(self, self._stop)
            if self._any(self._stop.asked):
                raise SystemExit(INTERRUPTED)
            return {
                **self.metrics,
                **evaluated,
                "step": self.step,
                "new_steps": self.step - first,
                "resumed_from": first,
                "seconds": time.monotonic() - begun,
                "folder": str(self.folder),
            }

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """Exit with 75 when a signal comes before a stage's first step: all before it is saved.

        At once when alone; several processes finish the block first, so that none waits in vain.
        """
        try:
            with self._stop.at_once() if self.world == 1 else contextlib.nullcontext():
                yield
            if not self._any(self._stop.asked):
                return
        except Interrupted:
            pass
        log.warning("stopped by a signal before step %d; run the same command", self.step + 1)
        raise SystemExit(INTERRUPTED)

    def _train(self, end: int) -> None:
        """Fetch, step, report, save, until ``end``; go back where the guard says so."""
        every = self.run.checkpoints.every
        while self.step < end:
            begun = time.monotonic()
            self.heart.phase("data", self.step + 1)
            batches = self.stream.next()
            waited = time.monotonic() - begun
            self.heart.phase("step", self.step + 1, [key for b in batches for key in b.keys])
            try:
                row = self._optimizer_step(batches)
                self.guard.loss(self.step, row["loss/total"], batches)
            except RollBack as why:
                self._roll_back(why)
                continue
            except Exception as error:
                raise out_of_memory(error, batches, self.vocabulary, self.step) or error from error
            self.step += 1
            stop = row.pop("stop") > 0
            self._report(row, time.monotonic() - begun, waited)
            if stop or self.step == end or (every and self.step % every == 0):
                self._save()
            if stop:
                self._on_main(self._writer.wait)
                log.warning(
                    "stopped by a signal at step %d; run the same command to go on", self.step
                )
                raise SystemExit(INTERRUPTED)
        self._on_main(self._writer.wait)

    def _roll_back(self, why: RollBack) -> None:
        """Take weights and optimizer from the newest checkpoint; the data go on where they are."""
        self._on_main(self._writer.wait)
        saved = checkpoint.newest(self.folder / "checkpoints")
        to = saved.state["step"] if saved is not None else -1
        self.guard.roll_back(why, self.step, to if to >= self.begin else None)
        data, lanes = self.stream.state_dict(), self.nets.lanes
        self.stream.close()
        self.step = to
        self._enter(self.index, self.stage, self.begin, saved, {})
        self.stream.load_state_dict(data)
        self.nets.lanes = lanes
        if self.is_main:
            self.file.close()
            self.file = MetricsFile(self.folder / "metrics.jsonl", self.step)

    def _optimizer_step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """One optimizer step of every network that the objective steps. Returns host metrics."""
        objective, env = self.objective, self.env
        self.batches = list(batches)
        scheduled = objective.scheduled(
            self.step, np.random.default_rng((self.run.seed, self.step))
        )
        env.begin(self.step, scheduled)
        micros = [objective.corrupt(b.to(self.device), env.rng, scheduled) for b in batches]
        env.know(micros)
        n, facts = self._global_counts(batches, micros)
        scales = objective.scales(n)
        factors = {k: scales[k] / n[k].clamp_min(1e-12) for k in n}
        row: dict[str, Any] = {}
        sums: dict[str, Tally] = {}
        for term in objective.terms(micros, self.nets, env):
            engine = self.engines[term.network]
            tally = sums.setdefault(term.network, Tally())
            tally.add_losses(term.losses)
            loss = self.world * torch.stack([factors[k] * s for k, s in term.losses.items()]).sum()
            if not term.step:
                engine.backward(loss)
                continue
            # Losses are reduced BEFORE the last backward: if their global sum is not finite, this
            # backward makes every gradient NaN on every rank, so that all of them skip the step, at
            # each ZeRO stage, without asking the host.
            tally.aux = self.nets.take(term.network).aux
            tally.reduce()
            total = torch.stack([factors[k] * s for k, s in tally.losses.items()]).sum()
            engine.backward(loss * torch.where(torch.isfinite(total), 1.0, float("nan")))
            row |= self._update(term, engine, tally, total, facts, n)
            del sums[term.network]
        if self.nets.lanes is not None:
            self.nets.lanes.commit(applied=math.isfinite(row.get("optim/grad_norm", 0.0)))
        return row

    def _update(
        self,
        term: Term,
        engine: Engine,
        tally: Tally,
        total: Tensor,
        facts: dict[str, Tensor],
        n: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Step one network. The only device-to-host copy of the step is the one `tolist` here."""
        norm = engine.reduce()
        device = {f"loss/{k}": s / n[k].clamp_min(1e-12) for k, s in tally.losses.items()}
        device |= {"loss/total" if term.network == "model" else f"loss/{term.network}_total": total}
        device |= {f"aux/{k}": s.mean() for k, s in tally.aux.items() if s.total.dim() == 0}
        device |= self._usage.update(tally.aux) | facts
        if norm is not None:
            device["norm"] = norm
        host = dict(
            zip(
                device,
                torch.stack([t.detach().float() for t in device.values()]).tolist(),
                strict=True,
            )
        )
        lr = engine.set_lr(self.stage.schedule(self.step - self.begin, self.stage.budget.steps))
        applied, norm_before = engine.step(host.pop("norm", None))
        if not applied:
            self.guard.skip(self.step, term.network, host, self.batches)
        after = getattr(engine.raw, "after_step", None)
        if applied and tally.aux and after is not None:
            with torch.no_grad():
                after({k: Sum(s.total, s.count) for k, s in tally.aux.items()})
        if applied:
            self.averages.follow(term.network)
        prefix = "optim" if term.network == "model" else f"optim/{term.network}"
        return host | {f"{prefix}/lr": lr, f"{prefix}/grad_norm": norm_before}

    def _global_counts(
        self, batches: Sequence[Batch], micros: Sequence[Batch]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Denominators of all losses, and facts for the log, over micro-batches and ranks; one
        collective.
        """
        each = [self.objective.counts(b) for b in micros]
        names = sorted({k for counts in each for k in counts})
        mine = [torch.stack([c[k].float() for c in each if k in c]).sum() for k in names]
        modalities = self.vocabulary.modalities if self.vocabulary is not None else ()
        host = torch.cat(
            [
                tokens_by_modality(batches, len(modalities)),
                torch.tensor([float(n_items(batches)), float(self._stop.asked)]),
            ]
        ).to(self.device, non_blocking=True)
        *reduced, seen = all_reduce([*mine, host])
        tokens, facts = seen[:-2].sum(), {"stop": seen[-1]}
        if self.vocabulary is not None:
            facts |= {
                f"tokens/{m}_share": seen[i] / tokens.clamp_min(1)
                for i, m in enumerate(modalities, start=1)
            }
            facts["tokens/step"] = tokens
        else:
            facts["items/step"] = seen[-2]
        return dict(zip(names, reduced, strict=True)), facts

    def _open(self, saved: checkpoint.Saved | None, stack: contextlib.ExitStack) -> None:
        """Write the run's description, start tracker and callbacks; ``stack`` ends them."""
        self.precision = resolve_precision(self.run.engine.precision, self.device)
        self.env = TrainerEnv(self.run.seed, self.device, self.precision)
        facts = {
            "device": str(self.device),
            "world": self.world,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }
        described = folder.describe(self.run, facts)
        rank = environment.ranks().rank
        self.heart = heartbeat.Heartbeat(self.folder / "health", rank, self.run.guard.hang_s)
        stack.enter_context(self.heart)
        if self.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            folder.write(self.folder, self.run, described)
            self.file = MetricsFile(self.folder / "metrics.jsonl", self.step)
            stack.callback(lambda: self.file.close())  # a return to a checkpoint opens another
            self.tracker = Tracker.start(
                self.run, self.folder, described, saved.state.get("tracker") if saved else None
            )
            stack.callback(self.tracker.finish)
        if saved is not None:
            log.info("resumed %s from step %d of %d", self.folder, self.step, self.steps)
        kinds = {config.kind for config in self.run.callbacks}
        defaults = [] if "progress" in kinds else [CALLBACKS.parse("progress")]
        self.callbacks: list[Callback] = [
            config.build() for config in (*self.run.callbacks, *defaults)
        ]
        self._started: list[Callback] = []
        stack.push(self._end_callbacks)

    def _enter(
        self,
        index: int,
        stage: Stage,
        begin: int,
        saved: checkpoint.Saved | None,
        weights: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Build a stage: objective, stream, networks (from ``saved``, else ``weights``, else
        fresh), engines.
        """
        self.index, self.stage, self.begin = index, stage, begin
        self.objective: Objective = build(stage.objective, vocabulary=self.vocabulary)
        self.engines, self.frozen = {}, {}
        size = 0
        same_stage = saved is not None and saved.state["stage"] == self.index
        wanted = all_networks(self.run, self.objective)
        for name, network in wanted.items():
            module = make_module(network.config, self.vocabulary, self.run.seed, self.device)
            have = saved.tensors(name) if saved is not None else weights.get(name, {})
            if have:
                load_weights(
                    module, have, str(saved.folder) if saved is not None else "the stage before"
                )
            elif name == "model" and self.run.tokenizers and hasattr(network.config, "prepare"):
                vectors = {m: t.code_vectors() for m, t in self.tokenizers.items()}
                network.config.prepare(module, {m: v for m, v in vectors.items() if v is not None})
            if network.mode != "train":
                self.frozen[name] = module.eval().requires_grad_(False)
                continue
            if self.run.engine.compile:
                compile_blocks(module)
            size += 12 * sum(p.numel() for p in module.parameters())  # fp32, two states
            engine = Engine(
                module.train(),
                stage.optimizer.build(module),
                self.run.engine,
                self.precision,
                stage.ema,
            )
            if saved is not None and same_stage:
                engine.load_masters(have)
                engine.load_optimizer_state(saved.optimizer(name), saved.state["optimizers"][name])
            self.engines[name] = engine
        self.averages = Averages(wanted, self.engines, self.frozen, saved)
        self.env.lend(self.engines, self.frozen)
        self.nets = Nets(self.engines, self.frozen, self.env)
        self.stream = build(
            stage.data,
            vocabulary=self.vocabulary,
            transform=self.objective.transform,
            seed=self.run.seed,
            rank=environment.ranks().rank,
            world=self.world,
        )
        self.nets.lanes = Lanes.of(self.stream, self.engines["model"], self.env)
        if saved is not None and same_stage:
            self.stream.load_state_dict(saved.state["data"])
            if self.nets.lanes is not None:
                self.nets.lanes.load(saved)
            probe.check(self, saved)
        if not self._started:
            if self.step < self.steps:
                self._on_main(lambda: checkpoint.rehearse(self.folder / "checkpoints", size))
            for callback in self.callbacks:
                callback.on_start(self)
                self._started.append(callback)

    def _report(self, metrics: dict[str, Any], seconds: float, waited: float) -> None:
        """One line of metrics.jsonl, the tracker, the callbacks."""
        for unit in ("tokens", "items"):
            if f"{unit}/step" in metrics:
                metrics[f"perf/{unit}_per_second"] = metrics.pop(f"{unit}/step") / seconds
        for name, size in self._bytes_per_token().items():
            if f"loss/{name}" in metrics and size:
                metrics[f"bits_per_byte/{name}"] = metrics[f"loss/{name}"] / LN2 / size
        metrics |= {
            "perf/step_seconds": seconds,
            "data/wait_seconds": waited,
            "skipped": self.guard.skipped,
        } | of_stream(getattr(self.stream, "stats", {}))
        self.metrics = metrics
        if self.is_main:
            self.file.write({"step": self.step, **metrics})
            self.tracker.log(metrics, self.step)
        for callback in self.callbacks:
            callback.on_step(self, self.step, metrics)

    def _bytes_per_token(self) -> Mapping[str, float]:
        """Raw bytes that one target token stands for: the stream's own figure, else an estimate of
        the first steps.
        """
        known = getattr(self.stream, "bytes_per_token", None)
        if (
            known is not None
            or self.vocabulary is None
            or not self.run.tokenizers
            or not self.is_main
        ):
            return known or {}
        self.bytes_per_token.observe(self.batches, self.vocabulary, self.tokenizers)
        return self.bytes_per_token.ratio()

    def _save(self) -> None:
        """Write a checkpoint: all ranks gather, the main one writes (perhaps in the background)."""
        self.heart.phase("save", self.step)
        state, full = saving.collect(self)
        root, step, keep = self.folder / "checkpoints", self.step, self.run.checkpoints
        write = lambda: checkpoint.save(root, step, state, full, keep.keep_last, keep.keep_every)
        self._on_main(lambda: self._writer(write))

    def _on_main(self, work: Callable[[], Any]) -> None:
        """Run ``work`` on the main rank while the others wait; if it fails, all raise UserError."""
        failed: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                failed = error
        if self._any(failed is not None):
            raise failed or UserError(f"{self.folder}: the main process stopped, and says why")

    def _any(self, flag: bool) -> bool:
        """True on all ranks when it is on one."""
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total)
        return bool(total > 0)

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The run's tokenizers by modality, loaded on first use."""
        if self._tokenizers is None:
            from mm.tokenizers.load import load_tokenizer

            self._tokenizers = {m: load_tokenizer(path) for m, path in self.run.tokenizers.items()}
        return self._tokenizers

    @contextlib.contextmanager
    def whole(self, name: str = "model") -> Iterator[nn.Module]:
        """A network's raw module in eval mode with all weights present; enter and leave it on ALL
        ranks.
        """
        with self.engines[name].whole() as module:
            module.eval()
            try:
                yield module
            finally:
                module.train()

    def _end_callbacks(self, *error: Any) -> None:
        for callback in self._started:  # one that failed to start has nothing to end
            callback.on_end(self)


def train(run: Run | str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train a `Run` or a run YAML to its end, resuming when its folder has a checkpoint.

    Returns the last metrics.
    """
    if not isinstance(run, Run):
        run = Run.load(run, overrides)
    return Trainer(run).fit()
