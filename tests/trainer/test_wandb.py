"""The W&B mirror: an offline run, and a tracker that cannot hurt a run.

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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import make_run, rows
from trainer_toys import toys_registered  # noqa: F401

from mm.trainer.log import tracker
from mm.trainer.log.tracker import Tracker
from mm.trainer.loop import train

HELPERS = Path(__file__).parents[1]
PNG = b"\x89PNG of a picture"
CHILD = (
    f"PNG = {PNG.hex()!r}\n"
    + """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import trainer_toys
from trainer_runs import make_run
trainer_toys.register()
from mm.cli.eval import mirror_to_tracker
from mm.trainer.loop import Trainer
from mm.trainer.callbacks.base import Callback

out = Path(sys.argv[1])
out.joinpath("a.png").write_bytes(bytes.fromhex(PNG))
out.joinpath("a.wav").write_bytes(b"RIFF of a sound")
out.joinpath("a.txt").write_text("words < file")

class Samples(Callback):
    def post_step(self, trainer, step, metrics):
        if step == 2:
            rows = [{"step": step, "prompt text": "a < b", "sample image": out / "a.png"},
                    {"step": step, "prompt image": out / "a.png", "sample audio": out / "a.wav"},
                    {"step": step, "sample text": out / "a.txt"}]
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
"""
)


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
    file, evaluated = sorted((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert file.name == evaluated.name  # one run: its id
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    axes: dict[str, str] = {}
    filed: Any = None
    measured = False  # cores, memory, GPU
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(
                {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        elif kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            filed = record.run
        elif kind == "stats":
            measured = True
    assert axes.get("*") == "step"
    for row in rows(run):
        for name in ("loss/text", "loss/image", "tokens/image_share", "optim/lr"):
            assert any(
                h.get("step") == row["step"] and h.get(name) == pytest.approx(row[name])
                for h in history
            ), name
    assert measured and filed.display_name == "run"
    for field, value in (("project", "p"), ("entity", "e"), ("run_group", "g"), ("job_type", "j")):
        assert getattr(filed, field) == value, field
    assert filed.notes == "n" and list(filed.tags) == ["t"]
    (table,) = (h for h in history if "samples.path" in h)
    assert table["samples._type"] == "html-file" and table["step"] == 2
    html = (file.parent / "files" / table["samples.path"]).read_text()
    columns = ["step", "prompt text", "sample image", "prompt image", "sample audio", "sample text"]
    assert re.findall("<th>(.*?)</th>", html) == columns
    assert "a &lt; b" in html and "words &lt; file" in html
    assert html.count(base64.b64encode(PNG).decode()) == 2
    assert base64.b64encode(b"RIFF of a sound").decode() in html and "<audio" in html
    (plot,) = {k.partition("_table")[0] for h in history for k in h if "t_confusion" in k}
    assert plot == "eval/t/t_confusion"
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records(evaluated)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert summary["eval/t/x_accuracy"] == 0.75 and "eval/t/x_classes" not in summary
    assert config["model"]["kind"] == "toy_lm" and config["environment"]["precision"] == "fp32"


def test_mode_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """WANDB_MODE, then the config, then offline without a key."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert tracker.resolve_mode("auto") == "offline"
    assert tracker.resolve_mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert tracker.resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracker.resolve_mode("online") == "disabled"


def test_a_dead_server_does_not_end_or_hold_up_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(tracker, "INIT_TIMEOUT_S", 6.0)
    run = make_run(tmp_path, steps=2)
    begun = time.monotonic()
    assert train(run)["step"] == 2
    assert time.monotonic() - begun < 40
    assert len(rows(run)) == 2
    assert "tracking is off" in caplog.text


def test_a_failing_backend_is_dropped_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        id = "abc"
        calls = 0

        def log(self, row: Any) -> None:
            self.calls += 1
            raise OSError("disk full")

    broken = Broken()
    mirror = Tracker(broken)
    mirror.log({"loss/total": 1.0}, 1)
    mirror.log({"loss/total": 1.0}, 2)
    mirror.table("x", [{"a": 1}], 2)
    assert broken.calls == 1 and caplog.text.count("tracking is off") == 1
