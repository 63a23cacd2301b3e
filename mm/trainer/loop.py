"""THE trainer: language models, tokenizers and whatever comes train in this one loop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.batch import Batch
from mm.config import places_from
from mm.launch import environment
from mm.run import Run
from mm.trainer import chat, final_eval, folder, ranks, same_data, start, survey, warm_start
from mm.trainer.callbacks.base import Callback
from mm.trainer.callbacks.best_by import BestByFigure
from mm.trainer.callbacks.chosen import of_run
from mm.trainer.callbacks.tasks import TasksWhileTraining
from mm.trainer.callbacks.times import Times
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint import resume_check
from mm.trainer.checkpoint.folder import clean, rehearse
from mm.trainer.checkpoint.format import Saved, Snapshot
from mm.trainer.checkpoint.writer import Writer
from mm.trainer.engine.process_group import join
from mm.trainer.env import TrainerEnv
from mm.trainer.export import export_chosen
from mm.trainer.health import heartbeat
from mm.trainer.health.anomaly import Guard, RollBack, out_of_memory
from mm.trainer.health.signals import INTERRUPTED, Stop
from mm.trainer.held_out import HeldOut
from mm.trainer.log.metrics import BytesPerToken, CodebookUsage, MetricsFile, of_step
from mm.trainer.log.summary import Summary
from mm.trainer.log.tracker import Tracker
from mm.trainer.stage import StageState, end_of_stage, enter_stage
from mm.trainer.state import TrainState
from mm.trainer.step import optimizer_step
from mm.vocabulary import Vocabulary

log = logging.getLogger("mm.trainer")


class Trainer:
    """Train a `Run` to its end, from its newest checkpoint when it has one.

    Args:
        run: what to train.
        callbacks: called after those of the run; they may use what `Training` lists.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback] = ()):
        run = warm_start.resolve(run)
        self.run, self.folder = run, run.folder
        self.vocabulary = Vocabulary.load(run.vocabulary) if run.vocabulary is not None else None
        self.is_main, self.world = environment.ranks().is_main, environment.ranks().world
        self.held_out = HeldOut(run, self.is_main)
        self.state = TrainState(Guard(run, self.is_main), BytesPerToken(), self.held_out)
        self.batches: list[Batch] = []  # host micro-batches of the last step
        self.metrics: dict[str, Any] = {}  # of the last step
        self.tracker = Tracker.none()
        self.guard, self.times = self.state.guard, Times()
        self.summary = Summary(self.times)
        own, rest = of_run(run.callbacks)
        figures = [self.guard, self.state.seen, self.state.bytes_per_token, self.held_out]
        figures += [TasksWhileTraining(), BestByFigure(run, self.held_out)]
        self._figures = [*figures, *own, self.summary]  # what they say is in metrics.jsonl
        self.callbacks = [*self._figures, *rest, *callbacks, self.times]
        self._evaluated: dict[str, Any] = {}
        self._started: list[Callback] = []
        self._usage, self._stop = CodebookUsage(), Stop()
        self._writer = Writer(run.checkpoints.background)
        self._tokenizers: dict[str, Any] | None = None
        self._told: dict[str, Any] = {}  # at the start: `start.json`
        self._init_from: dict[str, Any] | None = None  # what the run began with

    def fit(self) -> dict[str, Any]:
        """Train, save ``<run folder>/model`` and return the last metrics.

        Raises:
            UserError: something the user can mend (config, data, disk, a diverged run).
            SystemExit: code 75 after a SIGTERM, SIGUSR1 or SIGINT; a checkpoint was saved.
        """
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            if self.is_main:
                stack.enter_context(folder.lock(self.folder))
            stack.enter_context(self._stop)
            # DeepSpeed puts its own linear() there at stage 3 and leaves it to whatever runs next.
            stack.callback(setattr, torch.nn.functional, "linear", torch.nn.functional.linear)
            self.device = join(self.run.engine.threads)
            stack.enter_context(ranks.hear_others())
            with self._starting():
                saved = self._resume()
                first = self.step
                done = {"step": first, "new_steps": 0, "resumed_from": first}
                if self.is_main and first > self.steps:
                    say = "%s: %d steps are done and the budget is %d: nothing to train"
                    log.warning(say, self.folder, first, self.steps)
                if final_eval.is_done(self.run, self.step, self.steps):
                    log.info("%s: nothing to do, all %d steps are done", self.folder, self.steps)
                    return done | {"folder": str(self.folder)}
                self._open(saved, stack)
            last = self._train_stages(saved)
            self.guard.require_applied(self.step, self.stage.index)
            self.phase("export", self.step)
            self._on_main(lambda: export_chosen(self, last))
            self._evaluate(len(self.run.stages) - 1)
            if ranks.on_any(self._stop.asked, self.device):
                raise SystemExit(INTERRUPTED)
            new = {"step": self.step, "new_steps": self.step - first}
            return {**self.metrics, **self._evaluated, **done, **new} | {
                "seconds": time.monotonic() - begun,
                "folder": str(self.folder),
                "best": self.held_out.result(),
                "summary": self.summary.result(self),
            }

    def _train_stages(self, snapshot: Snapshot | None) -> Snapshot:
        """Train what is left of every stage; each begins from the snapshot of the one before.

        Returns the results of the last.
        """
        first, last = self.stage.index, len(self.run.stages) - 1
        for index, config in enumerate(self.run.stages):
            if self.step < self.held_out.ends()[index] or index == last:
                if index != first:  # which `_open` has built
                    with self._starting():
                        self._enter(index, snapshot)
                try:
                    snapshot = self._train() or snapshot
                finally:
                    self.stage.close()
                assert snapshot is not None  # a stage has a step, and its last one is saved
                snapshot = end_of_stage(config, snapshot, self.stage.nets)
            ended = self.step == self.held_out.ends()[index]
            if ended and index < last and config.tasks and snapshot is not None:
                self._evaluate(index, end_of_stage(config, snapshot, ["model"]))
        assert snapshot is not None
        return snapshot

    def _train(self) -> Snapshot | None:
        """Fetch, step, report, save, until the stage ends; go back where the guard says so.

        Returns what was saved at its end; None when all steps were done before.
        """
        every, saved = self.run.checkpoints.every, False
        self.stage.settle()
        while self.step < self.stage_end:
            begun = time.monotonic()
            self.phase("data", self.step + 1)
            self.batches = list(self.stream.next())
            waited = time.monotonic() - begun
            keys = [key for b in self.batches for key in b.keys]
            self.phase("step", self.step + 1, keys)
            facts = self._step()
            stop = facts.pop("stop") > 0
            try:
                self._report(facts, time.monotonic() - begun, waited)
            except RollBack as why:
                self._roll_back(why)
                continue
            is_best = self.run.keeps_best and self.held_out.new_best
            ended = self.step == self.stage_end  # perhaps early: the step may have said so
            if stop or ended or is_best or (every and self.step % every == 0):
                self._save()
                saved = True
            if stop:
                self._writer.wait()
                if self.is_main:
                    say = "stopped by a signal at step %d; run the same command to go on"
                    log.warning(say, self.step)
                raise SystemExit(INTERRUPTED)
        self._writer.wait()
        return checkpoint.at(self.folder / "checkpoints", self.step) if saved else None

    def _step(self) -> dict[str, Any]:
        """One optimizer step on ``batches``; its facts on the host."""
        modalities = self.vocabulary.modalities if self.vocabulary is not None else None
        try:
            for callback in self.callbacks:
                callback.pre_step(self, self.batches)
            return optimizer_step(
                self.stage, self.step, self.batches, self._usage, modalities, self._stop.asked
            )
        except Exception as error:
            told = out_of_memory(error, self.batches, self.vocabulary, self.step)
            raise told or error from error

    def _report(self, facts: Mapping[str, Any], seconds: float, waited: float) -> None:
        """Count the step and tell all callbacks; the guard, first of them, may raise RollBack."""
        self.state.count(facts)
        self.phase("report", self.step)
        metrics = of_step(facts, seconds, waited, self.stream)
        for callback in self.callbacks:
            callback.post_step(self, self.step, metrics)
        self.metrics = metrics

    def _save(self) -> None:
        """Write a checkpoint: each rank what it holds (perhaps in the background)."""
        self.phase("save", self.step)
        facts = {
            "world": self.world,
            "vocabulary": self._fingerprint,
            "config": self.run.to_dict(),
            "tracker": self.tracker.id,
            "init_from": self._init_from,
        }
        keep, best = self.run.checkpoints, self.held_out.best
        self._writer(
            self.folder / "checkpoints",
            self.state.save(facts, self.batches[0]),
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            on_file=self._on_file,
            best=best.step if self.run.keeps_best and best else None,
        )
        for callback in self.callbacks:
            callback.on_save(self, self.step)

    def _roll_back(self, why: RollBack) -> None:
        """Take weights and optimizer from the newest checkpoint; the data go on where they are."""
        self._writer.wait()
        saved = ranks.newest_checkpoint(self.folder / "checkpoints", self.device)
        to = saved.state["step"] if saved is not None else -1
        index, begin = self.stage.index, self.stage.begin
        self.state.guard.roll_back(why, self.step - 1, to if to >= begin else None)
        data, carried = self.stream.state_dict(), self.stage.nets.carried
        self.stage.close()
        self.state.step = to
        assert saved is not None  # the guard raised where there is none
        self.held_out.load_state_dict(saved.state.get("held_out", {}))
        self._enter(index, saved)
        self.stream.load_state_dict(data)
        self.stage.nets.carried = carried

    def _resume(self) -> Saved | None:
        """The newest good checkpoint, with step and counts taken from it.

        Raises UserError when the run cannot go on from it.
        """
        saved = ranks.newest_checkpoint(self.folder / "checkpoints", self.device)
        if saved is not None:
            saved.require(self.run.to_dict(), self._fingerprint)
            self.state.load(saved)
        return saved

    def _open(self, saved: Saved | None, stack: contextlib.ExitStack) -> None:
        """Check what can be checked and build the first stage; only then write and begin.

        So a refusal leaves every file of the run as it was. ``stack`` ends what is begun here.
        """
        self.phase("start", self.step)
        self.env = TrainerEnv.of(self.run, self.device, self._writer.settle)
        index = start.first_stage(self.held_out.ends(), self.step)
        same_data.require_same(same_data.found_here(self.run, self.vocabulary, index), self.device)
        self._on_main(lambda: start.check(self, index))
        begin, self._init_from = warm_start.begin(self.run, self.vocabulary, saved)
        self._build(index, begin)
        self._on_main(lambda: self._told.update(start.survey(self, index)))
        if self.step < self.steps:
            root, n_bytes = self.folder / "checkpoints", self.stage.save_bytes
            self._on_main(lambda: rehearse(root, n_bytes))
        self._write_start(saved, stack)
        if saved is not None:
            log.info("resumed %s from step %d of %d", self.folder, self.step, self.steps)
        # One that failed to start has nothing to end.
        stack.callback(lambda: [callback.on_end(self) for callback in self._started])
        self._start_callbacks()

    def _write_start(self, saved: Saved | None, stack: contextlib.ExitStack) -> None:
        """Write the run's description and begin heartbeat, log and tracker; ``stack`` ends them."""
        rank, hang_s = environment.ranks().rank, self.run.guard.hang_s
        with ranks.main_alone() as mine:  # and no rank's file is cleared
            if mine:
                clean(self.folder / "checkpoints")
                heartbeat.clear(self.folder / "health")
        heart = stack.enter_context(heartbeat.Heartbeat(self.folder / "health", rank, hang_s))
        self.callbacks.insert(0, heart)
        with ranks.main_alone() as mine:
            if not mine:
                return
            described = start.describe(self, self._init_from)
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            folder.write(self.folder, self.run, described)
            chat.save_template(self.run, self.folder)
            survey.write(self.folder, self._told)
            self.file = MetricsFile(self.folder / "metrics.jsonl", self.step)
            stack.callback(self.file.close)
            resumed = saved.state.get("tracker") if saved is not None else None
            self.tracker = Tracker.start(self.run, self.folder, described, resumed)
            stack.callback(self.tracker.finish)
            at = 1 + len(self._figures)  # after the heartbeat and them
            self.callbacks[at:at] = [self.file, self.tracker]

    def _enter(self, index: int, snapshot: Snapshot | None) -> None:
        """Build a stage, from ``snapshot`` when there is one, and start the callbacks."""
        self._build(index, snapshot)
        self._start_callbacks()

    def _build(self, index: int, snapshot: Snapshot | None) -> None:
        self.phase("stage", self.step)
        self.state.stage = None  # its memory is free before the next one is built
        begin = self.held_out.ends()[index - 1] if index else 0
        self.state.stage = stage = enter_stage(
            self.run, index, begin, self.env, snapshot, self.vocabulary, self._code_vectors
        )
        same_data.require_same(same_data.of_plan(stage.stream), self.device)
        if snapshot is not None and snapshot.state["stage"] == index:
            resume_check.check(stage, snapshot, self.world, self.run.engine)

    def _start_callbacks(self) -> None:
        for callback in self.callbacks:
            callback.on_stage_start(self)
            if callback not in self._started:
                self._started.append(callback)

    def _evaluate(self, index: int, left: Snapshot | None = None) -> None:
        """Run a stage's tasks on what it ``left``, or on the saved model: a line of metrics.jsonl.

        What a stage before the last left: once, a resumed run does what was not come to.
        """
        self.phase("evaluate", self.step)
        found = final_eval.of_stage(self, index, self._stop, left)
        if found:
            self.file.write({"step": self.step, **found})
            self.tracker.log(found, self.step)
        self._evaluated |= found

    def _starting(self) -> contextlib.AbstractContextManager[None]:
        return ranks.leave_before_step(self._stop, lambda: self.step + 1, self.device)

    def phase(self, name: str, step: int, keys: Sequence[str] = ()) -> None:
        for callback in self.callbacks:
            callback.on_phase(self, name, step, keys)

    def _on_file(self, path: Path) -> None:
        for callback in self.callbacks:
            callback.on_file(path)

    def _on_main(self, work: Any) -> None:
        ranks.on_main(work, self.device)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def steps(self) -> int:
        return self.held_out.ends()[-1]

    @property
    def stage_end(self) -> int:
        return self.held_out.ends()[self.stage.index]

    @property
    def stage(self) -> StageState:
        """The stage that trains."""
        assert self.state.stage is not None
        return self.state.stage

    @property
    def stream(self) -> Any:
        return self.stage.stream

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The run's tokenizers by modality, loaded on first use."""
        if self._tokenizers is None:
            from mm.tokenizers.load import load_tokenizer

            self._tokenizers = {m: load_tokenizer(path) for m, path in self.run.tokenizers.items()}
        return self._tokenizers

    def _code_vectors(self) -> dict[str, Any]:
        return {m: t.code_vectors() for m, t in self.tokenizers.items()}

    @property
    def _fingerprint(self) -> str | None:
        return self.vocabulary.fingerprint if self.vocabulary is not None else None

    def unsharded(self, name: str = "model") -> contextlib.AbstractContextManager[nn.Module]:
        return self.stage.unsharded(name)


def train(
    run: Run | str | Path,
    overrides: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    *,
    trust_code: bool = True,
) -> dict[str, Any]:
    """Train a `Run` or a run YAML (``trust_code``: of `Run.load`) as `Trainer.fit` does."""
    given = run if isinstance(run, Run) else Run.load(run, overrides, trust_code=trust_code)
    with places_from(given, given.name if given is run else str(run)):
        return Trainer(given, callbacks).fit()
