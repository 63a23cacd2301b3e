"""Pages that mkdocs makes from the code: Contributing, commands, and the configuration reference.

The configuration is the JSON Schema of a Run (`mm config schema`), and the commands are those of
the program, so that neither can say what is not so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mm.cli import main as cli
from mm.cli.schema import run_schema
from mm.plug_point import Registry

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "docs-source"  # `paths` of mkdocs.yml
SCHEMA = run_schema()["$defs"]
INTRO = """# Configuration

A run is one YAML: data, networks, stages, and how they run. Every key below has a type and a
default; an unknown key is refused with the known one that is nearest. `base: other.yaml` merges
over another file, and null removes a key of it. On the command line `a.b=c` or `--a.b c` changes a
key; places of a list go by number: `stages.0.budget.steps=10`.

A plug point takes a kind (`backbone: stack`) or its settings (`backbone: {kind: stack, depth: 4}`).
`mm config show FILE` prints a YAML with everything filled in; `mm config schema --out schema.json`
serves completion in an editor.

"""


def on_startup(command: str, dirty: bool) -> None:
    """Copy the sources to where griffe finds them, before it looks.

    It follows no symbolic links, which is what mm/data and its like are.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    no = shutil.ignore_patterns("__pycache__", "configs", "*.cpp", "*.h", "*.html", "*.css", "*.js")
    shutil.copytree(ROOT / "mm", SOURCE / "mm", ignore=no)
    for name in ("data", "kernels", "launch", "tokenizers"):
        (SOURCE / "mm" / name / "__init__.py").touch()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each registry under Configuration."""
    pages = [{name: f"configuration/{name}.md"} for name in Registry.every]
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Configuration" in entry:
            entry["Configuration"] = ["configuration/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {"contributing.md": contributing(), "configuration/index.md": run_page()}
    pages["commands.md"] = commands_page()
    pages |= {f"configuration/{name}.md": registry_page(name) for name in Registry.every}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Let a path that fills a cell of a table break after its slashes; say where sources are."""
    html = html.replace("build/docs-source/", "")
    path = re.compile(r"<td>((?:\w+/)+[\w.]+)</td>")
    return path.sub(lambda found: found.group().replace("/", "/<wbr>", found[1].count("/")), html)


def contributing() -> str:
    """CONTRIBUTING.md with links of the site; files of the repository become code."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\(docs/", r"[\1](", text)
    text = re.sub(r"\[([^\]]+)\]\((?!\w+\.md)[^)]+\)", r"`\1`", text)
    return f"---\nhide: [navigation]\n---\n\n{text}"


def commands_page() -> str:
    """Every command with its arguments and options, from the program itself."""
    root: Any = typer.main.get_command(cli.app)
    parts = [
        "# Commands\n\nEvery command that prints figures takes `--json FILE`; `--debug` shows the "
        "traceback of a mistake. Overrides of a YAML go by `a.b=c` or `--a.b c`.\n\n"
    ]
    for name in root.list_commands(None):
        _, command, _ = root.resolve_command(root.make_context("mm", [name]), [name])
        inner = getattr(command, "commands", None)
        for full, one in {f"{name} {k}": v for k, v in (inner or {}).items()}.items() or [
            (name, command)
        ]:
            parts += [f"## mm {full}\n\n", "\n\n".join((one.help or "").split("\n\n")), "\n\n"]
            parts += ["| | | default |\n|---|---|---|\n", *map(parameter, shown(one)), "\n"]
    return "".join(parts)


def shown(command: Any) -> list[Any]:
    """Parameters but those that typer adds for shells."""
    return [p for p in command.params if not str(p.name).endswith("_completion")]


def parameter(given: Any) -> str:
    """Row of an argument or option."""
    if given.param_type_name == "argument":
        name = given.metavar or given.name.upper()
    else:
        name = ", ".join(given.opts)
        name += "" if given.is_flag or not given.metavar else f" {given.metavar}"
    hidden = given.default in (None, False, ()) or callable(given.default)
    default = "required" if given.required else "" if hidden else code(str(given.default))
    said = plain(given.help or "").replace("|", "\\|")
    return f"| {code(name).replace('|', chr(92) + '|')} | {said} | {default} |\n"


def run_page() -> str:
    """Run, and the models that it is made of."""
    parts = [INTRO]
    for name in ["Run", *(name for name in SCHEMA if name.startswith("Run."))]:
        parts += [f"## {name.removeprefix('Run.')}\n\n", *section(SCHEMA[name])]
    return "".join(parts)


def registry_page(name: str) -> str:
    """Every kind of a plug point with its keys."""
    kinds = list(Registry.every[name])
    parts = [f"# {name}\n\n", f"Kinds: {', '.join(f'[{k}](#{slug(k)})' for k in kinds)}.\n\n"]
    for kind in kinds:
        parts += [f"## {kind}\n\n", *section(SCHEMA[f"{name}.{kind}"]), *example(name, kind)]
        for nested in (key for key in SCHEMA if key.startswith(f"{name}.{kind}.")):
            parts += [f"### {nested.removeprefix(f'{name}.')}\n\n", *section(SCHEMA[nested])]
    return "".join(parts)


# Where a kind stands in a YAML: the keys above it. The others are inside a model.
PLACES = {
    "task": ("stages", 0, "tasks", 0),
    "callback": ("callbacks", 0),
    "transform": ("stages", 0, "objective", "transform"),
    "data": ("stages", 0, "data"),
    "optimizer": ("stages", 0, "optimizer"),
    "tokenizer": ("tokenizer",),
}


def example(name: str, kind: str) -> Iterator[str]:
    """The smallest useful config of a kind, where it stands in a YAML."""
    if name in PLACES:
        smallest = Registry.every[name].get(kind).smallest()
        value: Any = {"kind": kind} | smallest.model_dump(mode="json", exclude_unset=True)
        for key in reversed(PLACES[name]):
            value = [value] if isinstance(key, int) else {key: value}
        text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None)
        yield f"```yaml\n{text}```\n\n"


def slug(title: str) -> str:
    """Anchor that the table of contents gives a heading."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


def section(body: Mapping[str, Any]) -> Iterator[str]:
    """Docstring and table of keys of one model."""
    if "description" in body:
        yield plain(body["description"]) + "\n\n"
    rows = [row(key, of, body) for key, of in body.get("properties", {}).items() if key != "kind"]
    if rows:
        yield "| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
    else:
        yield "No keys.\n\n"


def row(key: str, of: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    needed = key in body.get("required", ())
    default = "" if "default" not in of else code(json.dumps(of["default"], ensure_ascii=False))
    cells = [code(key), type_of(of), "required" if needed else default, limits(of)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def type_of(of: Mapping[str, Any]) -> str:
    """A type in words, with links to the plug points and models that it names."""
    if "$ref" in of:
        return link(of["$ref"].removeprefix("#/$defs/"))
    if "enum" in of:
        return ", ".join(code(str(value)) for value in of["enum"])
    if "const" in of:
        return code(str(of["const"]))
    for word in ("anyOf", "oneOf"):
        if word in of:
            return " or ".join(dict.fromkeys(type_of(part) for part in of[word]))
    kind = of.get("type")
    if kind == "array":
        items = of.get("prefixItems")
        inside = " and ".join(map(type_of, items)) if items else type_of(of.get("items", {}))
        return f"list of {inside}"
    if kind == "object" and isinstance(of.get("additionalProperties"), Mapping):
        return f"mapping to {type_of(of['additionalProperties'])}"
    words = {"object": "mapping", "null": "null", "string": "text", "number": "number"}
    return words.get(str(kind), str(kind or "anything"))


def link(name: str) -> str:
    """Link to the page of a plug point or the heading of a model."""
    if name in Registry.every:
        return f"[{name}]({name}.md)"
    owner, _, rest = name.partition(".")
    if owner == "Run":
        return f"[{rest or owner}](index.md#{slug(rest or owner)})"
    return f"[{rest}]({owner}.md#{slug(rest)})"


def limits(of: Mapping[str, Any]) -> str:
    """Description and bounds."""
    parts = [plain(of["description"])] if "description" in of else []
    inner = [of, *of.get("anyOf", ())]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {part[key]}" for part in inner for key, sign in signs.items() if key in part]
    return "; ".join([*parts, *bounds])


def plain(text: str) -> str:
    """A docstring as one paragraph of Markdown: its double backquotes are code, its angles text."""
    text = " ".join(text.split()).replace("``", "`")
    return text.replace("<", "&lt;") if "`" not in text else text


def code(text: str) -> str:
    return f"`{text}`" if len(text) <= 60 else f"`{text[:57]}...`"
