"""The table of starts: what `mm launch` wrote about attempts that failed."""

from __future__ import annotations

import json
from pathlib import Path

from mm.report import build_report


def test_attempts_are_one_table_and_a_single_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/text": 2.0}\n')
    (tmp_path / "launch").mkdir()
    file = tmp_path / "launch" / "history.jsonl"
    first = {
        "attempt": 1, "nodes": ["a", "<b>"], "world": 2, "step_from": 0, "step_to": 27,
        "steps_lost": 7, "started": 100.0, "ended": 190.0, "trains_after_s": 9.5, "code": 1,
        "node": "<b>", "why": "<b>: a rank was ended by SIGKILL",
    }  # fmt: skip
    file.write_text(json.dumps(first) + "\n")
    assert "Starts and failures" not in build_report(tmp_path).read_text()
    last = {"attempt": 2, "nodes": ["a"], "world": 1, "step_from": 20, "code": 0, "why": ""}
    file.write_text(f"{json.dumps(first)}\n{json.dumps(last)}\nno json\n")
    page = build_report(tmp_path).read_text()
    assert "Starts and failures" in page and "<td>7</td>" in page and "<b>: a" not in page
    assert "&lt;b&gt;: a rank was ended by SIGKILL" in page and "all steps are done" in page
    assert "launch/history.jsonl: 1 unreadable line" in page
