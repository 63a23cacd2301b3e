"""`build_report` on a run folder with real pictures and sounds, in a real browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm.errors import UserError
from mm.report import build_report
from mm.report.read import read_run

SECTIONS = {
    "figures",
    "samples",
    "curves",
    "tokenizers",
    "time",
    "commands",
    "environment",
    "config",
}


def write_png(file: Path, value: int) -> None:
    y, x = np.mgrid[:32, :32]
    Image.fromarray(((x * value + y * 5) % 256).astype(np.uint8)).convert("RGB").save(file)


def write_wav(file: Path, hz: float) -> None:
    t = np.arange(8000) / 16000
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(
            (0.4 * np.sin(2 * math.pi * (hz + 800 * t) * t) * 32767).astype("<i2").tobytes()
        )


def write_metrics(folder: Path, rows: int, names: tuple[str, ...], **extra: float) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, rows + 1):
        row = {
            "step": step,
            "optim/lr": 3e-3 * min(1, step / 50),
            "optim/grad_norm": 1 + rng.random(),
        }
        row |= {
            "perf/tokens_per_second": 12000 + 800 * rng.random(),
            "perf/step_seconds": 0.08,
            "data/wait_seconds": 0.001,
        }
        row |= {
            f"loss/{n}": 1 + i + 4 * math.exp(-step / 90) + 0.1 * rng.random()
            for i, n in enumerate(names)
        }
        row |= {f"tokens/{n}_share": 1 / len(names) for n in names}
        row["loss/total"] = sum(row[f"loss/{n}"] for n in names)
        lines.append(
            json.dumps(row | extra | ({"codebook/usage": min(1, step / 80)} if extra else {}))
        )
    lines.append('{"step": 999, "loss/to')  # killed in the middle of a write
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    write_metrics(folder, 400, ("text", "image", "audio"))
    (folder / "config.yaml").write_text(
        "name: demo\nseed: 0\nmodel:\n  kind: lm\n  d_model: 128\n  backbone:\n    pattern: "
        "4*attention\n# <b>not a tag</b>\n"
    )
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11.7", "torch": "2.x", "cpu": {"cores": 2}, "git": None})
    )
    (folder / "commands.json").write_text(
        json.dumps(
            [
                {"command": "mm data pack src --out data", "seconds": 3.2},
                {"command": 'mm generate runs/demo --prompt "a <7>" --to image', "seconds": 1},
            ]
        )
    )
    (folder / "results.json").write_text(
        json.dumps(
            {
                "figures": [
                    {
                        "name": "image_to_text_accuracy",
                        "value": 0.98,
                        "bar": 0.97,
                        "chance": 0.1,
                        "judge": None,
                        "n": 300,
                        "unit": "share",
                    },
                    {
                        "name": "text_to_image_accuracy",
                        "value": 0.91,
                        "bar": 0.95,
                        "chance": 0.1,
                        "judge": 0.99,
                        "n": 300,
                        "unit": "share",
                    },
                    {
                        "name": "mel_distance_ratio",
                        "value": 0.4,
                        "bar": 0.5,
                        "chance": 1.0,
                        "unit": "ratio",
                    },
                    {"name": "image_psnr", "value": 24.6, "bar": 24, "unit": "dB"},
                ],
                "sampling": {"image": {"temperature": 0.7, "cfg_scale": 2.0}},
                "seconds": {"data": 11.0, "backbone": 200.0},
            }
        )
    )
    for step in (100, 200, 300, 400):
        place = folder / "samples" / f"step_{step:06d}"
        place.mkdir(parents=True)
        write_png(place / "00_digit_seven.png", step // 50)
        write_wav(place / "01_spoken_three.wav", step)
        (place / "02_caption.txt").write_text(f"the digit seven <|image|> & step {step}")
    for modality in ("image", "audio"):
        child = folder / "tokenizers" / modality
        write_metrics(child, 120, ("total_" + modality,), **{"codebook/perplexity": 50.0})
        (child / "eval.json").write_text(
            json.dumps({"psnr_db": 24.6, "usage": 0.97, "histogram": list(range(64))})
        )
        (child / "eval").mkdir()
        for i in range(3):
            for j, role in enumerate(("original", "reconstruction")):
                if modality == "image":
                    write_png(child / "eval" / f"{i:02d}_{role}.png", 3 + i + j)
                else:
                    write_wav(child / "eval" / f"{i:02d}_{role}.wav", 300 + 100 * i + 30 * j)
    return folder


def browse(
    chromium: str, page: Path, profile: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=4000",
        "--enable-logging=stderr",
        "--v=0",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    )
    return subprocess.run(
        [chromium, *flags, *more, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const bad = [...document.images].filter((i) => !(i.complete && i.naturalWidth > 0)).length;
  const resources = performance.getEntriesByType("resource").map((r) => r.name);
  const fetched = resources.filter((n) => !n.startsWith("data:"));
  const sounds = [...document.querySelectorAll("audio")];
  const out = {images: document.images.length, bad, fetched, sounds: sounds.length,
    playable: sounds.filter((a) => a.readyState >= 1 && a.duration > 0.4).length,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth};
  const pre = document.createElement("pre");
  pre.id = "probe"; pre.textContent = JSON.stringify(out);
  document.body.append(pre); }, 1500));</script>"""


def test_the_page_works_in_a_browser(run_folder: Path, chromium: str, tmp_path: Path) -> None:
    page = build_report(run_folder)
    text = page.read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    done = browse(chromium, probed, tmp_path / "profile", "--dump-dom", "--window-size=1280,900")
    dom = done.stdout
    found = set(re.findall(r'<section id="(\w+)"', dom))
    assert found == SECTIONS | {"notes"}  # the half-written metrics line is named
    probe = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom).group(1))  # type: ignore[union-attr]
    # 4 sample pictures, 6 image reconstructions, and a spectrogram over each of the 4 + 6 sounds
    assert probe["images"] == 20 and probe["bad"] == 0
    assert probe["sounds"] == probe["playable"] == 10
    assert probe["fetched"] == []
    assert not probe["wide"], "the page scrolls sideways"
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    assert (
        "the digit seven &lt;|image|&gt; &amp; step 400" in dom
    )  # text of a sample never becomes markup
    assert dom.count('<figure class="chart"') >= 7


def test_the_page_holds_figures_beside_bar_and_chance(run_folder: Path) -> None:
    text = build_report(run_folder).read_text()
    cards = dict(
        re.findall(
            r'<div class="card"><h3>(.*?)</h3>(.*?)</div>(?=<div class="card">|</div>)', text
        )
    )
    assert (
        "98.0 %" in cards["Image → text accuracy"] and "bar met" in cards["Image → text accuracy"]
    )
    assert "bar ≥ 97.0 % · chance 10.0 % · n = 300" in cards["Image → text accuracy"]
    assert "below the bar" in cards["Text → image accuracy"]
    assert "judge on real data 99.0 %" in cards["Text → image accuracy"]
    assert (
        "bar ≤ 0.5 ratio" in cards["Mel distance ratio"]
        and "bar met" in cards["Mel distance ratio"]
    )


def test_the_page_refers_to_nothing_outside(run_folder: Path) -> None:
    text = build_report(run_folder).read_text()
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address.startswith(("data:", "#")), address
    assert (
        "url(" not in text
        and "@import" not in text
        and "http://" not in text
        and "https://" not in text
    )


def test_curves_end_at_the_last_value_and_a_resumed_step_counts_once(tmp_path: Path) -> None:
    rows = [{"step": s, "loss/text": 10 - s} for s in range(1, 6)] + [
        {"step": s, "loss/text": 20 - s} for s in range(4, 8)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    series = read_run(tmp_path).metrics["loss/text"]
    assert series.steps == [1, 2, 3, 4, 5, 6, 7]
    assert series.values == [9, 8, 7, 16, 15, 14, 13]
    assert "text <b>13</b>" in build_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "drop",
    [
        "metrics.jsonl",
        "config.yaml",
        "environment.json",
        "commands.json",
        "results.json",
        "samples",
        "tokenizers",
    ],
)
def test_a_partial_run_has_a_report(run_folder: Path, tmp_path: Path, drop: str) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("report"))
    gone = copy / drop
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    text = build_report(copy).read_text()
    assert text.endswith("</html>") and len(re.findall('<section id="', text)) >= 6


def test_damaged_files_are_named_and_cost_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("report"))
    (copy / "samples" / "step_000400" / "00_digit_seven.png").write_bytes(b"not a picture")
    (copy / "samples" / "step_000400" / "01_spoken_three.wav").write_bytes(b"RIFFxxxx")
    (copy / "results.json").write_text("{")
    (copy / "config.yaml").write_text("a: [")
    text = build_report(copy).read_text()
    assert (
        "00_digit_seven.png: cannot be shown" in text
        and "01_spoken_three.wav: cannot be shown" in text
    )
    assert "results.json is not valid JSON" in text and "config.yaml could not be read" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        build_report(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        build_report(tmp_path / "absent")
