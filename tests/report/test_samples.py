"""The callback `samples` over real trainings: files, the index, and the page that reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_toys import folder, png

from mm.data.pack.job import pack
from mm.data.shards.reader import VOCABULARY
from mm.registry import TOKENIZERS
from mm.report import build_report
from mm.run import Run
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.callbacks.base import Callback
from mm.trainer.loop import Trainer, train

PROMPTS = [
    {"text": "a caption <7>", "to": "image"},
    {"image": "shown.png", "to": "text"},
    {"text": "train", "image": "shown.png", "to": "image"},
]


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw and token shards with the tokenizers that made them."""
    root = tmp_path_factory.mktemp("samples")
    folder(root / "files", splits=("train",))
    pack(root / "files", root / "raw", progress=False)
    BytesConfig(modality="text").build().save(root / "tok/text")
    TOKENIZERS.get("image_vq").smallest_tokenizer().save(root / "tok/image")  # type: ignore[attr-defined]
    pack(root / "raw", root / "tokens", tokenizers=root / "tok", workers=1, progress=False)
    (root / "shown.png").write_bytes(png(7))
    return root


def run_of(home: Path, out: Path, steps: int) -> Run:
    prompts = [
        {k: str(home / v) if v.endswith(".png") else v for k, v in p.items()} for p in PROMPTS
    ]
    return Run.model_validate(
        {
            "name": "own",
            "out": out,
            "vocabulary": home / "tokens" / VOCABULARY,
            "tokenizers": {m: home / "tok" / m for m in ("text", "image")},
            "model": {
                "kind": "lm",
                "d_model": 16,
                "backbone": {"kind": "stack", "pattern": "attention"},
            },
            "stages": [
                {
                    "data": {
                        "kind": "packed",
                        "sources": [{"path": home / "tokens"}],
                        "seq_len": 128,
                        "batch_size": 2,
                    },
                    "objective": "next_token",
                    "budget": {"steps": steps},
                    "schedule": {"shape": "constant", "warmup": 1},
                }
            ],
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "checkpoints": {"every": 2},
            "callbacks": [{"kind": "samples", "every": 2, "max_tokens": 4, "prompts": prompts}],
        }
    )


def index(run: Run) -> list[dict[str, Any]]:
    text = (run.folder / "samples/index.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_index_says_what_was_asked_and_what_came(home: Path, tmp_path: Path) -> None:
    run = run_of(home, tmp_path, 2)
    train(run)
    rows = index(run)
    assert [(row["step"], row["number"], row["to"]) for row in rows] == [
        (2, 0, "image"),
        (2, 1, "text"),
        (2, 2, "image"),
    ]
    root = run.folder / "samples"
    assert rows[0]["prompt"] == {"text": "a caption <7>"}
    assert rows[2]["prompt"]["text"] == "train" and list(rows[2]["prompt"]) == ["text", "image"]
    for row in rows[1:]:
        asked = (root / row["prompt"]["image"]["file"]).read_bytes()
        assert asked[:4] == png(7)[:4], "the prompt's own picture, so that the page needs no other"
    for row in rows:
        assert (root / row["file"]).is_file() and row["file"].startswith("step_000002/")

    # a resumed run adds its steps; what a killed one wrote for later steps goes
    with (root / "index.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"step": 9}) + '\n{"step": 4, "num')
    train(run_of(home, tmp_path, 4))
    assert [row["step"] for row in index(run)] == [2, 2, 2, 4, 4, 4]
    times = json.loads((run.folder / "times.json").read_text())["seconds"]
    assert {"start", "stage", "data", "step", "report", "save", "export"} <= set(times)

    page = build_report(run.folder).read_text()
    found = re.search(r'<section id="samples">(.*?)</section>', page, re.DOTALL)
    assert found is not None
    body = found[1]
    assert "a caption &lt;7&gt;" in body and re.findall(r"<th>step (\d)</th>", body) == ["2", "4"]
    cells = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", body)[1:]
    assert [(th.count("<img"), td.count("<img")) for th, td in cells] == [(0, 2), (1, 0), (1, 2)]


def test_the_tracker_gets_one_table_a_step_with_the_files(home: Path, tmp_path: Path) -> None:
    given: list[tuple[str, int, list[dict[str, Any]]]] = []

    class Listen(Callback):
        def on_stage_start(self, trainer: Any) -> None:
            table = trainer.tracker.table

            def listening(name: str, rows: Any, step: int) -> None:
                given.append((name, step, [dict(row) for row in rows]))
                table(name, rows, step)

            trainer.tracker.table = listening

    run = run_of(home, tmp_path, 2)
    train(run, callbacks=[Listen()])
    [(name, step, rows)] = given
    assert (name, step, len(rows)) == ("samples", 2, 3)
    files = [run.folder / "samples" / row["file"] for row in index(run)]
    assert [
        row[f"sample {to}"] for row, to in zip(rows, ("image", "text", "image"), strict=True)
    ] == files
    assert rows[0]["prompt text"] == "a caption <7>" and rows[0]["step"] == 2
    assert rows[1]["prompt image"].read_bytes()[:4] == png(7)[:4]


class Remove(Callback):
    """Removes a file at the first step."""

    def __init__(self, file: Path):
        self.file = file

    def post_step(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self.file.unlink(missing_ok=True)


def test_a_prompt_file_that_is_gone_ends_no_run(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, shown = run_of(home, tmp_path, 2), tmp_path / "gone.png"
    shown.write_bytes(png(7))
    prompts = ({"text": "a", "to": "image"}, {"image": str(shown), "to": "text"})
    samples = run.callbacks[0].model_copy(update={"prompts": prompts})
    run = run.model_copy(update={"callbacks": (samples,)})
    assert Trainer(run, [Remove(shown)]).fit()["step"] == 2
    assert "gone.png" in caplog.text and [row["to"] for row in index(run)] == ["image"]


def test_times_go_on_after_a_resume_and_are_all_of_the_time(home: Path, tmp_path: Path) -> None:
    import time

    run = run_of(home, tmp_path, 1)
    seconds = lambda: json.loads((run.folder / "times.json").read_text())["seconds"]
    spent = []
    for steps in (1, 2):
        begun = time.monotonic()
        train(run_of(home, tmp_path, steps))
        spent.append(time.monotonic() - begun)
        total = sum(seconds().values())
        assert 0.9 * sum(spent) < total < sum(spent), "the phases are all of the trainer's time"
