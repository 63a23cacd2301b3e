"""The command line: quick to start, clear when the input is wrong, and the same figures as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_calls import child, said

from mm.cli import main as cli
from mm.cli.common import overrides, plain
from mm.cli.eval import figure_rows
from mm.cli.generate import chosen_sampling
from mm.errors import UserError


def test_help_takes_under_a_second_and_no_torch() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); from mm.cli import main; code = "
        "main.run(['--help']); "
        "print('\\nSECONDS', time.perf_counter() - t, code, sorted({'torch', 'deepspeed', "
        "'wandb', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    best = 9.0
    for _ in range(3):  # the machine may be busy: processor time, and the best of three
        start = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
        )
        end = os.times()
        spent = end.children_user - start.children_user + end.children_system
        best = min(best, spent - start.children_system)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("0 []"), done.stdout[-200:]
    for command in cli.COMMANDS:
        assert f" {command} " in done.stdout
    assert best < 1.0, f"mm --help takes {best:.2f} s"


@pytest.mark.parametrize(
    "command",
    [
        *cli.COMMANDS,
        "tokenizer train",
        "tokenizer eval",
        "data pack",
        "data inspect",
        "data verify",
        "config show",
        "config schema",
        "bench mixers",
        "launch local",
        "launch ssh",
        "launch status",
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *command.split(), "--help")
    assert code == 0 and "Usage" in out
    if command not in ("tokenizer", "data", "config", "bench", "wandb", "launch"):
        assert "--json" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "configs/no_such"], "configs/no_such: no such file"),
        (["train", "x.yaml", "lonely"], "'lonely' is neither an option nor an override"),
        (
            ["report", "no/such/run"],
            "no/such/run: no such run folder; make one with: mm train CONFIG",
        ),
        (["eval", "no/such/run"], "no/such/run: no such run folder"),
        (["generate", "no/such/run", "--to", "text"], "no/such/run: no such run folder"),
        (["data", "pack", "no/such/folder", "--out", "x"], "no/such/folder"),
        (
            ["data", "pack", ".", "--out", "x", "--column", "image"],
            "--column image: write it as name=value",
        ),
        (
            ["data", "pack", ".", "--out", "../x", "--max-bad", "2"],
            "mm data pack: max_bad: Input should be less than or equal to 1",
        ),
        (["data", "inspect", "no/such"], "make it with: mm data pack SRC --out no/such"),
        (["tokenizer", "eval", "no/such", "--data", "."], "mm tokenizer train CONFIG"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = said(capsys, *words)
    assert code == 2
    assert message in err and err.startswith("mm: ")
    assert err.count("\n") == 1 and "Traceback" not in err


def test_a_mistake_in_a_child_process() -> None:
    done = child("config", "show", "quickstart/text", "tokenizer.vocabsize=3")
    assert done.returncode == 2
    assert "tokenizer: unknown key 'vocabsize'; did you mean 'vocab_size'?" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    done = child("config", "show", "quickstart/text", "tokenizer.vocabsize=3", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_an_interrupt_is_130_and_a_fault_of_the_program_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import mm.report.build as build

    def raising(error: BaseException):  # noqa: ANN202
        def fail(folder: Path) -> Path:
            raise error

        return fail

    monkeypatch.setattr(build, "build_report", raising(KeyboardInterrupt()))
    assert said(capsys, "report", str(tmp_path))[0] == 130
    monkeypatch.setattr(build, "build_report", raising(RuntimeError("a fault")))
    code, _, err = said(capsys, "report", str(tmp_path))
    assert (
        code == 1
        and "RuntimeError: a fault" in err
        and "mm --debug report" in err
        and "Traceback" not in err
    )
    with pytest.raises(RuntimeError, match="a fault"):
        cli.run(["report", str(tmp_path), "--debug"])
    monkeypatch.setattr(build, "build_report", raising(UserError("mend it")))
    assert said(capsys, "report", str(tmp_path))[0] == 2


def test_environment_stands_before_torch_and_the_user_wins() -> None:
    code = (
        "import os; from mm.cli import main; main.run(['--version']); print([os.environ.get(n) "
        "for n in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'TOKENIZERS_PARALLELISM', 'WDS_SECURE')])"
    )
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "WDS_SECURE")
    }
    run = lambda env: (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60
        ).stdout
    )
    assert run(clean).endswith("['PASSIVE', '0', 'false', '1']\n")
    assert run(clean | {"OMP_WAIT_POLICY": "ACTIVE"}).endswith("['ACTIVE', '0', 'false', '1']\n")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator it is about"
)
def test_freed_memory_is_kept_and_the_user_wins() -> None:
    """Pages that the system clears for the second of two equal allocations, of 2,000."""
    code = (
        "import resource, sys; from mm.launch.environment import keep_freed_memory as keep\n"
        "piece = lambda: len(bytearray(b'x') * 8_000_000)\nkeep(); piece()\n"
        "count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = count(); piece(); print(count() - before)"
    )
    names = ("MALLOC_", "GLIBC_TUNABLES")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    pages = lambda env: int(subprocess.check_output([sys.executable, "-c", code], env=env))
    assert pages(clean) < 100
    assert pages(clean | {"MALLOC_MMAP_THRESHOLD_": "131072"}) > 1000


def test_overrides_in_every_form() -> None:
    assert overrides(["a.b=c", "--engine.zero_stage", "2", "--d=[1, 2]", "--x.y", "--", "e="]) == [
        "a.b=c",
        "engine.zero_stage=2",
        "d=[1, 2]",
        "x.y=--",
        "e=",
    ]
    assert overrides(None) == []
    with pytest.raises(UserError, match="'--seed' has no value"):
        overrides(["--seed"])


def test_plain_is_what_json_can_hold() -> None:
    value = {
        1: np.float32(0.5),
        "a": (np.arange(2), Path("x")),
        "n": float("nan"),
        "b": True,
        "none": None,
    }
    assert json.loads(json.dumps(plain(value))) == {
        "1": 0.5,
        "a": [[0, 1], "x"],
        "n": None,
        "b": True,
        "none": None,
    }


def test_figures_take_their_chance_level_along() -> None:
    rows = figure_rows(
        {
            "image_to_text_accuracy": 0.9,
            "image_to_text_chance": 0.1,
            "image_to_text_n": 30,
            "image_to_text_confusion": [[1]],
            "text_to_image_accuracy": 0.8,
            "text_to_image_judge_on_real_accuracy": 0.99,
            "text_to_image_chance": 0.1,
            "text_bits_per_byte": 2.0,
            "text_bits_per_byte_chance": 8.0,
            "text_tokens": 500,
        }
    )
    assert rows == [
        {"name": "image_to_text_accuracy", "value": 0.9, "unit": "share", "chance": 0.1, "n": 30},
        {
            "name": "text_to_image_accuracy",
            "value": 0.8,
            "unit": "share",
            "chance": 0.1,
            "judge": 0.99,
        },
        {"name": "text_bits_per_byte", "value": 2.0, "unit": "bits/byte", "chance": 8.0},
    ]


# ---- generate ----


def test_generate_takes_what_eval_chose_for_the_direction(tmp_path: Path) -> None:
    chosen = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "cfg_scale": 2.0}
    assert chosen_sampling(tmp_path, ["text"], "image") == {}  # not evaluated yet
    (tmp_path / "results.json").write_text(json.dumps({"sampling": {"text_to_image": chosen}}))
    assert chosen_sampling(tmp_path, ["text"], "image") == chosen
    assert chosen_sampling(tmp_path, ["text", "image"], "image") == chosen  # image is continued
    assert chosen_sampling(tmp_path, ["audio"], "image") == {}
    (tmp_path / "results.json").write_text("half a fi")
    with pytest.raises(UserError, match="write it again: mm eval"):
        chosen_sampling(tmp_path, ["text"], "image")
