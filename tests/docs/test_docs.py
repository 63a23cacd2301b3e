"""What README, CONTRIBUTING and docs/ name exists: paths, modules, commands, config keys, types.

And no text of the repository cites what is not in it.
"""

from __future__ import annotations

import ast
import glob
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from mm.cli import main as cli
from mm.cli.schema import resolve, run_schema
from mm.plug_point import Registry

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
SCHEMA: dict[str, Any] = {}
# Folders that the pages' own examples write.
EXAMPLES = re.compile(r"(data|tokenizers)/(mine|new|books)")
# Metrics of metrics.jsonl, which look like paths.
METRICS = re.compile(
    r"data/(source_shares|sample_shares|token_shares|wait_seconds|padding_share|rejects|epoch)"
)
# First parts of the keys of a Run (`name` and the like are words of prose, too).
KEYS = re.compile(r"(model|stages|engine|checkpoints|guard|tracking)[.\[]")
TEXTS = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.sh", "*.cpp", "Makefile", ".ci/run")


def fences(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.S | re.M)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def paths(text: str) -> set[str]:
    """Words that begin with a folder of the repository, in prose, tables and code spans."""
    tops = "mm|data|tokenizers|kernels|launch|configs|tests|docs|examples|benchmarks"
    found = re.findall(rf"(?<![\w/.<-])((?:{tops})/[\w./<>*-]*)", prose(text))
    found += re.findall(rf"(?<![\w/.<-])((?:{tops})/[\w./-]+\.(?:py|yaml|sh|md))", text)
    return {path.rstrip(".") for path in found if not (EXAMPLES.match(path) or METRICS.match(path))}


@pages
def test_every_path_exists(page: Path) -> None:
    for path in paths(page.read_text(encoding="utf-8")):
        pattern = re.sub(r"<\w+>", "*", path)
        assert glob.glob(str(ROOT / pattern)), f"{page.name}: no {path}"


@pages
def test_every_module_and_name_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [span for span in spans(text) if re.fullmatch(r"mm(\.\w+)+", span)]
    for name in (*named, *re.findall(r"^::: ([\w.]+)$", text, re.M)):
        assert resolves(name), f"{page.name}: no {name}"


def resolves(name: str) -> bool:
    """The longest importable part of a dotted name has the rest as attributes."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return name == "mm.plugins"  # the entry-point group
            found = getattr(found, part)
        return True
    return False


def commands(text: str) -> Iterator[str]:
    """Commands of mm in bash blocks, and in code spans as far as they are written out."""
    for line in "".join(fences(text, "bash")).splitlines():
        line = re.sub(r"\s+# .*$", "", line.strip())
        if found := re.search(r"(?:^|-m |PYTHONPATH=\. |do )(mm .*?)(?:; done)?$", line):
            yield found.group(1)
    yield from (span for span in spans(text) if re.match(r"mm \w", span))


@pages
def test_every_command_exists_with_its_options(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)[1:]
        node: Any = typer.main.get_command(cli.app)
        context = node.make_context("mm", list(words))
        while hasattr(node, "get_command"):
            name, node, words = node.resolve_command(context, words)
            assert node is not None, f"{page.name}: no command in '{command}'"
            context = node.make_context(name, [], parent=context, resilient_parsing=True)
            if not words:
                break
        given = getattr(node, "params", ())
        options = {o for p in given for o in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("--") and "." not in word and word != "--help":
                assert word.split("=")[0] in options, f"{page.name}: no {word} in '{command}'"


def under(node: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Schemas that stand below ``key`` in any form that ``node`` may take."""
    if "$ref" in node:
        yield from under(SCHEMA[node["$ref"].removeprefix("#/$defs/")], key)
    for word in ("anyOf", "oneOf"):
        for part in node.get(word, ()):
            yield from under(part, key)
    if key.isdigit() or key == "[]":
        yield from [node["items"]] if "items" in node else []
    elif key in node.get("properties", {}):
        yield node["properties"][key]
    elif isinstance(node.get("additionalProperties"), dict):
        yield node["additionalProperties"]


def keys(text: str) -> set[str]:
    found = [span for span in spans(text) if KEYS.match(span)]
    for command in commands(text):
        found += [w.lstrip("-") for w in shlex.split(command) if KEYS.match(w.lstrip("-"))]
    return {re.split(r"[=:\s,]", key)[0] for key in found}


@pages
def test_every_config_key_exists(page: Path) -> None:
    if not SCHEMA:
        SCHEMA.update(run_schema()["$defs"])
    for key in keys(page.read_text(encoding="utf-8")):
        found = [SCHEMA["Run"]]
        for part in re.sub(r"\[\]", ".[]", key).split("."):
            found = [below for node in found for below in under(node, part)]
            assert found, f"{page.name}: no key {key} (at '{part}')"


@pages
def test_code_of_a_page_is_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in fences(text, "python"):
        ast.parse(block)
    for block in fences(text, "yaml"):
        values = yaml.safe_load(block)
        parts = [values, *values.get("stages", ())] if isinstance(values, dict) else []
        for part in (p for p in parts if isinstance(p, dict)):
            for name in {"data", "objective", "optimizer"} & part.keys():
                Registry.every[name].parse(part[name])


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_the_head_of_a_config_has_a_command_that_resolves(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    found = [line for line in head if re.match(r"# (mm|bash) ", line)]
    assert found and all(len(line) <= 130 for line in head)
    for line in found:
        words = shlex.split(re.sub(r"\s{2,}\(.*$", "", line.removeprefix("# ")))
        for word in words:
            if word.startswith(("configs/", "benchmarks/")):
                assert (ROOT / word).is_file(), word
        if words[:2] == ["mm", "train"]:
            cat = lambda m: (ROOT / m.group(1)).read_text(encoding="utf-8")
            changes = [re.sub(r"\$\(cat ([\w./]+)\)", cat, word) for word in words[3:]]
            if len(changes) > 1 or (changes and "=" not in changes[0]):
                changes = [f"{k}={v}" for k, v in zip(changes[::2], changes[1::2], strict=True)]
            assert resolve(str(ROOT / words[2]), changes).model_dump()["stages"]


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    body = ARCHITECTURE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_type_is_in_its_file() -> None:
    found = rows("Types")
    assert len(found) > 15
    for name, file, fields in found:
        tree = ast.parse((ROOT / file.strip("`")).read_text(encoding="utf-8"))
        classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
        assert name.strip("`") in classes, name
        body = classes[name.strip("`")].body
        has = {
            n.target.id
            for n in body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        has |= {n.name for n in body if isinstance(n, ast.FunctionDef)}
        named = set(re.findall(r"`(\w+)`", fields))
        assert named and named <= has, (name, named - has)


@pages
def test_every_class_of_a_table_is_in_the_file_of_its_row(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) > 1 and re.fullmatch(r"`[A-Z]\w+`(, `[A-Z]\w+`)*", cells[0]):
            for file in re.findall(r"`([\w/]+\.py)`", line):
                text = (ROOT / file).read_text(encoding="utf-8")
                for name in re.findall(r"`(\w+)`", cells[0]):
                    assert re.search(rf"^class {name}\b", text, re.M), f"{name} is not in {file}"


def test_every_plug_point_is_in_the_table() -> None:
    import mm.registry

    tables = {n for n, v in vars(mm.registry).items() if isinstance(v, Registry)}
    found = rows("Plug points")
    assert sorted(row[0].strip("`") for row in found) == sorted(tables)
    sources = "\n".join(
        p.read_text(encoding="utf-8")
        for folder in ("mm", "data", "tokenizers", "launch")
        for p in (ROOT / folder).rglob("*.py")
    )
    for table, contract, _, _, hooks in found:
        (name,) = re.findall(r"`(\w+)`", contract)[:1] or re.findall(r"`(\w+)", contract)[:1]
        assert re.search(rf"^class {name}\b", sources, re.M), name
        for hook in re.findall(r"`(\w+)", hooks):
            assert re.search(rf"^    def {hook}\(", sources, re.M), (table, hook)


def test_every_law_has_its_tests() -> None:
    found = rows("Laws")
    assert len(found) >= 18 and len({row[0] for row in found}) == len(found)
    for name, _, held in found:
        assert paths(held), name


def test_the_glossary_is_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+?) \|", text, re.M)[1:]
    assert len(terms) > 50
    assert terms == sorted(terms, key=lambda t: re.sub(r"\W", "", t.split(",")[0].lower()))


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *TEXTS], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listed.returncode != 0:
        pytest.skip("no git repository here")
    files = [ROOT / name for name in listed.stdout.split()]
    return [f for f in files if f.is_file() and f.resolve() != Path(__file__).resolve()]


def test_nothing_cites_what_is_not_here() -> None:
    """Laws have names, papers have arXiv ids; numbers of lists that nobody has say nothing."""
    words = re.compile(
        r"\blaws?[ _]?\d|\bledger\b|\bDESIGN\b|§|\bcontract-notes\b|\bhouse-style\b|"
        r"\breview\.md\b|\bissue \d+\b|/work/|pypi\.org|pythonhosted|download\.pytorch\.org",
        re.IGNORECASE,
    )
    cited = []
    for file in tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            found = words.search(line)
            if found and "words = re.compile(" not in line and found.group() != "design":
                cited.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not cited, "\n".join(cited)
