"""A page of a stranger's run folder holds nothing from outside it, and any file may be damaged."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from report_toys import write, write_png

from mm.errors import UserError
from mm.report import build_report

SECRET = "root:x:0:0:/root"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write(folder, "metrics.jsonl", [{"step": 1, "loss/text": 1.0}])
    write(tmp_path, "private/secret.txt", SECRET)
    write_png(tmp_path / "private/eval/secret.png", (1, 2, 3))
    return folder


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("samples/step_000001/00_a_to_text.txt", "secret.txt"),
        ("samples/step_000001", "."),
        ("samples", "."),
        ("config.yaml", "secret.txt"),
        ("tokenizers/image", "."),
        ("tokenizers", "."),
        ("eval", "eval"),
        ("eval/a.png", "eval/secret.png"),
    ],
)
def test_no_link_leads_out_of_the_folder(run: Path, tmp_path: Path, name: str, target: str) -> None:
    secret = (tmp_path / "private/eval/secret.png").read_bytes()
    write(tmp_path / "private", "step_000001/00_a_to_text.txt", SECRET)
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path(os.path.relpath(tmp_path / "private" / target, link.parent)))
    page = build_report(run).read_text()
    assert SECRET not in page and base64.b64encode(secret).decode() not in page
    assert "leads out of the run folder, not shown" in page


def test_a_link_inside_the_folder_is_followed(run: Path) -> None:
    write(run, "samples/step_000001/00_a_to_text.txt", "an answer")
    (run / "samples/step_000002").symlink_to("step_000001")
    assert build_report(run).read_text().count("an answer") == 2


@pytest.mark.parametrize("file", ["../../private/secret.txt", "/etc/passwd", "step_1/link.txt"])
def test_the_index_of_samples_names_no_file_outside(run: Path, file: str) -> None:
    write(run, "samples/step_1/ok.txt", "fine")
    (run / "samples/step_1/link.txt").symlink_to("../../../private/secret.txt")
    rows = [
        {"step": 1, "number": n, "prompt": {"image": {"file": p}}, "to": "text", "file": f}
        for n, (p, f) in enumerate([("no", file), (file, "step_1/ok.txt")])
    ]
    write(run, "samples/index.jsonl", rows)
    page = build_report(run).read_text()
    assert "fine" in page and "root:x:" not in page


def test_the_page_is_written_into_the_folder_alone(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "private" / "secret.txt"
    (run / "report").mkdir()
    (run / "report/index.html.part").symlink_to(mine)
    build_report(run)
    assert mine.read_text() == SECRET
    for made in (run / "report").iterdir():
        made.unlink()
    (run / "report").rmdir()
    (run / "report").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is a link; remove it: rm "):
        build_report(run)
    (run / "report").unlink()
    (run / "report").write_text("")
    with pytest.raises(UserError, match="is no folder; move it away: mv "):
        build_report(run)


NUMBERS = ["NaN", "Infinity", "1e308", "5e-324", "1" * 400, "true", '"7"', "null", "[" * 20000]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: v[:8])
def test_any_number_may_stand_in_the_metrics(run: Path, value: str) -> None:
    lines = ['{"step": 1, "loss/text": 2}', f'{{"step": {value}, "loss/text": 2}}']
    lines += [
        f'{{"step": {n}, "loss/text": {value}, "perf/step_seconds": {value}}}' for n in (2, 3)
    ]
    lines += [f'{{"step": 4, "loss/text": 1, "eval/r/x_accuracy": {value}, "eval/r/x_n": {value}}}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "results.json").write_text(f'{{"seconds": {{"a": {value}}}, "run": {value}}}')
    assert '<section id="curves">' in build_report(run).read_text()


@pytest.mark.parametrize("place", ["name: *e", "model: {kind: *e}", "stages: [*e]", "seed: *e"])
def test_a_config_of_aliases_costs_no_memory(run: Path, place: str) -> None:
    bomb = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for name, last in zip("bcde", "abcd", strict=True):
        bomb.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 20)}]")
    (run / "config.yaml").write_text("\n".join([*bomb, place]))
    page = build_report(run).read_text()
    assert len(page) < 100_000 and "its aliases unfold to too many" in page
    (run / "config.yaml").write_text("a: &a [*a]\nname: fine")  # one that holds itself
    assert "nested deeper than" in build_report(run).read_text()


@pytest.mark.parametrize("name", ["step_²", "step_", "step_-1", "step_1e3", "step_" + "9" * 30])
def test_folders_that_are_no_steps_are_left_out(run: Path, name: str) -> None:
    write(run, f"samples/{name}/00_a_to_text.txt", "an answer")
    assert "an answer" not in build_report(run).read_text()


@pytest.mark.parametrize(
    "name",
    ["start.json", "times.json", "results.json", "environment.json", "commands.json", "eval.json"]
    + ["model/vocabulary.json", "events.jsonl", "samples/index.jsonl"],
)
@pytest.mark.parametrize(
    "text", ["[" * 20000, "7", "[7, {}]", '{"stages": [7, {"sources": [7]}]}'], ids=lambda t: t[:8]
)
def test_any_json_may_stand_in_any_file(run: Path, name: str, text: str) -> None:
    write(run, name, text if not name.endswith("l") else [])
    (run / name).write_text(text)
    assert build_report(run).read_text().endswith("</html>")


@pytest.mark.parametrize("key", ["figures", "tasks", "seconds", "sampling"])
def test_results_of_any_shape(run: Path, key: str) -> None:
    for value in (7, [7], [{"name": 7}], {"a": {"b": [1, {}]}}, [{"figures": {"x_confusion": 1}}]):
        write(run, "results.json", json.dumps({key: value}))
        assert build_report(run).read_text().endswith("</html>")
