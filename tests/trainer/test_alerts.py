"""Every alert, by its real cause: a line of the log, the tracker's, a command, a webhook."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from slow_rank import ToySlowConfig
from trainer_runs import Calls, make_run
from trainer_toys import toys_registered  # noqa: F401

from mm.errors import UserError
from mm.registry import CALLBACKS
from mm.run import Run
from mm.trainer.callbacks import alerts
from mm.trainer.callbacks.base import Callback
from mm.trainer.log.sinks.base import Sink
from mm.trainer.log.tracker import Feed
from mm.trainer.loop import Trainer

CALLBACKS._modules.pop("toy_slow", None)  # the laws of other files do not run over it


class Told(Sink):
    def __init__(self) -> None:
        self.alerts: list[tuple[str, str, str]] = []
        self.begun = False

    def log(self, row: Any, step: int) -> None:
        pass

    def alert(self, title: str, text: str, level: Any) -> None:
        self.alerts.append((title, text, level))


def told(
    run: Run, *callbacks: Callback, ends: type[BaseException] | None = None
) -> list[tuple[str, str, str]]:
    """Alerts of a run, as a sink got them."""
    sink = Told()

    def listen(trainer: Any) -> None:
        if not sink.begun:
            sink.begun = True
            trainer.tracker.feeds.append(Feed("told", lambda: sink))

    trainer = Trainer(run, [Calls("on_stage_start", listen), *callbacks])
    if ends is None:
        trainer.fit()
    else:
        with pytest.raises(ends):
            trainer.fit()
    return sink.alerts


def events(run: Run) -> list[str]:
    file = run.folder / "events.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line)["event"] for line in file.read_text().splitlines()]


def titles(found: list[tuple[str, str, str]]) -> list[str]:
    return [title.removeprefix("run: ") for title, _, _ in found]


def with_alerts(run: Run, **change: Any) -> Run:
    values = run.to_dict() | {"callbacks": [{"kind": "alerts"} | change]}
    return Run.model_validate(values)


def test_a_run_that_ends_says_so(tmp_path: Path) -> None:
    assert titles(told(make_run(tmp_path))) == ["run ended"]


def test_a_signal_is_no_failure(tmp_path: Path) -> None:
    found = told(make_run(tmp_path, data={"signal_at": 2}), ends=SystemExit)
    assert titles(found) == ["run stopped"]
    assert "step 3 of 6" in found[0][1]


def test_an_exception_is_told_with_its_words(tmp_path: Path) -> None:
    def fail(trainer: Any) -> None:
        if trainer.step == 2:
            raise RuntimeError("out of luck")

    found = told(make_run(tmp_path), Calls("pre_step", fail), ends=RuntimeError)
    assert titles(found) == ["run failed"] and "out of luck" in found[0][1]


def test_a_step_that_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, data={"spikes": (2,)}, model={"spike_at": 17})
    found = told(run)
    assert titles(found) == ["non-finite", "run ended"]
    assert found[0][2] == "error"
    lines = [r for r in caplog.records if "finite" in r.getMessage()]
    assert len(lines) == 1  # the guard's; it is not said twice


def test_a_spike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch whose embedding was scaled up before its step."""
    run = make_run(tmp_path, steps=30)

    def jump(trainer: Any) -> None:
        if trainer.step == 26:
            import torch

            with torch.no_grad():
                trainer.stage.engines["model"].raw.embed.weight.mul_(50)

    found = told(run, Calls("pre_step", jump))
    # Steps of a toy may wait for others on a busy machine.
    found = [one for one in found if not one[0].endswith("slow")]
    assert titles(found) == ["spike", "run ended"] and "mm explain" in found[0][1]
    assert sum("a spike" in r.getMessage() for r in caplog.records) == 1


def test_throughput_below_half_of_its_median(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow, steady = ToySlowConfig(first=30, seconds=0.3), ToySlowConfig(seconds=0.03)
    run = make_run(tmp_path, steps=36).model_copy(update={"callbacks": ()})
    found = told(run, steady.build(), slow.build())
    assert titles(found) == ["slow", "run ended"]
    assert sum("alert: slow" in r.getMessage() for r in caplog.records) == 1
    assert events(run).count("slow") == 1


def test_dead_codes(tmp_path: Path) -> None:
    """A codebook that never sees more than the ids of two modalities, half of its size."""
    run = with_alerts(make_run(tmp_path, steps=12), codes_after=5, dead_codes=0.3)
    found = told(run)
    assert titles(found) == ["dead codes", "run ended"], found
    assert "% of the codes of codebook" in found[0][1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_nearly_full(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    (small_disk / "others").write_bytes(bytes(2_000_000))
    run = with_alerts(make_run(small_disk), disk_share=0.5)
    found = told(run)
    assert titles(found) == ["disk nearly full", "run ended"]
    assert "MiB free" in found[0][1] and events(run) == ["disk nearly full"]
    assert sum("disk nearly full" in r.getMessage() for r in caplog.records) == 1


def test_a_checkpoint_that_fails(small_disk: Path) -> None:
    run = make_run(small_disk, steps=6)

    def fill(trainer: Any) -> None:
        if trainer.step == 1:
            with (small_disk / "others").open("wb") as file:
                left = shutil.disk_usage(small_disk).free
                file.write(bytes(max(0, left - 20_000)))

    found = told(run, Calls("pre_step", fill), ends=UserError)
    assert titles(found)[-1] == "checkpoint failed"
    assert found[-1][2] == "error" and "step 3 of 6" in found[-1][1]


def test_the_same_alert_does_not_come_again_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, data={"spikes": (1, 2, 3)}, model={"spike_at": 17})
    assert titles(told(run)) == ["non-finite", "run ended"]


def test_command_and_webhook_get_the_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  http.server asks for the name
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return None

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv(alerts.WEBHOOK, f"http://127.0.0.1:{server.server_port}/hook")
        command = f'cat > {tmp_path}/json; echo "$MM_ALERT at $MM_ALERT_STEP" > {tmp_path}/line'
        monkeypatch.setenv(alerts.COMMAND, command)
        told(make_run(tmp_path))
        server.shutdown()
    assert (tmp_path / "line").read_text() == "run ended at 6\n"
    assert json.loads((tmp_path / "json").read_text())["alert"] == "run ended"
    assert [one["text"] for one in got] == ["run, step 6: run ended: all done at step 6 of 6"]


def test_a_hook_that_fails_or_hangs_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "HOOK_TIMEOUT_S", 0.5)
    monkeypatch.setenv(alerts.COMMAND, "sleep 60")
    monkeypatch.setenv(alerts.WEBHOOK, "http://127.0.0.1:9/")  # nothing listens
    begun = time.monotonic()
    told(make_run(tmp_path))
    assert time.monotonic() - begun < 20
    assert alerts.WEBHOOK in caplog.text
