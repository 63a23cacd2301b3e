"""The layout and the import tiers (docs/architecture.md), over whatever file is there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from source_tree import (
    FOLDERS,
    ROOT,
    TIERS,
    TREES,
    at_top,
    imports,
    module,
    real_files,
    tier,
    type_only,
)

LINKS = (*FOLDERS, "configs")
# Names that shadow a module of the standard library or of a dependency when a script beside them is
# run.
FORBIDDEN = {"triton.py", "torch.py", "types.py", "logging.py", "random.py"}

# Upward imports that are part of the design, by (importing module, imported module).
ALLOWED = {("objectives.objective", "model.layer")}


def test_the_four_folders_are_no_packages_of_their_own() -> None:
    for name in FOLDERS:
        assert not (ROOT / name / "__init__.py").exists(), (
            f"{name}/__init__.py would shadow Hugging Face's {name}"
        )
        assert list((ROOT / name).rglob("*.py")), (
            f"{name}/ holds no module: git keeps no empty folder"
        )


def test_links_are_relative_links() -> None:
    for name in LINKS:
        link = ROOT / "mm" / name
        assert link.is_symlink(), f"mm/{name} must be a symbolic link"
        assert os.readlink(link) == f"../{name}"


def test_import_tokenizers_finds_hugging_faces() -> None:
    """From the repository's root too: `python -m` and DeepSpeed's launcher put it on the path."""
    code = "import tokenizers, sys; print(tokenizers.__file__); import mm.tokenizers.load"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "-packages" in done.stdout
    found = importlib.util.find_spec("tokenizers")
    assert found is not None and found.origin and "-packages" in found.origin


def test_the_wheel_holds_mm_and_nothing_else_at_its_top(tmp_path: Path) -> None:
    import shutil

    # Built from a copy of what git would carry: setuptools leaves build/ behind, and reads what
    # lies about.
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv*",
        "runs",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        "wandb",
        ".*_cache",
        "shared",
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path / "wheel"),
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mm"}
    for file in TREES:
        inside = "mm/" + str(file.relative_to(ROOT)).removeprefix("mm/")
        assert inside in names, f"{inside} is missing from the wheel"
    for folder in ("configs", *FOLDERS, "mm"):
        for file in real_files(ROOT / folder):
            if file.suffix in {".yaml", ".cpp", ".css", ".js", ".html"}:
                inside = "mm/" + str(file.relative_to(ROOT)).removeprefix("mm/")
                assert inside in names, f"{inside} is missing from the wheel"


@pytest.mark.parametrize("file", sorted(TREES), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_imports_only_its_own_tier_and_below(file: Path) -> None:
    name = module(file)
    own, tree = tier(name), TREES[file]
    hints = type_only(tree)
    for node, imported in imports(tree):
        if imported.split(".")[0] != "mm" or node.lineno in hints:
            continue
        target = imported.removeprefix("mm").removeprefix(".")
        if target and target.split(".")[0] not in TIERS:
            continue  # `from mm import __version__`: a name, not a module
        if own == -1:
            assert tier(target) in (-1, 0), (
                f"{file}:{node.lineno}: launch may import tier 0 only, not mm.{target}"
            )
        elif own < 7:
            assert tier(target) <= own or (name, target) in ALLOWED, (
                f"{file}:{node.lineno}: tier {own} imports mm.{target} of tier {tier(target)}"
            )
        if target.startswith("model") and name.startswith("data"):
            raise AssertionError(
                f"{file}:{node.lineno}: data reaches the model through the registry only"
            )


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions and for types alone count: their two modules are one idea."""
    names = {module(file) for file in TREES if file.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for file, tree in TREES.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        own = module(file)  # a forked process finds its function by the name of its module
        graph[own] = ({name.removeprefix("mm.") for name in found} & names) - {own}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_tier_0_and_launch_and_the_cli_load_without_torch() -> None:
    heavy = {
        "torch",
        "deepspeed",
        "wandb",
        "torchvision",
        "torchaudio",
        "matplotlib",
        "sklearn",
        "webdataset",
        "safetensors",
    }
    for file, tree in TREES.items():
        if tier(module(file)) in (-1, 0) or module(file).startswith(("cli", "report")):
            loaded = {name.split(".")[0] for name in at_top(tree)}
            assert not loaded & heavy, f"{file}: imports {sorted(loaded & heavy)} when it is loaded"


@pytest.mark.parametrize("package", ["deepspeed", "wandb"])
def test_a_big_dependency_is_imported_in_one_module(package: str) -> None:
    users = {
        module(f)
        for f, tree in TREES.items()
        if any(n.split(".")[0] == package for _, n in imports(tree))
    }
    assert len(users) <= 1, f"{package} is imported in {sorted(users)}"
    assert all(user.startswith("trainer") for user in users)


def test_slow_or_fragile_packages_are_imported_inside_functions() -> None:
    for file, tree in TREES.items():
        for name in at_top(tree):
            lazy = {"torchvision", "torchaudio", "matplotlib", "sklearn", "deepspeed", "wandb"}
            assert name.split(".")[0] not in lazy, (
                f"{file}: {name} must be imported inside the function that needs it"
            )


def test_triton_is_imported_in_triton_files_only() -> None:
    for file, tree in TREES.items():
        if any(name.split(".")[0] == "triton" for _, name in imports(tree)):
            assert module(file).startswith("kernels.") and "triton" in file.name, (
                f"{file} imports triton"
            )


def test_no_file_shadows_a_library() -> None:
    bad = [
        str(f.relative_to(ROOT))
        for f in real_files(ROOT)
        if f.name in FORBIDDEN and ".venv" not in str(f)
    ]
    assert not bad


def test_reentrant_checkpointing_is_banned() -> None:
    """It loses gradients silently at ZeRO-0 and asserts at ZeRO-3.

    DeepSpeed's own is always reentrant.
    """
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            for word in node.keywords:
                reentrant = word.arg == "use_reentrant" and not (
                    isinstance(word.value, ast.Constant) and word.value.value is False
                )
                assert not reentrant, f"{file}:{node.lineno}: use_reentrant must be False"
            if (
                called.split(".")[-1] in {"checkpoint", "checkpoint_sequential"}
                and "checkpoint" in called
                and _is_torchs(tree, called)
            ):
                assert any(w.arg == "use_reentrant" for w in node.keywords), (
                    f"{file}:{node.lineno}: say use_reentrant=False"
                )
            assert not called.startswith("deepspeed.checkpointing"), f"{file}:{node.lineno}"
        assert all(
            not n.startswith("deepspeed.runtime.activation_checkpointing") for _, n in imports(tree)
        ), file


def _is_torchs(tree: ast.Module, called: str) -> bool:
    return called.startswith("torch.utils.checkpoint") or any(
        n == "torch.utils.checkpoint" for _, n in imports(tree)
    )


def test_no_print_no_stub_and_no_import_that_hides_its_absence() -> None:
    for file, tree in TREES.items():
        where = file.relative_to(ROOT)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and not module(file).startswith("cli")
            ):
                assert node.func.id != "print", f"{where}:{node.lineno}: print in library code"
            if isinstance(node, ast.ExceptHandler) and "ImportError" in ast.unparse(
                node.type or ast.Constant("")
            ):
                hides = any(
                    isinstance(s, ast.Assign)
                    and isinstance(s.value, ast.Constant)
                    and s.value.value is None
                    for s in node.body
                )
                assert not hides, (
                    f"{where}:{node.lineno}: `except ImportError: x = None` fails later and "
                    "elsewhere"
                )


def test_no_file_but_kernels_is_over_400_lines() -> None:
    roots = ("mm", *FOLDERS, "examples", "tests", "benchmarks")
    for file in (f for root in roots for f in real_files(ROOT / root)):
        if file.suffix in {".py", ".js", ".css"}:
            where = file.relative_to(ROOT)
            lines = file.read_text(encoding="utf-8").count("\n")
            most = 900 if where.parts[0] == "kernels" else 400
            assert lines <= most, f"{where}: {lines} lines; split it by subject"


def test_addresses_of_this_machine_and_registries_are_not_written() -> None:
    words = re.compile(r"/work/|/home/\w+/|pypi\.org|pythonhosted|download\.pytorch\.org")
    files = [
        *TREES,
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "configs").rglob("*.yaml"),
    ]
    for file in files:
        found = words.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{file.relative_to(ROOT)}: {found.group() if found else ''}"
