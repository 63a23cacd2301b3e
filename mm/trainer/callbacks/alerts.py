"""Alerts: one line in the log, one in every sink, and a command or a webhook of yours.

Where they go is no key of a run: ``MM_ALERT_COMMAND`` is a command and ``MM_ALERT_WEBHOOK`` often
holds a secret, and a config travels with its run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.config import Config
from mm.errors import UserError
from mm.registry import CALLBACKS
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.health.anomaly import append
from mm.trainer.health.signals import INTERRUPTED

log = logging.getLogger("mm.trainer")

Level = Literal["info", "warn", "error"]
COMMAND, WEBHOOK = "MM_ALERT_COMMAND", "MM_ALERT_WEBHOOK"
HOOK_TIMEOUT_S = 30.0
WINDOW, RECENT = 100, 5  # steps of a median throughput, and those that are held against it
MIN_STEPS = 20  # of the window, before a throughput is judged
AGAIN = 500  # steps after which the same alert may come again
DISK_EVERY_S = 30.0
SAVES = 3  # checkpoints that the disk should have room for


@CALLBACKS.register("alerts")
class AlertsConfig(Config):
    """Always on; name it in a run only to change it."""

    kind: Literal["alerts"] = "alerts"
    throughput: Annotated[
        float, Field(ge=0, le=1, description="share of its median below which a step is slow")
    ] = 0.5
    dead_codes: Annotated[
        float, Field(gt=0, le=1, description="share of a codebook's codes that lie dead")
    ] = 0.5
    codes_after: Annotated[
        int, Field(ge=0, description="steps of a stage before codes may be dead")
    ] = 200
    disk_share: Annotated[
        float, Field(ge=0, lt=1, description="share of the disk that should be free")
    ] = 0.02

    def build(self) -> Alerts:
        return Alerts(self)


class Alerts(Callback):
    """Tells of: non-finite, spike, rollback, throughput, dead codes, disk, checkpoint, end.

    Every alert is a line of ``events.jsonl`` too (those of the guard are its own lines there).
    """

    def __init__(self, config: AlertsConfig):
        self.config = config
        self._skipped = self._rollbacks = self._spikes = 0
        self._fresh = True
        self._rates: deque[float] = deque(maxlen=WINDOW)
        self._told: dict[str, int] = {}
        self._looked = 0.0
        self._phase = ""
        self._hooks: list[threading.Thread] = []

    def on_stage_start(self, trainer: Training) -> None:
        if self._fresh:
            guard, self._fresh = trainer.guard, False
            self._skipped, self._rollbacks = guard.skipped, guard.rollbacks
            self._spikes = guard.spikes
        self._rates.clear()
        if trainer.is_main:
            self._of_guard(trainer)

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        self._phase = name

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if not trainer.is_main:
            return
        self._of_guard(trainer)
        self._of_throughput(trainer, metrics)
        self._of_codes(trainer, step, metrics)
        if time.monotonic() - self._looked >= DISK_EVERY_S:
            self._looked = time.monotonic()
            self._of_disk(trainer)

    def on_end(self, trainer: Training) -> None:
        if not trainer.is_main:
            return
        error = sys.exc_info()[1]
        where = f"step {trainer.step} of {trainer.steps}"
        if error is None:
            self._tell(trainer, "run ended", f"all done at {where}", "info", quiet=True)
        elif isinstance(error, SystemExit) and error.code == INTERRUPTED:
            self._tell(trainer, "run stopped", f"by a signal at {where}", "warn", quiet=True)
        else:
            failed = "checkpoint failed" if self._phase == "save" else "run failed"
            said = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            self._tell(trainer, failed, f"at {where}: {said}", "error", quiet=True)
        for thread in self._hooks:
            thread.join(HOOK_TIMEOUT_S)

    def _of_guard(self, trainer: Training) -> None:
        """What the guard has seen, logged and noted: only passed on."""
        guard, step = trainer.guard, trainer.step
        if guard.skipped > self._skipped:
            text = f"{guard.skipped - self._skipped} step(s) up to {step} were not applied"
            self._tell(trainer, "non-finite", text, "error", quiet=True)
        if guard.spikes > 0 and self._spikes == 0:
            text = f"the loss of step {step} is far over its median; mm explain RUN --step {step}"
            self._tell(trainer, "spike", text, "warn", quiet=True)
        if guard.rollbacks > self._rollbacks:
            text = f"went back to the checkpoint of step {step}"
            self._tell(trainer, "rollback", text, "error", quiet=True)
        self._skipped, self._spikes = guard.skipped, guard.spikes
        self._rollbacks = guard.rollbacks

    def _of_throughput(self, trainer: Training, metrics: dict[str, Any]) -> None:
        rate = 1 / max(metrics["perf/step_seconds"], 1e-9)
        recent = [*list(self._rates)[-RECENT + 1 :], rate]
        before = list(self._rates)[: -RECENT + 1]
        if len(before) >= MIN_STEPS and self.config.throughput:
            usual, now = statistics.median(before), statistics.median(recent)
            if now < self.config.throughput * usual:
                slow = f"{1 / now:.3g} s a step, the median was {1 / usual:.3g} s"
                waits = metrics.get("data/wait_seconds", 0.0)
                self._tell(trainer, "slow", f"{slow} ({waits:.3g} s of it waiting for data)")
        self._rates.append(rate)

    def _of_codes(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if step - trainer.stage.begin < self.config.codes_after:
            return
        for name, usage in metrics.items():
            if not (name.startswith("codebook") and name.endswith("/usage")):
                continue
            if 1 - usage >= self.config.dead_codes:
                text = f"{100 * (1 - usage):.0f} % of the codes of {name.removesuffix('/usage')}"
                self._tell(trainer, "dead codes", f"{text} were not used for 100 steps")

    def _of_disk(self, trainer: Training) -> None:
        try:
            disk = shutil.disk_usage(trainer.folder)
        except OSError:
            return
        room = SAVES * trainer.stage.save_bytes
        if disk.free < max(room, self.config.disk_share * disk.total):
            text = (
                f"{trainer.folder}: {disk.free / 2**20:,.0f} MiB free; a checkpoint takes about "
                f"{trainer.stage.save_bytes / 2**20:,.0f} MiB"
            )
            self._tell(trainer, "disk nearly full", text)

    def _tell(
        self, trainer: Training, title: str, text: str, level: Level = "warn", quiet: bool = False
    ) -> None:
        """Send an alert, unless the same one was sent a short while ago.

        ``quiet``: whoever noticed it has logged it, or will.
        """
        step = trainer.step
        if step - self._told.get(title, -AGAIN) < AGAIN:
            return
        self._told[title] = step
        if not quiet:
            log.warning("step %d: alert: %s: %s", step, title, text)
            try:
                event = {"step": step, "event": title, "why": text}
                append(trainer.folder / "events.jsonl", event)
            except OSError:  # the disk is full: that is what it tells of
                pass
        trainer.tracker.alert(f"{trainer.run.name}: {title}", text, level)
        told = {"run": trainer.run.name, "alert": title, "text": text, "level": level, "step": step}
        self._hooks = [thread for thread in self._hooks if thread.is_alive()]
        for key, hook in ((COMMAND, _command), (WEBHOOK, _post)):
            target = os.environ.get(key)
            if target:
                thread = threading.Thread(target=hook, args=(target, told), daemon=True)
                thread.start()
                self._hooks.append(thread)


def _command(command: str, told: dict[str, Any]) -> None:
    """Run a command with the alert in ``MM_ALERT``, ``MM_ALERT_TEXT`` and so on, and as JSON."""
    facts = {f"MM_ALERT_{k.upper()}": str(v) for k, v in told.items() if k != "alert"}
    env = os.environ | {"MM_ALERT": told["alert"]} | facts
    try:
        done = subprocess.run(
            command,
            shell=True,
            env=env,
            input=json.dumps(told).encode(),
            capture_output=True,
            timeout=HOOK_TIMEOUT_S,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[:200]
            log.warning("%s ended with %d: %s", COMMAND, done.returncode, said)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s: %s", COMMAND, error)


def _post(url: str, told: dict[str, Any]) -> None:
    """POST the alert as JSON; ``text`` is what chat services show."""
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    line = f"{told['run']}, step {told['step']}: {told['alert']}: {told['text']}"
    data = json.dumps(told | {"text": line}).encode()
    try:
        urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=10).close()
    except (OSError, URLError, ValueError) as error:
        log.warning("%s: %s", WEBHOOK, error)
