"""The ONE module that imports wandb: Weights & Biases as a sink."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.data.modalities.base import show_file
from mm.registry import SINKS
from mm.run import Tracking
from mm.trainer.log.html_table import MAX_BYTES, MAX_LETTERS, html_table
from mm.trainer.log.sinks.base import Artifact, Level, Place, Sink, SinkConfig, numbers

log = logging.getLogger("mm.trainer")

INIT_TIMEOUT_S = 20.0
# Lower is better, else higher: what a summary keeps as the best of a run.
LOWER = ("loss", "bits_per_byte", "nats_per_token", "error", "distance")
HIGHER = ("accuracy", "psnr_db", "usage")


@SINKS.register("wandb")
class WandbConfig(SinkConfig):
    """Weights & Biases. WANDB_MODE wins over `tracking.mode`; without a key a run is offline."""

    package = "wandb"

    kind: Literal["wandb"] = "wandb"
    statistics_s: Annotated[
        float, Field(ge=1, description="seconds between its figures of GPU, CPU, memory, disk")
    ] = 15.0

    def build(self, place: Place) -> WandbSink | None:
        mode = resolve_mode(place.run.tracking.mode)
        return None if mode == "disabled" else WandbSink(self, place, mode)


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


class WandbSink(Sink):
    """A run of wandb, whose own step is the run's."""

    def __init__(self, config: WandbConfig, place: Place, mode: str):
        import wandb

        # Where wandb puts what a table or an artifact holds until it is sent. Its default is the
        # home folder, and there the media of an offline run would be lost when it moves.
        os.environ.setdefault("WANDB_DATA_DIR", str((place.folder / "wandb" / "data").resolve()))
        self.offline = mode == "offline"
        self._run = wandb.init(
            name=place.run.name,
            **_place(place.run.tracking),
            dir=str(place.folder),
            mode=mode,  # pyright: ignore[reportArgumentType]
            id=place.run_id,
            resume="allow" if place.goes_on else None,
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S - 5,
                silent=True,
                quiet=True,
                console="off",
                # Its own look at git runs in the folder that the command was given in, which is
                # seldom this code: commit and changes are in the config and in an artifact.
                disable_git=True,
                disable_code=True,
                x_stats_sampling_interval=config.statistics_s,
            ),
            config=dict(place.config) if place.config is not None else None,
        )
        # What an earlier part of the run has sent already, where the server says so.
        self._sent = int(self._run.summary.get("step", -1)) if self._run.resumed else -1
        self._at = -1
        self._seen: set[str] = set()
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # A server may keep a run waiting for what it makes of an artifact: figures do not wait.
        self._lineage = threading.Thread(
            target=self._show, args=(list(place.artifacts),), daemon=True, name="mm-lineage"
        )
        self._lineage.start()

    def _show(self, artifacts: Sequence[Artifact]) -> None:
        try:
            for artifact in artifacts:
                self.artifact(artifact)
        except Exception as error:  # the lineage is not shown, all else is
            log.info("wandb: lineage is not shown (lineage.json has it): %s", error)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        if step <= self._sent:  # a resumed run makes the same steps again: they are there
            return
        self._define(row)
        self._send(_shown(row), step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log one `wandb.Table` whose cells hold pictures and sounds, and a page of the same.

        The page (``<name>_page``) needs nothing besides itself: it is whole wherever an offline run
        is uploaded from.
        """
        import wandb

        columns: list[Any] = list(dict.fromkeys(column for row in rows for column in row))
        cells: list[Any] = []
        notes: list[str | None] = []
        for row in rows:
            found = [_cell(row.get(column)) for column in columns]
            cells.append([value for value, _ in found])
            notes.append("; ".join(note for _, note in found if note) or None)
        if any(notes):  # in a column of their own: a column has one type
            columns.append("note")
            cells = [[*line, note] for line, note in zip(cells, notes, strict=True)]
        made = wandb.Table(columns=columns, data=cells)
        page = wandb.Html(html_table(rows), inject=False)
        self._send({name: made, f"{name}_page": page}, step)

    def summary(self, figures: Mapping[str, Any]) -> None:
        self._run.summary.update(numbers(figures))

    def alert(self, title: str, text: str, level: Level) -> None:
        self._run.alert(title=title[:63], text=text, level=level.upper())

    def artifact(self, one: Artifact) -> None:
        """Log it, or say that the run used it; an offline run can only log."""
        import wandb

        made = wandb.Artifact(one.name, type=one.kind, metadata=dict(one.metadata))
        for file in one.files:
            made.add_dir(str(file)) if file.is_dir() else made.add_file(str(file))
        for path in one.references:
            made.add_reference(f"file://{path.resolve()}", name=path.name, checksum=False)
        if one.is_input and not self.offline:
            self._run.use_artifact(made)
        else:
            self._run.log_artifact(made)

    def finish(self) -> None:
        self._lineage.join(5.0)
        self._run.finish()

    def _send(self, row: dict[str, Any], step: int) -> None:
        # A step behind is one after a return to a checkpoint: wandb takes no step of its own twice.
        at = step if step >= self._at else None
        self._at = max(self._at, step)
        self._run.log({**row, "step": step}, step=at)

    def _define(self, row: Mapping[str, Any]) -> None:
        """Have the summary keep the best of every held-out figure, beside its last value."""
        for key in row.keys() - self._seen:
            self._seen.add(key)
            if not key.startswith(("val/", "eval/")) or key.endswith(("_chance", "_n", "_bar")):
                continue
            last = key.rpartition("/")[2]
            way = "min" if any(w in last for w in LOWER) else "max" if _high(last) else ""
            if way:
                self._run.define_metric(key, step_metric="step", summary=f"{way},last")


def _high(name: str) -> bool:
    return any(word in name for word in HIGHER)


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


def _cell(value: Any) -> tuple[Any, str]:
    """A value of a table, a file as what it shows; and a note where it cannot be shown."""
    import wandb
    from PIL import Image

    if not isinstance(value, Path):
        return value if value is None or isinstance(value, (int, float)) else str(value), ""
    try:
        shown = show_file(value)
        if shown.kind == "text":
            return shown.content[:MAX_LETTERS], ""
        if len(shown.content) > MAX_BYTES:
            return None, f"{value.name}: too long to show"
        if shown.kind == "audio":
            return wandb.Audio(str(value)), ""
        return wandb.Image(Image.open(io.BytesIO(shown.content))), ""
    except (OSError, ValueError) as error:  # one damaged file is no end of the tracking
        return None, f"{value.name}: cannot be shown: {error}"


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


def run_sweep(
    definition: Mapping[str, Any],
    tracking: Tracking,
    trial: Callable[[Mapping[str, Any]], None],
    count: int | None,
) -> str:
    """Make a sweep on the server and run its trials here; its id. Needs an account."""
    import wandb

    where = {"project": tracking.project, "entity": tracking.entity}
    sweep_id = wandb.sweep(dict(definition), **where)

    def one() -> None:
        with wandb.init(settings=wandb.Settings(silent=True)) as made:
            values, mine = dict(made.config), made.id
        with _environment(WANDB_RUN_ID=mine, WANDB_SWEEP_ID=sweep_id):
            trial(values)

    wandb.agent(sweep_id, function=one, count=count, **where)
    return sweep_id


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
