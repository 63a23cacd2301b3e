"""What a stream gave, in metrics.jsonl and on the report page, over a real training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_toys import token_shards

from mm.data.shards.reader import VOCABULARY
from mm.data.streams.stats import as_shares
from mm.report import build_report
from mm.run import Run
from mm.trainer.log import metrics
from mm.trainer.loop import train


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run_of(out: Path, name: str, steps: int, **data: Any) -> Run:
    return Run.model_validate(
        {
            "name": name,
            "out": out,
            "vocabulary": out / "tokens" / VOCABULARY,
            "model": {
                "kind": "lm",
                "d_model": 16,
                "backbone": {"kind": "stack", "pattern": "attention"},
            },
            "stages": [
                {
                    "data": data,
                    "objective": "next_token",
                    "budget": {"steps": steps},
                    "allow_left_out": 0.5,  # rejects are among what is counted
                    "schedule": {"shape": "constant", "warmup": 2},
                }
            ],
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "checkpoints": {"every": 3},
        }
    )


def lines(run: Run) -> list[dict[str, Any]]:
    rows = metrics.read(run.folder / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if k.startswith("data/") and k != "data/wait_seconds"}
        for row in rows
    ]


def test_shares_in_the_metrics_and_on_the_page(tmp_path: Path) -> None:
    """Two sources 3:1 by samples: every line has the shares so far; train 6 = train 3 + 3."""
    token_shards(tmp_path, 37)
    source = {"path": tmp_path / "tokens"}
    data = {
        "kind": "packed",
        "sources": [{**source, "weight": 3}, source],
        "seq_len": 40,
        "batch_size": 4,
        "block_samples": 16,
    }
    whole = run_of(tmp_path, "whole", 6, **data)
    train(whole)
    train(run_of(tmp_path, "parts", 3, **data))
    parts = run_of(tmp_path, "parts", 6, **data)
    train(parts)
    rows = lines(whole)
    assert rows == lines(parts) and len(rows) == 6
    last = rows[-1]
    assert 0 < last["data/padding_share"] < 0.6
    assert last["data/sample_shares/0"] + last["data/sample_shares/1"] == pytest.approx(1)
    assert last["data/sample_shares/0"] == pytest.approx(0.75, abs=0.1)
    tokens = {k: v for k, v in last.items() if k.startswith("data/token_shares/")}
    assert {k[18:] for k in tokens} == {"text", "image", "audio"}
    assert sum(tokens.values()) == pytest.approx(1)
    assert last["data/rejects/too_long"] == sum(row["data/too_long"] for row in rows) > 0

    page = build_report(whole.folder).read_text()
    section = re.search(r'<section id="data">.*?</section>', page, re.DOTALL)
    assert section is not None
    text = section.group()
    shown = re.findall(r"<th>(\d: tokens)</th>.*?left:([\d.]+)%.*?<td>([\d.]+) %</td>", text)
    assert [(n, float(w)) for n, w, _ in shown] == [("0: tokens", 75.0), ("1: tokens", 25.0)]
    assert float(shown[0][2]) == pytest.approx(100 * last["data/sample_shares/0"], abs=0.06)
    assert "Padding share" in text and "samples too long" in text


def test_the_page_marks_what_is_off(tmp_path: Path) -> None:
    """Shares by modality were asked for, and one of them was not reached."""
    (tmp_path / "config.yaml").write_text(
        "stages: [{data: {kind: packed, sources: [{path: a/<z>}, {path: b}], "
        "modality_tokens: {text: 1, image: 3}}}]"
    )
    row = {"step": 1, "data/token_shares/text": 0.26, "data/token_shares/image": 0.5}
    row |= {"data/sample_shares/0": 0.5, "data/sample_shares/1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    text = build_report(tmp_path).read_text()
    found = dict(re.findall(r"<th>(text|image)</th>(.*?)</tr>", text))
    assert "configured 25.0 %" in found["text"] and "off" not in found["text"]
    assert "configured 75.0 %" in found["image"] and "off</span>" in found["image"]
    assert "<z>" not in text.split('<section id="config">')[0] and "0: &lt;z&gt;" in text


def test_shares_of_counts() -> None:
    assert as_shares({"a": 1}) == {"a": 1.0} and as_shares({"a": 0}) == {"a": 0.0}
    assert as_shares({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75} and as_shares({}) == {}
