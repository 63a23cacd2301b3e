"""The examples of CONTRIBUTING: the commands in their docstrings resolve, the laws run over them.

Each runs in a process of its own: an example that registers itself here would join the other tests.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BUILD = "tests/test_contract_build.py"
LAYER = ["tests/test_contract.py", "tests/test_contract_state.py", BUILD]
PAIRS = "tests/composition/test_composition_pairs.py"
LAWS = {  # example -> (files of laws, what chooses it, tests that must have run)
    "mixer_ema": ([*LAYER, PAIRS], "mixer:ema or (composition and ema)", 35),
    "ffn_relu2": (LAYER, "ffn:relu2", 30),
    "adapter_mlp": ([BUILD, PAIRS], "mlp", 6),
    "tokenizer_mu_law": (["tests/tokenizers/test_contract_tokenizers.py"], "mu_law", 10),
    "objective_truncated": (["tests/trainer/test_contract_training.py"], "truncated_next_token", 1),
}


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_example_is_in_contributing_and_under_the_laws() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {file.stem for file in EXAMPLES} == set(LAWS)
    assert {Path(found).stem for found in re.findall(r"\(examples/(\w+\.py)\)", text)} == set(LAWS)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_the_layer_of_an_example_is_short(file: Path) -> None:
    """What is not config, imports and docstrings: the cost of an idea on this contract."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (layer, *_) = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    assert layer.end_lineno is not None
    documented = sum(
        node.body[0].end_lineno - node.body[0].lineno + 1  # type: ignore[operator]
        for node in ast.walk(layer)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    )
    lines = file.read_text(encoding="utf-8").splitlines()[layer.lineno - 1 : layer.end_lineno]
    assert sum(bool(line.strip()) for line in lines) - documented <= 30


@pytest.mark.slow
def test_the_commands_of_the_examples_resolve() -> None:
    """`mm config show` with the config and overrides of every docstring, in one process."""
    asked, kinds = [], []
    for file in EXAMPLES:
        text = file.read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(text)) or ""
        (command,) = re.findall(r"^    (mm (?:train|tokenizer train) .*(?:\n {8}.*)*)", doc, re.M)
        words = shlex.split(command.replace("\\\n", " "))
        config = next(word for word in words if word.startswith("configs/"))
        asked.append(["config", "show", config, *(word for word in words if "=" in word)])
        kinds += re.findall(r'kind: Literal\["(\w+)"\]', text)
    code = "import json, sys; from mm.cli.main import run; sys.exit(sum(map(run, json.loads("
    done = run("-c", f"{code}sys.argv[1]))))", json.dumps(asked))
    assert len(kinds) == len(EXAMPLES)
    assert all(re.search(rf"\b{kind}\b", done) for kind in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_the_laws_hold_for_an_example(name: str) -> None:
    files, chosen, least = LAWS[name]
    plugins = ["-p", f"examples.{name}", "-p", "no:cacheprovider", "-p", "no:xdist"]
    said = run("-m", "pytest", *files, *plugins, "-k", chosen)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None and int(passed.group(1)) >= least, said[-500:]
