"""The W&B mirror of a run, offline.

The run is read back with wandb's own protobuf.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import make_run, rows
from trainer_toys import toys_registered  # noqa: F401

HELPERS = Path(__file__).parents[1]
CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import soundfile
import trainer_toys
from PIL import Image
from trainer_runs import make_run
trainer_toys.register()
from mm.cli.eval import mirror_to_tracker
from mm.trainer.loop import Trainer
from mm.trainer.callbacks.base import Callback

out = Path(sys.argv[1])
Image.new("RGB", (8, 8), (200, 10, 10)).save(out / "a.png")
soundfile.write(out / "a.wav", [0.1, -0.1] * 400, 8000)
out.joinpath("bad.png").write_bytes(b"no picture")
out.joinpath("a.txt").write_text("words < file")

class Samples(Callback):
    def post_step(self, trainer, step, metrics):
        if step == 2:
            rows = [{"step": step, "prompt text": "a < b", "sample image": out / "a.png"},
                    {"step": step, "prompt image": out / "a.png", "sample audio": out / "a.wav"},
                    {"step": step, "sample text": out / "a.txt", "sample image": out / "bad.png"}]
            trainer.tracker.table("samples", rows, step)
            asked = {"t_confusion": [[3, 1, 0], [0, 2, 1]], "t_classes": ["cat", "dog"]}
            trainer.tracker.log({f"eval/t/{k}": v for k, v in asked.items()}, step)

run = make_run(out, steps=3)
tracking = {"project": "p", "entity": "e", "group": "g", "job_type": "j"}
tracking |= {"notes": "n", "tags": ["t"]}
run = type(run).model_validate(run.to_dict() | {"tracking": tracking})
Trainer(run, [Samples()]).fit()
time.sleep(1.1)  # wandb names its folders by the second
mirror_to_tracker(run, run.folder, {"t": {"x_accuracy": 0.75, "x_classes": ["cat"]}})
time.sleep(1.1)
longer = make_run(out, steps=4).to_dict() | {"tracking": tracking}
Trainer(type(run).model_validate(longer)).fit()  # goes on, as after a kill or a re-queue
"""


COLUMNS = ["step", "prompt text", "sample image", "prompt image", "sample audio", "sample text"]


class Segment:
    """What one .wandb file of an offline run holds."""

    def __init__(self, path: Path):
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.alerts: list[tuple[str, str]] = []
        self.artifacts: list[tuple[str, str, dict[str, str]]] = []  # kind, name, file -> place
        self.filed: Any = None
        self.measured = False  # cores, memory, GPU
        for record in records(path):
            self._read(record)

    def _read(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            self.history.append(row)
        elif kind == "metric":
            named = record.metric.glob_name or record.metric.name
            self.axes[named] = record.metric.step_metric
        elif kind == "run":
            update = record.run.config.update
            self.config |= {item.key: json.loads(item.value_json) for item in update}
            self.filed = record.run
        elif kind == "summary":
            for item in record.summary.update:
                key = item.key or "/".join(item.nested_key)
                self.summary[key] = json.loads(item.value_json)
        elif kind == "alert":
            self.alerts.append((record.alert.title, record.alert.level))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            self._artifact(record.request.log_artifact.artifact)
        elif kind == "artifact":
            self._artifact(record.artifact)
        elif kind == "stats":
            self.measured = True

    def _artifact(self, artifact: Any) -> None:
        entries = {e.path: e.ref or e.local_path for e in artifact.manifest.contents}
        self.artifacts.append((artifact.type, artifact.name, entries))


def records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: a 7-byte header, then LevelDB framing in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too short a rest for a header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_offline_run_holds_scalars_axis_media_and_config(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
    }  # no key anywhere
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(HELPERS)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wandb" not in done.stderr.lower(), done.stderr
    run = make_run(tmp_path, steps=3)
    file, evaluated, resumed = sorted((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert file.name == evaluated.name == resumed.name  # one run: its id
    assert json.loads((run.folder / "run_id.json").read_text())["id"] in file.name
    first, second = Segment(file), Segment(resumed)
    assert first.axes.get("*") == "step"
    for row in rows(run):
        of = first if row["step"] <= 3 else second
        for name in ("loss/text", "loss/image", "tokens/image_share", "optim/lr", "time/forward"):
            assert any(
                h.get("step") == h["_step"] == row["step"] and h.get(name) == pytest.approx(v)
                for h in of.history
                if (v := row[name]) is not None
            ), name
    assert {h["step"] for h in second.history} == {4}  # no step twice
    assert first.measured and first.filed.display_name == "run"
    for field, value in (("project", "p"), ("entity", "e"), ("run_group", "g"), ("job_type", "j")):
        assert getattr(first.filed, field) == value, field
    assert first.filed.notes == "n" and list(first.filed.tags) == ["t"]
    assert first.config["model"]["kind"] == "toy_lm"
    assert first.config["environment"]["precision"] == "fp32"
    assert Segment(evaluated).summary["eval/t/x_accuracy"] == 0.75
    assert "eval/t/x_classes" not in Segment(evaluated).summary
    (plot,) = {k.partition("_table")[0] for h in first.history for k in h if "t_confusion" in k}
    assert plot == "eval/t/t_confusion"
    assert ("run: run ended", "INFO") in first.alerts
    made = {(kind, name) for kind, name, _ in first.artifacts}
    assert ("model", "model-run") in made
    (model,) = (entries for kind, _, entries in first.artifacts if kind == "model")
    assert {name.partition("/")[0] for name in model} == {"model", "step_000003"}
    assert all(uri.startswith("file://") for uri in model.values())  # nothing of it was copied
    if first.config["environment"]["commit"]:
        assert any(kind == "code" for kind, _ in made)
    check_media(first, file.parent / "files", run.folder / "wandb")


def check_media(segment: Segment, files: Path, below: Path) -> None:
    """The save of samples: one table whose cells are what was sampled, and a page of the same."""
    (row,) = (h for h in segment.history if "samples.path" in h)
    assert row["samples._type"] == "table-file" and row["step"] == 2
    # The file of the history has words alone; what a page shows is the artifact that it refers to.
    (files_of,) = (f for kind, name, f in segment.artifacts if name.endswith("-samples"))
    table = json.loads(Path(files_of["samples.table.json"]).read_text())
    assert table["columns"] == [*COLUMNS, "note"]
    cells = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    assert cells[0]["prompt text"] == "a < b" and cells[2]["sample text"] == "words < file"
    assert cells[0]["sample image"]["_type"] == cells[1]["prompt image"]["_type"] == "image-file"
    assert cells[1]["sample audio"]["_type"] == "audio-file"
    assert "bad.png: cannot be shown" in cells[2]["note"]  # and the tracking went on
    # What the cells refer to lies in the run folder, so that it moves with it.
    shown = below.parents[1] / "a.png", below.parents[1] / "a.wav"
    for cell, file in ((cells[0]["sample image"], shown[0]), (cells[1]["sample audio"], shown[1])):
        sent = Path(files_of[cell["path"]])
        assert sent.is_relative_to(below) and sent.read_bytes() == file.read_bytes()
    html = (files / row["samples_page.path"]).read_text()
    assert re.findall("<th>(.*?)</th>", html) == COLUMNS
    assert "a &lt; b" in html and "words &lt; file" in html
    picture, sound = (base64.b64encode(f.read_bytes()).decode() for f in shown)
    assert html.count(picture) == 2 and html.count(sound) == 1 and "<audio" in html
