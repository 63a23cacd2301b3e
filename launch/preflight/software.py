"""Same code, same packages, same config, same data on every node."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.config import Config
from mm.errors import UserError
from mm.launch import source
from mm.launch.preflight.check import (
    ALL,
    FIX,
    OK,
    WARN,
    Asked,
    Row,
    Seen,
    common,
    copy_command,
)
from mm.run import Run

FOLDERS = ("mm", "tokenizers", "data", "kernels", "launch", "configs")
# What names the contents of a folder, the first that is there.
MARKS = ("manifest.json", "hashes.json", "config.json")


def read_code(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """Where the code is, its commit, and a hash of each file."""
    return {
        "root": str(source.PACKAGE.parent),
        "commit": source.commit(),
        "files": source.hash_files(),
    }


def judge_code(seen: Seen) -> Iterator[Row]:
    """The files that most nodes have are the right ones."""
    found = seen.of("code")
    texts = {i: json.dumps(v["files"], sort_keys=True) for i, v in found.items()}
    if not texts:
        return
    right = common(texts)
    good = next(i for i in texts if texts[i] == right)
    mine = found[good]
    for i, value in found.items():
        if texts[i] == right:
            continue
        names = set(mine["files"].items()) ^ set(value["files"].items())
        differ = sorted({name for name, _ in names})
        said = f"{len(differ)} files differ from {seen.hosts[good].name}'s: {_few(differ)}"
        theirs, ours = value["commit"], mine["commit"]
        if theirs and ours and theirs.rstrip("+") != ours.rstrip("+"):
            said = f"commit {theirs[:10]}, others {ours[:10]}; {said}"
        clean = theirs and ours and not theirs.endswith("+") and not ours.endswith("+")
        if clean and theirs != ours:
            root = shlex.quote(value["root"])
            fetch = f"git -C {root} checkout -q {ours}"
            mend = seen.hosts[i].on(f"{fetch} || (git -C {root} fetch -q && {fetch})")
        else:
            mend = copy_command(seen.hosts[good], seen.hosts[i], mine["root"], FOLDERS)
        yield Row("code", seen.hosts[i].name, FIX, said, mend)
    if len(set(texts.values())) == 1:
        name = (mine["commit"] or "no git commit")[:10] + "+" * str(mine["commit"]).endswith("+")
        yield Row("code", ALL, OK, f"{name}, {len(mine['files'])} files alike")


def read_packages(asked: Asked, told: Mapping[int, Any]) -> dict[str, str]:
    """Versions of Python and of what the package needs; `python` also where it is."""
    found = {"python": platform.python_version(), "executable": sys.executable}
    return found | package_versions()


def package_versions() -> dict[str, str]:
    """Versions of what pyproject.toml names, and of NVIDIA's libraries and Triton."""
    try:
        needs = metadata.requires("mm-stack") or []
    except metadata.PackageNotFoundError:
        needs = ["torch", "deepspeed", "numpy", "wandb", "webdataset", "pydantic"]
    names = {re.split(r"[^\w.-]", need, maxsplit=1)[0].lower() for need in needs if ";" not in need}
    found = {}
    for dist in metadata.distributions():
        name = (dist.metadata["Name"] or "").lower()
        if name in names or name.startswith("nvidia-") or name == "triton":
            found[name] = dist.version
    return dict(sorted(found.items()))


def judge_packages(seen: Seen) -> Iterator[Row]:
    """The versions that most nodes have are the right ones."""
    found = seen.of("packages")
    names = sorted({name for value in found.values() for name in value} - {"executable"})
    wrong: dict[int, list[tuple[str, str, str]]] = {}
    for name in names:
        have = {i: value.get(name, "missing") for i, value in found.items()}
        right = common(have)
        for i, version in have.items():
            if version != right:
                wrong.setdefault(i, []).append((name, version, right))
    for i, items in sorted(wrong.items()):
        said = _few([f"{name} {have}, others {right}" for name, have, right in items])
        pins = [f"{n}=={right}" for n, _, right in items if n != "python" and right != "missing"]
        python = shlex.quote(found[i]["executable"])
        mend = f"{python} -m pip install {shlex.join(pins)}" if pins else "install the same Python"
        yield Row("packages", seen.hosts[i].name, FIX, said, seen.hosts[i].on(mend))
    if found and not wrong:
        first = next(iter(found.values()))
        said = f"Python {first['python']}, torch {first.get('torch', 'missing')}"
        yield Row("packages", ALL, OK, f"{said}, {len(names) - 1} packages alike")


def read_config(asked: Asked, told: Mapping[int, Any]) -> dict[str, Any]:
    """Hashes of the resolved config and of what its data, vocabulary and tokenizers are."""
    if asked.config is None:
        return {}
    try:
        run = Run.load(asked.config, list(asked.overrides))
    except UserError as error:
        return {"wrong": str(error), "is_there": Path(asked.config).is_file()}
    text = json.dumps(run.to_dict(), sort_keys=True, default=str)
    parts = [stage.data for stage in run.stages]
    paths = [run.vocabulary, *run.tokenizers.values(), *(p for part in parts for p in _paths(part))]
    inputs = {str(p): _identify(p) for p in paths if p is not None}
    online = run.tracking.mode == "online" and any(s.kind == "wandb" for s in run.tracking.sinks)  # pyright: ignore[reportAttributeAccessIssue]
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "inputs": inputs, "online": online}


def judge_config(seen: Seen) -> Iterator[Row]:
    """The config must mean the same everywhere."""
    found = seen.of("config")
    good = {i: v["config"] for i, v in found.items() if "config" in v}
    for i, value in found.items():
        if "wrong" in value:
            mend = "correct the file, on every host"
            if good and not value["is_there"]:
                mend = "copy it there; the command of `data` copies folders"
            yield Row("config", seen.hosts[i].name, FIX, value["wrong"], mend)
    if good and len(set(good.values())) > 1:
        right = common(good)
        for i, value in good.items():
            if value != right:
                said = f"means {value[:10]}, others {right[:10]}: a file or a `base:` of it differs"
                yield Row("config", seen.hosts[i].name, FIX, said, "copy the file there")
    elif good:
        yield Row("config", ALL, OK, next(iter(good.values()))[:10])


def judge_data(seen: Seen) -> Iterator[Row]:
    """Every folder that the config names holds the same on all nodes."""
    found = {i: v["inputs"] for i, v in seen.of("config").items() if "inputs" in v}
    paths = sorted({path for value in found.values() for path in value})
    bad = False
    for path in paths:
        have = {i: value[path] for i, value in found.items() if path in value}
        right = common({i: v for i, v in have.items() if v != "missing"} or have)
        if right == "missing":
            bad = True
            yield Row("data", ALL, FIX, f"{path}: on no host", f"mm data pack SRC --out {path}")
            continue
        good = next(i for i in have if have[i] == right)
        for i, value in have.items():
            if value == right:
                continue
            bad = True
            what = "missing" if value == "missing" else f"{value[:10]}, others {right[:10]}"
            is_file = right.startswith("file ")
            folder = str(Path(path).parent) if is_file else path
            names = (Path(path).name,) if is_file else (".",)
            mend = copy_command(seen.hosts[good], seen.hosts[i], folder, names)
            yield Row("data", seen.hosts[i].name, FIX, f"{path}: {what}", mend)
    if found and not bad:
        known = sum(v != "no mark" for v in next(iter(found.values())).values())
        light = OK if known == len(paths) else WARN
        yield Row("data", ALL, light, f"{known} of {len(paths)} inputs have a hash, all alike")


def _paths(value: Any) -> Iterator[Path]:
    """Local paths anywhere in a config."""
    if isinstance(value, Config):
        for name in type(value).model_fields:
            yield from _paths(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, Path):
        yield value


def _identify(path: Path) -> str:
    """What a file or folder holds, in a word: the hash of what names its contents."""
    if path.is_file():
        return f"file {hashlib.sha256(path.read_bytes()).hexdigest()}"
    if not path.is_dir():
        return "missing"
    mark = next((path / name for name in MARKS if (path / name).is_file()), None)
    return hashlib.sha256(mark.read_bytes()).hexdigest() if mark is not None else "no mark"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
