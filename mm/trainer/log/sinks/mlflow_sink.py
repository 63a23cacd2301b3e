"""MLflow as a sink: a run of the experiment that ``tracking.project`` names."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mm.registry import SINKS
from mm.trainer.log.html_table import html_table
from mm.trainer.log.sinks.base import Level, Place, Sink, SinkConfig, numbers

LONGEST = 6000  # letters of a parameter that every store takes
BATCH = 1000  # metrics that one request may hold


@SINKS.register("mlflow")
class MlflowConfig(SinkConfig):
    """MLflow; needs the extra `mlflow`. MLFLOW_TRACKING_URI wins over `uri`."""

    package = "mlflow"

    kind: Literal["mlflow"] = "mlflow"
    uri: Annotated[
        str | None, Field(description="tracking server or database; default: `mlflow.db` in `out`")
    ] = None

    def build(self, place: Place) -> MlflowSink:
        return MlflowSink(self, place)


class MlflowSink(Sink):
    """Parameters, metrics by step, tables as pages; the run is found again by our run id."""

    def __init__(self, config: MlflowConfig, place: Place):
        import os

        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        tracking = place.run.tracking
        default = f"sqlite:///{(place.run.out / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri or default
        self._client = MlflowClient(uri)
        found = self._client.get_experiment_by_name(tracking.project)
        where = found.experiment_id if found else self._client.create_experiment(tracking.project)
        mine = self._client.search_runs([where], f"tags.mm_run_id = '{place.run_id}'")
        given = {"group": tracking.group, "job_type": tracking.job_type}
        tags = {k: v for k, v in given.items() if v} | dict.fromkeys(tracking.tags, "true")
        tags |= {"mm_run_id": place.run_id}
        if tracking.notes:
            tags["mlflow.note.content"] = tracking.notes
        run = (
            mine[0] if mine else self._client.create_run(where, tags=tags, run_name=place.run.name)
        )
        self._id = run.info.run_id
        if place.config is not None and not mine:
            from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

            flat = [Param(k, str(v)[:LONGEST]) for k, v in _flat(place.config)]
            for i in range(0, len(flat), 100):  # of one request
                self._client.log_batch(self._id, params=flat[i : i + 100])

    def log(self, row: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(1000 * time.time())
        found = {k: float(v) for k, v in numbers(row).items()}
        rows = [Metric(k, v, now, step) for k, v in found.items() if math.isfinite(v)]
        for i in range(0, len(rows), BATCH):
            self._client.log_batch(self._id, metrics=rows[i : i + BATCH])

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._client.log_text(self._id, html_table(rows), f"{name}/step_{step:06d}.html")

    def summary(self, figures: Mapping[str, Any]) -> None:
        for name, value in numbers(figures).items():
            self._client.log_metric(self._id, f"summary/{name}", float(value))

    def alert(self, title: str, text: str, level: Level) -> None:
        self._client.set_tag(self._id, f"alert.{title}", f"{level}: {text}"[:LONGEST])

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out += _flat(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            out += _flat({str(i): v for i, v in enumerate(value)}, f"{name}.")
        else:
            out.append((name, value.as_posix() if isinstance(value, Path) else value))
    return out
