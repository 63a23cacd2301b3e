"""The ONE module that imports wandb: a mirror of metrics.jsonl that may fail without harm.

It never asks, never blocks for longer than `INIT_TIMEOUT_S` and never ends a run: any exception
becomes one warning and the tracker falls silent. WANDB_MODE wins over the config; without a key the
mode is offline.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.run import Run, Tracking
from mm.trainer.callbacks.base import Callback, Training
from mm.trainer.log.html_table import html_table

log = logging.getLogger("mm.trainer")

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 30.0


def has_key() -> bool:
    """True when wandb would find credentials without asking (WANDB_API_KEY or a netrc entry)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" in netrc.read_text()
    except OSError:
        return False


def resolve_mode(asked: str) -> Any:
    """WANDB_MODE, else what the config asks for, else online with a key and offline without."""
    given = os.environ.get("WANDB_MODE", "").strip().lower()
    if given in ("online", "offline", "disabled", "dryrun"):
        return "offline" if given == "dryrun" else given
    if asked != "auto":
        return asked
    return "online" if has_key() else "offline"


class Tracker(Callback):
    """Guarded wandb run. `none` makes one that does nothing (other ranks, disabled)."""

    def __init__(self, run: Any = None):
        self._run = run
        self.id: str | None = run.id if run is not None else None

    @classmethod
    def none(cls) -> Tracker:
        return cls()

    @classmethod
    def start(
        cls, run: Run, folder: Path, environment: Mapping[str, Any], run_id: str | None = None
    ) -> Tracker:
        """Open (or, with the id of an earlier part, continue) the wandb run of a training run."""
        mode = resolve_mode(run.tracking.mode)
        if mode == "disabled":
            return cls.none()
        config = {**run.to_dict(), "environment": dict(environment)}
        return cls(
            _with_timeout("start", lambda: _init(run, folder, mode, run_id, config), INIT_TIMEOUT_S)
        )

    @classmethod
    def go_on(cls, run: Run, folder: Path, run_id: str | None) -> Tracker:
        """The wandb run of a training that is over, such as to add to its summary."""
        mode = resolve_mode(run.tracking.mode)
        if mode == "disabled" or run_id is None:
            return cls.none()
        return cls(
            _with_timeout("start", lambda: _init(run, folder, mode, run_id, None), INIT_TIMEOUT_S)
        )

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        self.log(metrics, step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Mirror the metrics of ``step``."""
        self._try("log", lambda run: run.log({**_shown(metrics), "step": step}))

    def summary(self, figures: Mapping[str, Any]) -> None:
        """Set figures of the whole run, beside the last value of each metric."""
        self._try("summary", lambda run: run.summary.update(_numbers(figures)))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log rows (see `html_table`) as one page with its pictures and sounds in it.

        No `wandb.Table`: that one leaves media of an offline run in the home folder, so that they
        are lost when the run folder is uploaded from another machine.
        """

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Html(html_table(rows), inject=False), "step": step})

        self._try("table", send)

    def finish(self) -> None:
        """Close the run; waits at most `FINISH_TIMEOUT_S` for an upload."""
        run, self._run = self._run, None
        if run is not None:
            _with_timeout("finish", lambda: run.finish(), FINISH_TIMEOUT_S)

    def _try(self, what: str, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever wandb raises: training goes on without it
            self._run = None
            log.warning(
                "wandb %s failed, tracking is off for this run (metrics.jsonl goes on): %s",
                what,
                error,
            )


def _place(tracking: Tracking) -> dict[str, Any]:
    """Where a run is filed, as `wandb.init` calls it."""
    return {
        "project": tracking.project,
        "entity": tracking.entity,
        "group": tracking.group,
        "job_type": tracking.job_type,
        "notes": tracking.notes,
        "tags": list(tracking.tags),
    }


def _init(
    run: Run, folder: Path, mode: Any, run_id: str | None, config: Mapping[str, Any] | None
) -> Any:
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT_S - 5,
        silent=True,
        disable_git=True,
        disable_code=True,
        console="off",
        quiet=True,
    )
    made = wandb.init(
        name=run.name,
        **_place(run.tracking),
        dir=str(folder),
        mode=mode,
        id=run_id,
        resume="allow" if run_id else None,
        settings=settings,
        config=dict(config) if config is not None else None,
    )
    made.define_metric("step")
    made.define_metric("*", step_metric="step")
    return made


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are one number."""
    return {k: v for k, v in figures.items() if isinstance(v, (bool, int, float))}


def _shown(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as a page shows them: numbers as they are, a confusion matrix as a plot."""
    shown = {k: v for k, v in metrics.items() if not isinstance(v, (list, Mapping))}
    for key, counts in metrics.items():
        stem = key.removesuffix("_confusion")
        if stem != key and f"{stem}_classes" in metrics:
            shown[key] = _confusion_plot(counts, metrics[f"{stem}_classes"], stem)
    return shown


def _confusion_plot(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Any:
    """A plot of counts (C, C + 1), whose last column are answers of no class."""
    import wandb

    pairs = [(i, j) for i, row in enumerate(counts) for j, n in enumerate(row) for _ in range(n)]
    return wandb.plot.confusion_matrix(
        y_true=[i for i, _ in pairs],
        preds=[j for _, j in pairs],
        class_names=[*classes, "(none)"],
        title=title,
    )


def _with_timeout(what: str, action: Callable[[], Any], timeout_s: float) -> Any:
    """Run ``action`` in a daemon thread for at most ``timeout_s``.

    None and one warning when it fails or hangs.
    """
    box: dict[str, Any] = {}

    def work() -> None:
        try:
            box["value"] = action()
        except BaseException as error:  # noqa: BLE001  wandb raises SystemExit-like errors of its own
            box["error"] = error

    thread = threading.Thread(target=work, daemon=True, name=f"wandb-{what}")
    thread.start()
    thread.join(timeout_s)
    if "value" in box or ("error" not in box and not thread.is_alive()):
        return box.get("value")
    reason = box.get("error", f"no answer in {timeout_s:.0f} s")
    log.warning(
        "wandb %s failed, tracking is off for this run (metrics.jsonl goes on): %s", what, reason
    )
    return None
