"""Configs of runs and overrides that cannot work: one line that names the key, exit code 2.

Ids begin with the numbers of the cases in the trial that found them; `test_hostile_cases.py` lists
where each is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_calls import child, said
from data_toys import token_shards
from trainer_toys import toys_registered  # noqa: F401

from mm.cli import main as cli


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards, and a run YAML that trains two steps on them."""
    root = tmp_path_factory.mktemp("runs")
    token_shards(root, 12)
    shards = root / "tokens"
    data = {"kind": "packed", "sources": [{"path": str(shards)}], "seq_len": 256, "batch_size": 2}
    optimizer = {"kind": "adamw", "lr": 1e-3}
    attention = {"heads": 2, "kv_heads": 1, "position": {"kind": "rope"}}
    stack = {"kind": "stack", "depth": 1, "mixers": {"attention": attention}}
    values = {
        "name": "tiny",
        "out": str(root / "runs"),
        "vocabulary": str(shards / "vocabulary.json"),
        "model": {"kind": "lm", "d_model": 32, "backbone": stack},
        "stages": [
            {
                "data": data,
                "objective": "next_token",
                "optimizer": optimizer,
                "budget": {"steps": 2},
                "eval_every": 0,
                "allow_left_out": 1.0,
            }
        ],
        "engine": {"precision": "fp32"},
        "tracking": {"sinks": []},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    return root


DATA, OPTIMIZER, STACK = "stages.0.data", "stages.0.optimizer", "model.backbone"
THETA = f"{STACK}.mixers.attention.position.theta"
# id -> (override, what the line says)
OVERRIDES: dict[str, tuple[str, str]] = {
    "397 d_model 10**9": ("model.d_model=1000000000", "d_model: Input should be less"),
    "398 d_model 10**30": (f"model.d_model={10**30}", "d_model: Input should be less"),
    "401 d_model 33": ("model.d_model=33", "not a multiple of heads"),
    "402 depth 10**6": (f"{STACK}.depth=1000000", "depth: "),
    "404 heads 10**9": (f"{STACK}.mixers.attention.heads=1000000000", "heads"),
    "406 hidden 10**12": (f"{STACK}.ffn={{kind: swiglu, hidden: {10**12}}}", "lower d_model"),
    "407 pattern 10**9": (f"{STACK}.pattern=1000000000*attention", "pattern"),
    "408 pattern nested": (f"{STACK}.pattern={'(' * 9999}attention{')' * 9999}", "nested deeper"),
    "410 seq_len 10**12": (f"{DATA}.seq_len={10**12}", "lower batch_size or seq_len"),
    "412 batch_size 10**9": (f"{DATA}.batch_size={10**9}", "lower batch_size or seq_len"),
    "413 block_samples 10**12": (f"{DATA}.block_samples={10**12}", "block_samples"),
    "414 max_documents 10**12": (f"{DATA}.max_documents={10**12}", "max_documents"),
    "417 weight inf": (f"{DATA}.sources.0.weight=.inf", "weight"),
    "420 lr inf": (f"{OPTIMIZER}.lr=.inf", "lr"),
    "424 betas 1.0": (f"{OPTIMIZER}.betas=[1.0, 0.9]", "betas"),
    "425 betas NaN": (f"{OPTIMIZER}.betas=[0.9, .nan]", "betas"),
    "428 steps 10**30": (f"stages.0.budget.steps={10**30}", "budget.steps"),
    "429 stages empty": ("stages=[]", "stages"),
    "430 seed -1": ("seed=-1", "seed"),
    "431 seed 2**70": (f"seed={2**70}", "seed"),
    "433 name climbs": ("name=../../ESCAPE_name", "no plain name"),
    "434 name absolute": ("name=/tmp/ESCAPE_name", "no plain name"),
    "435 name dot": ("name=.", "no plain name"),
    "436 name empty": ("name=''", "no plain name"),
    "437 name with NUL": ('name="a\\0b"', "no plain name"),
    "438 name with newline": ('name="a\\nb"', "no plain name"),
    "439 name of 5000": (f"name={'n' * 5000}", "too long"),
    "440 out a file": ("out=/etc/passwd", "/etc/passwd"),
    "441 out not writable": ("out=/proc/x", "/proc/x"),
    "442 imports missing": ("imports=[no_such_module_x]", "no module 'no_such_module_x'"),
    "443 imports climb": ("imports=[../x]", "imports"),
    "444 imports empty name": ("imports=['']", "imports"),
    "696 imports a number": ("imports=7", "imports"),
    "452 threads 10**6": ("engine.threads=1000000", "engine.threads"),
    "455 theta NaN": (f"{THETA}=.nan", "theta"),
    "456 theta 0": (f"{THETA}=0", "theta"),
    "theta below 0": (f"{THETA}=-1", "theta"),
    "theta huge": (f"{THETA}=1e300", "theta"),
    "461 eps NaN": (f"{STACK}.eps=.nan", "eps"),
    "eps 0": (f"{STACK}.eps=0", "eps"),
    "471 a Python object": ("model.d_model=!!python/object/apply:os.system ['true']", "not valid"),
    "472 an open list": ("name=[", "not valid YAML"),
    "473 an alias of nothing": ("name={a: *x}", "not valid YAML"),
    "no value": ("name", "neither an option nor an override"),
}


def refuse(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end with code 2 and one short line on stderr; that line."""
    code, _, err = said(capsys, *words)
    assert code == 2, err
    # Two where a value may be one of two kinds and is neither: a line a fault.
    assert err.count("mm: ") == 1 and err.count("\n") <= 2 and len(err) < 2000, err
    return err


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_value_that_cannot_work_is_refused_by_key(
    home: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = OVERRIDES[case]
    before = sorted(home.rglob("*"))
    assert says in refuse(capsys, "train", str(home / "run.yaml"), change)
    assert sorted(home.rglob("*")) == before, "half-written"


def test_486_a_vocabulary_smaller_than_the_ids_of_its_shards_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((home / "tokens/vocabulary.json").read_text())
    raw.pop("sha256")
    raw["ranges"][0]["vocab_size"] = 4
    digest = hashlib.sha256(json.dumps(raw, indent=1).encode()).hexdigest()
    (tmp_path / "v.json").write_text(json.dumps(raw | {"sha256": digest}))
    words = ("train", str(home / "run.yaml"), f"vocabulary={tmp_path / 'v.json'}")
    assert "v.json" in refuse(capsys, *words)


DEEP_FLOW, DEEP_BLOCK = "[" * 10_000, "".join(f"{' ' * i}a:\n" for i in range(3000))
FILES: dict[str, str] = {
    "354 378 nested 10k lists": f"a: {DEEP_FLOW}",
    "355 379 nested 3k maps": DEEP_BLOCK,
    "364 388 base a list": "base: [a, b]",
    "369 393 an int of 5000 digits": f"seed: {'9' * 5000}",
    "370 394 a date that is none": "name: 2024-99-99",
}


@pytest.mark.parametrize("command", [("config", "show"), ("train",)], ids=" ".join)
@pytest.mark.parametrize("case", FILES)
def test_a_yaml_that_is_none_is_refused(
    tmp_path: Path, case: str, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(FILES[case])
    assert "x.yaml" in refuse(capsys, *command, str(tmp_path / "x.yaml"))


def test_422_a_run_whose_last_step_is_not_finite_saves_no_model(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor the same command again, which finds all steps done."""
    words = ("train", str(home / "run.yaml"), "name=diverged", f"{OPTIMIZER}.lr=1e30")
    for _ in range(2):
        code, _, err = said(capsys, *words, "stages.0.schedule.warmup=0")
        last = err.strip().splitlines()[-1]
        assert code == 2 and "step 2, the last one, was not applied" in last, err
        assert "lower stages.0.optimizer.lr" in last
    assert not (home / "runs/diverged/model").exists()


PLUGIN = "open({!r}, 'w').close()\n"


def stranger(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run folder whose config imports a module that leaves a mark; the mark's path."""
    run, mark = folder / "stranger", folder / "ran"
    run.mkdir()
    values: dict[str, Any] = yaml.safe_load((home / "run.yaml").read_text())
    values |= {"imports": ["mm_test_plugin"], "out": str(folder), "name": "stranger"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    step = run / "checkpoints/step_000001"
    step.mkdir(parents=True)
    weights = {"w": {"shape": [1], "dtype": "F32", "rank": 0}}
    index = json.dumps({"world": 1, "files": {"model": weights}}).encode()
    files = {"model.safetensors": b"x", "index.json": index}
    for name, data in files.items():
        (step / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    (step / "COMPLETE").write_text(json.dumps(hashes))
    (folder / "mm_test_plugin.py").write_text(PLUGIN.format(str(mark)))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "mm_test_plugin", raising=False)
    return run, mark


@pytest.mark.parametrize(
    "command", [("generate", "-p", "x"), ("eval",), ("train",)], ids=lambda c: c[0]
)
def test_the_code_of_a_strangers_folder_runs_only_where_it_is_trusted(
    home: Path,
    tmp_path: Path,
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, mark = stranger(home, tmp_path, monkeypatch)
    line = refuse(capsys, command[0], str(run), *command[1:])
    assert "'mm_test_plugin'" in line and "--trust-code" in line and not mark.exists()
    if command[0] != "train":  # which would train to its end
        cli.run([command[0], str(run), *command[1:], "--trust-code"])  # its weights are none
        assert mark.exists()


@pytest.mark.parametrize("whole", [True, False], ids=["run", "tokenizer"])
def test_looking_at_a_config_runs_its_code_only_where_it_is_trusted(
    home: Path,
    tmp_path: Path,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, mark = stranger(home, tmp_path, monkeypatch)
    file = run / "config.yaml"
    if not whole:
        file.write_text("imports: [mm_test_plugin]\ntokenizer: {kind: bytes}\n")
    line = refuse(capsys, "config", "show", str(file))
    assert "'mm_test_plugin'" in line and "--trust-code" in line and not mark.exists()
    assert cli.run(["config", "show", str(file), "--trust-code"]) == 0
    assert mark.exists()


def test_modules_that_are_typed_are_trusted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mark = stranger(home, tmp_path, monkeypatch)
    asked = ["config", "show", str(run / "config.yaml"), "imports=[mm_test_plugin]"]
    assert cli.run(asked) == 0
    assert mark.exists()


def test_python_m_mm_takes_no_module_of_the_current_folder(tmp_path: Path) -> None:
    """`typer` is what it imports first."""
    (tmp_path / "typer.py").write_text(PLUGIN.format(str(tmp_path / "ran")))
    done = child("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("mm "), done.stderr
    assert not (tmp_path / "ran").exists()
