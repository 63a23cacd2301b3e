"""The page of a run that was only trained: no results.json, no tokenizers of its own below it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_toys import write, write_png

from mm.report import build_report
from mm.report.read import read_run

CLASSES = ["cat", "dog", "ship"]


def recognition(accuracy: float, **more: Any) -> dict[str, Any]:
    """Figures of the task `recognition`."""
    return {
        "image_to_text_accuracy": accuracy,
        "image_to_text_chance": 0.34,
        "image_to_text_n": 30,
        "image_to_text_classes": CLASSES,
        "image_to_text_confusion": [[8, 2, 0, 0], [1, 9, 0, 0], [0, 0, 6, 4]],
        **more,
    }


def evaluated(**tasks: dict[str, Any]) -> dict[str, Any]:
    return {f"eval/{t}/{k}": v for t, figures in tasks.items() for k, v in figures.items()}


def cards(page: str) -> list[tuple[str, str]]:
    """(title, rest) of every card."""
    return re.findall(r'<div class="card"><h3>(.*?)</h3>(.*?</p>(?:<div.*?</div>)?<p.*?)</p>', page)


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    return found.group() if found else ""


def uri(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_figures_of_the_tasks_are_cards_with_chance_and_legend(tmp_path: Path) -> None:
    row = {"step": 9} | evaluated(
        recognition=recognition(0.77),
        bits_per_byte={"image_bits_per_byte": 0.05, "image_bits_per_byte_chance": 0.03},
    )
    write(tmp_path, "metrics.jsonl", [{"step": 1, "loss/total": 2.0}, row])
    page = section(build_report(tmp_path).read_text(), "figures")
    found = dict(cards(page))
    assert set(found) == {"Image → text accuracy", "Image bits per byte"}
    assert "77.0 %" in found["Image → text accuracy"]
    assert "chance 34.0 % · n = 30" in found["Image → text accuracy"]
    assert "worse than chance" in found["Image bits per byte"]
    assert "worse than chance" not in found["Image → text accuracy"]
    legend = re.search(r'<ul class="legend marks">(.*?)</ul>', page)
    assert legend and re.findall(r'<i class="(\w+)"></i>([\w ]+)', legend[1]) == [
        ("chance", "chance")
    ]


def test_two_tasks_of_one_kind_stand_side_by_side(tmp_path: Path) -> None:
    row = {"step": 9} | evaluated(voices=recognition(0.94), digits=recognition(0.997))
    write(tmp_path, "metrics.jsonl", [row])
    page = section(build_report(tmp_path).read_text(), "figures")
    titles = [(re.sub("<.*?>", "", title), "94.0 %" in rest) for title, rest in cards(page)]
    assert titles == [
        ("Image → text accuracy voices", True),
        ("Image → text accuracy digits", False),
    ]
    assert page.count('<figure class="confusion">') == 2
    # as `mm eval --json` names them
    rows = [{"name": f"{t}/image_to_text_accuracy", "value": v} for t, v in (("a", 1), ("b", 0))]
    write(tmp_path, "results.json", {"figures": rows})
    titles = [t for t, _ in cards(section(build_report(tmp_path).read_text(), "figures"))]
    assert [re.sub("<.*?>", "", t)[-1] for t in titles] == ["a", "b"]


def test_what_a_probe_on_pixels_reaches_stands_on_the_card(tmp_path: Path) -> None:
    figures = {"image_to_text_accuracy": 0.44, "image_to_text_linear_probe_accuracy": 0.405}
    write(tmp_path, "metrics.jsonl", [{"step": 1} | evaluated(recognition=figures)])
    page = section(build_report(tmp_path).read_text(), "figures")
    ((title, card),) = cards(page)
    assert title == "Image → text accuracy" and "logistic regression on pixels 40.5 %" in card
    mark = re.search(r'<i class="probe" style="left:([\d.]+)%"', card)
    assert mark and mark[1] == "40.5"
    assert '<li><i class="probe"></i>logistic regression on pixels</li>' in page


@pytest.mark.parametrize("from_results", [False, True])
def test_the_confusion_matrix_is_a_heat_map(tmp_path: Path, from_results: bool) -> None:
    figures = recognition(0.77)
    if from_results:
        write(tmp_path, "results.json", {"tasks": [{"task": {"data": "d"}, "figures": figures}]})
    else:
        write(tmp_path, "metrics.jsonl", [{"step": 1} | evaluated(recognition=figures)])
    page = section(build_report(tmp_path).read_text(), "figures")
    says = dict(re.findall(r"<title>(.*?)</title><rect[^>]*--share:([\d.]+)", page))
    assert len(says) == 12
    assert says["cat answered as dog: 2 of 10"] == "0.200"
    assert says["ship answered as none: 4 of 10"] == "0.400"
    assert "23 of 30 right" in page
    assert "Most often mixed up: ship → none 4 · cat → dog 2 · dog → cat 1." in page


def test_short_class_names_leave_room_for_none(tmp_path: Path) -> None:
    figures = {"x_accuracy": 1.0, "x_confusion": [[1, 0, 0], [0, 1, 0]], "x_classes": ["0", "1"]}
    write(tmp_path, "metrics.jsonl", [{"step": 1} | evaluated(recognition=figures)])
    page = section(build_report(tmp_path).read_text(), "figures")
    found = re.search(r'y="([\d.]+)" transform="rotate\(-45 [\d. ]+\)">none<', page)
    assert found and float(found[1]) > 0.7 * 6.3 * len("none")  # its height, turned by 45 degrees


@pytest.mark.parametrize(
    "counts", [[[1, 2], [3]], [[1, -1], [0, 1]], [["a", 1], [1, 1]], [], 7, [[1, 2, 3, 4]]]
)
def test_what_is_no_confusion_matrix_is_left_out(tmp_path: Path, counts: Any) -> None:
    figures = {"x_accuracy": 0.5, "x_confusion": counts, "x_classes": ["a", "b"]}
    write(tmp_path, "metrics.jsonl", [{"step": 1} | evaluated(recognition=figures)])
    page = build_report(tmp_path).read_text()
    assert '<figure class="confusion">' not in page and "50.0 %" in page


def charts(page: str) -> dict[str, dict[str, Any]]:
    """Title -> its lines, their classes, ring, note."""
    found = {}
    for body in re.findall(r'<figure class="chart".*?</figure>', page, re.DOTALL):
        title = re.search(r"<figcaption>(.*?)(?: <small>.*?)?</figcaption>", body)
        legend = re.findall(r'<li><i class="(.*?)"></i>(.*?) <b>(.*?)</b>(.*?)</li>', body)
        note = re.search(r'<p class="note">(.*?)</p>', body)
        assert title
        found[title[1]] = {
            "lines": {name: (look, last, ring) for look, name, last, ring in legend},
            "rings": len(re.findall(r'class="ring', body)),
            "note": note[1] if note else "",
        }
    return found


def test_held_out_curves_stand_beside_the_training(tmp_path: Path) -> None:
    held_out = {2: 3.0, 4: 2.0, 6: 2.5}
    rows = []
    for step in range(1, 7):
        row = {"step": step, "loss/total": 4 - 0.5 * step, "loss/image": 4 - 0.5 * step}
        row |= {"loss/text": 1.0, "bits_per_byte/image": 0.06 - 0.01 * step}
        if step in held_out:
            row |= {"val/loss": held_out[step], "val/text/loss": held_out[step] / 2}
            row |= {"val/text/loss_chance": 1.6, "val/image/loss": 9.0}
            row |= {"val/image/bits_per_byte": held_out[step] / 50}
            row["val/image/bits_per_byte_chance"] = 0.0313
        rows.append(row)
    write(tmp_path, "metrics.jsonl", rows)
    found = charts(build_report(tmp_path).read_text())
    total = found["Total loss, held out"]
    assert total["lines"]["held out"][1:] == ("2.5", " (best 2 at step 4)") and total["rings"] == 1
    assert total["lines"]["training"][1] == "1"
    image = found["Bits per byte of image, held out"]
    assert set(image["lines"]) == {"training", "image", "chance"} and image["rings"] == 1
    assert image["lines"]["image"][1:] == ("0.05", " (best 0.04 at step 4)")
    assert "dashed" in image["lines"]["chance"][0] and "worse than chance" in image["note"]
    text = found["Loss of text, held out"]  # nats a token: its bits per byte are not known
    assert text["lines"]["chance"][1] == "1.6" and not text["note"]


def test_the_best_is_of_the_last_stage(tmp_path: Path) -> None:
    stages = [{"budget": {"steps": 2}}, {"budget": {"steps": 4}}]
    write(tmp_path, "config.yaml", json.dumps({"stages": stages}))
    values = {1: 0.5, 2: 0.4, 4: 2.0, 6: 3.0}
    write(tmp_path, "metrics.jsonl", [{"step": s, "val/loss": v} for s, v in values.items()])
    found = charts(build_report(tmp_path).read_text())
    assert "best 2 at step 4" in found["Total loss, held out"]["lines"]["held out"][2]


def test_a_task_measured_while_training_is_a_curve_with_chance(tmp_path: Path) -> None:
    rows = [{"step": s} | evaluated(photos=recognition(s / 10)) for s in (2, 4)]
    write(tmp_path, "metrics.jsonl", rows)
    page = build_report(tmp_path).read_text()
    found = {k: v for k, v in charts(page).items() if "accuracy" in k or "n (" in k}
    assert list(found) == ["Image → text accuracy (photos)"]
    assert set(found["Image → text accuracy (photos)"]["lines"]) == {"held out", "chance"}
    assert "40.0 %" in dict(cards(page))["Image → text accuracy"]


def test_what_weighs_the_total_is_said(tmp_path: Path) -> None:
    config = {"stages": [{"objective": {"kind": "next_token", "weights": {"text": 5.0}}}]}
    write(tmp_path, "config.yaml", json.dumps(config))
    row = {"loss/text": 1.0, "loss/image": 3.0, "loss/total": 4.0}
    row |= {"tokens/text_share": 0.25, "tokens/image_share": 0.75}
    write(tmp_path, "metrics.jsonl", [{"step": s, **row} for s in (1, 2)])
    loss = charts(build_report(tmp_path).read_text())["Loss per modality"]
    assert loss["note"].startswith("The total counts text 5 times, and each modality by its share")
    assert loss["lines"]["per token"][:2] == ("s0 dashed", "2.5")
    write(tmp_path, "config.yaml", "{}")
    assert charts(build_report(tmp_path).read_text())["Loss per modality"]["note"] == ""


def test_what_one_modality_says_twice_is_drawn_once(tmp_path: Path) -> None:
    row = {"loss/bytes": 1.25, "loss/total": 1.2500001, "tokens/bytes_share": 1.0}
    row |= {"targets/bytes_share": 1.0, "data/token_shares/bytes": 1.0}
    write(tmp_path, "metrics.jsonl", [{"step": s, **row} for s in (1, 2)])
    found = charts(build_report(tmp_path).read_text())
    assert list(found) == ["Loss"] and list(found["Loss"]["lines"]) == ["bytes"]


def index_row(step: int, number: int, prompt: Any, to: str, file: str) -> dict[str, Any]:
    return {"step": step, "number": number, "prompt": prompt, "to": to, "file": file}


def test_prompts_stand_beside_their_answers(tmp_path: Path) -> None:
    asked = write_png(tmp_path / "samples/prompts/01_image.png", (200, 0, 0))
    made = write_png(tmp_path / "samples/step_000004/00_x_to_image.png", (0, 200, 0))
    write(tmp_path, "samples/step_000004/01_x_to_text.txt", "a <red> one")
    rows = [
        index_row(4, 0, {"text": "a <big> & green one"}, "image", "step_000004/00_x_to_image.png"),
        index_row(
            4,
            1,
            {"image": {"file": "prompts/01_image.png"}},
            "text",
            "step_000004/01_x_to_text.txt",
        ),
    ]
    write(tmp_path, "samples/index.jsonl", rows)
    page = section(build_report(tmp_path).read_text(), "samples")
    first, second = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page)
    assert "text → image" in first[0] and "a &lt;big&gt; &amp; green one" in first[0]
    assert uri(made) in first[1]
    assert "image → text" in second[0] and uri(asked) in second[0]
    assert "a &lt;red&gt; one" in second[1]


def test_samples_of_a_changed_prompt_are_not_mixed(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, f"samples/step_{step}/00_x_to_text.txt", f"answer {step}")
    rows = [
        index_row(s, 0, {"text": words}, "text", f"step_{s}/00_x_to_text.txt")
        for s, words in ((1, "old"), (2, "new"))
    ]
    write(tmp_path, "samples/index.jsonl", rows)
    page = section(build_report(tmp_path).read_text(), "samples")
    assert "new" in page and "answer 2" in page and "answer 1" not in page


FINGERPRINT = "0123456789abcdef" * 4


def make_tokenizer(folder: Path, fingerprint: str = FINGERPRINT) -> bytes:
    write(folder, "model/tokenizer.yaml", f"kind: image_vq\nfingerprint: {fingerprint}\n")
    write(folder, "metrics.jsonl", [{"step": s, "loss/vq": 1 / s} for s in (1, 2)])
    original = write_png(folder / "samples/prompts/00_image.png", (9, 9, 99))
    write_png(folder / "samples/step_000002/00_image0.png", (9, 99, 9))
    prompt = {"image": {"file": "prompts/00_image.png"}}
    rows = [index_row(2, 0, prompt, "image", "step_000002/00_image0.png")]
    write(folder, "samples/index.jsonl", rows)
    return original


@pytest.mark.parametrize("claimed", [FINGERPRINT, "f" * 64], ids=["same", "other"])
def test_tokenizers_are_shown_from_the_run_that_made_them(tmp_path: Path, claimed: str) -> None:
    """As long as it is the very tokenizer: a stranger's config cannot name any folder."""
    original = make_tokenizer(tmp_path / "tok/image")
    run = tmp_path / "runs/mine"
    write(run, "config.yaml", "tokenizers: {image: tok/image}")
    ranges = [{"modality": "image", "vocab_size": 240, "fingerprint": claimed}]
    write(run, "model/vocabulary.json", {"ranges": ranges})
    page = section(build_report(run).read_text(), "tokenizers")
    if claimed != FINGERPRINT:
        assert page == ""
        return
    assert uri(original) in page and 'class="pair"' in page
    assert "At step 2 of its training" in page and "<dt>vocab size</dt><dd>240</dd>" in page
    assert "Training curves of this tokenizer (2 steps)" in page and "mm tokenizer eval" in page
    values = {"vocab_size": 0, "n_codebooks": 1, "continuous": True, "grid": [4, 4]}
    write(run, "model/vocabulary.json", {"ranges": [ranges[0] | values]})
    page = section(build_report(run).read_text(), "tokenizers")
    assert "mm tokenizer eval" not in page and "codes" in page  # it refuses values
    assert "<dt>vocab size" not in page and "<dt>grid</dt>" in page


def test_empty_rows_are_left_out_and_alerts_are_sentences(tmp_path: Path) -> None:
    for name, alerts in (("image", []), ("audio", ["codebook 0 uses 9% of its codes"])):
        write(tmp_path, f"tokenizers/{name}/eval.json", {"psnr_db": 21.0, "alerts": alerts})
    page = section(build_report(tmp_path).read_text(), "tokenizers")
    assert page.count('<p class="alert">') == 1 and "codebook 0 uses 9%" in page
    assert not re.search("alerts", page) and "<dd></dd>" not in page and "<td></td>" not in page


def test_times_add_up(tmp_path: Path) -> None:
    spent = {"start": 4.0, "step": 60.0, "data": 1.0, "save": 5.0, "evaluate": 30.0}
    write(tmp_path, "times.json", {"seconds": spent})
    results = {"figures": [], "seconds": {"recognition": 20.0, "bits": 15.0, "total": 294.0}}
    write(tmp_path, "results.json", results)
    write(tmp_path, "commands.json", [{"command": f"mm {i}", "seconds": 140.0} for i in (1, 2)])
    write(tmp_path, "metrics.jsonl", [{"step": 1, "perf/step_seconds": 1.0}])
    page = build_report(tmp_path).read_text()
    tables = re.findall(r"<tbody>(.*?)</tbody>", section(page, "time"))
    told = [[float(s) for s in re.findall(r"<td>([\d.]+) s</td>", table)] for table in tables[:2]]
    for *parts, together in told:
        assert sum(parts) == together
    assert told[0][-1] == 100.0 and told[1][-1] == 35.0 and "total" not in section(page, "time")
    assert "Added up: 4 min 40 s. By the clock: 4 min 54 s." in section(page, "commands")
    assert "<dt>time</dt><dd>100 s</dd>" in page


def test_the_header_says_size_tokens_epochs_and_machine(tmp_path: Path) -> None:
    source = {"source": "d/a", "split": "train", "samples": 100, "tokens": 5000, "bytes": 9000}
    source |= {
        "epochs": 12.34,
        "modalities": {"text": {"samples": 90, "tokens": 5000, "used": 0.72}},
    }
    source |= {"left_out": {"too_long": {"samples": 0.05, "tokens": 0.28}}}
    stages = [{"stage": 0, "steps": 4, "sources": [source]}]
    write(tmp_path, "start.json", {"parameters": {"model": 1_234_567}, "stages": stages})
    machine = {"device": "cuda:0", "world": 2, "precision": "bf16", "commit": "abcdef0123456789+"}
    write(tmp_path, "environment.json", machine)
    row = {"perf/tokens_per_second": 500.0, "perf/step_seconds": 2.0}
    write(tmp_path, "metrics.jsonl", [{"step": s, **row} for s in (1, 2, 3, 4)])
    page = build_report(tmp_path).read_text()
    header = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.split("</header>")[0]))
    expected = {"parameters": "1.23M", "steps": "4", "tokens seen": "4000", "epochs": "12.3"}
    expected |= {"device": "cuda:0", "processes": "2", "precision": "bf16", "commit": "abcdef0123+"}
    assert header == expected | {"time": "8.0 s"}
    data = section(page, "data")
    assert "<th>bytes on disk</th>" in data  # of the packed ids, not of the raw files
    rows = dict(re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", data))
    assert re.findall("<td>(.*?)</td>", rows["a (train)"]) == [
        "100",
        "5,000",
        "9,000",
        "12.3",
        "5 %",
        "–",
    ]
    assert re.findall("<td>(.*?)</td>", rows["a (train) · text"])[-1] == "72 %"
    assert "5 % of the samples and 28 % of the tokens are left out: too long." in data


def test_parameters_are_counted_in_the_saved_model(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    write(tmp_path, "config.yaml", "name: x")
    (tmp_path / "model").mkdir()
    weights = {"a": torch.zeros(3, 5), "b": torch.zeros(7)}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"x": "y"})
    assert read_run(tmp_path).parameters == 22


def test_events_are_told(tmp_path: Path) -> None:
    events = [{"step": 7, "event": "held-out: rising", "why": "was <best> at 3"}]
    write(tmp_path, "events.jsonl", events)
    write(tmp_path, "metrics.jsonl", [{"step": 1, "loss/total": 1.0}])
    page = section(build_report(tmp_path).read_text(), "curves")
    assert "step 7" in page and "was &lt;best&gt; at 3" in page


def test_steps_that_were_not_logged_count(tmp_path: Path) -> None:
    row = {"perf/step_seconds": 2.0, "data/wait_seconds": 0.5, "perf/tokens_per_second": 100.0}
    write(tmp_path, "metrics.jsonl", [{"step": s, **row} for s in (10, 20)])
    page = build_report(tmp_path).read_text()
    assert "<dt>time</dt><dd>40 s</dd>" in page and "<dt>tokens seen</dt><dd>4000</dd>" in page
    counts = {"tokens/seen": 3_210_000, "data/epoch": 1.5}
    write(tmp_path, "metrics.jsonl", [{"step": s, **row, **counts} for s in (10, 20)])
    page = build_report(tmp_path).read_text()
    assert "<dt>tokens seen</dt><dd>3.21M</dd>" in page and "<dt>epochs</dt><dd>1.5</dd>" in page
    assert "<th>waiting for data</th>" in page and "<td>10 s</td><td>25.0 %</td>" in page
