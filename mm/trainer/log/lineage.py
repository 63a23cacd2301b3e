"""What a run was made from and what it made: raw shards, tokenizers, token shards, runs, code.

``lineage.json`` of the run folder says it, and every tracker shows it. A thing's version is a hash
of what it says of itself (its manifest, its card), so the same data have one name in all runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.init_from import folders
from mm.reading import parse_json
from mm.run import Run
from mm.trainer.log.sinks.base import Artifact

FILE = "lineage.json"
DIFF = "code.diff"
MAX_DIFF = 2_000_000  # bytes of uncommitted changes; more are no edit but data
# What tells the versions of a folder apart, in the order in which they are looked for.
MARKS = ("manifest.json", "tokenizer.yaml", "hashes.json", "model.safetensors")


def inputs(run: Run) -> list[Artifact]:
    """What the run reads: data with what they were packed from, tokenizers, models it begins from.

    Raises nothing: a path that is not there has no version.
    """
    found: dict[tuple[str, str], Artifact] = {}
    for path in _paths([stage.to_dict().get("data") for stage in run.stages]):
        for one in _with_origins(run, path):
            found.setdefault((one.kind, one.name), one)
    for modality, path in run.tokenizers.items():
        one = _folder(run, "tokenizer", path, {"modality": modality})
        found.setdefault((one.kind, one.name), one)
    for begun in folders(run):
        one = _folder(run, "model", begun.path, {})
        found.setdefault((one.kind, one.name), one)
    return list(found.values())


def outputs(run: Run, step: int) -> list[Artifact]:
    """The saved model, with the run's checkpoints beside it as references."""
    model = run.folder / "model"
    if not model.is_dir():
        return []
    checkpoints = sorted(p for p in (run.folder / "checkpoints").glob("*") if p.is_dir())
    sends = "model" in run.tracking.upload
    facts = {"step": step, "version": version(model), "checkpoints": [p.name for p in checkpoints]}
    return [
        Artifact(
            _name("model", run.name),
            "model",
            files=[model] if sends else [],
            references=checkpoints if sends else [model, *checkpoints],
            metadata=facts,
        )
    ]


def code(folder: Path, commit: str | None) -> list[Artifact]:
    """The commit, and ``code.diff`` of what was changed since; [] outside a repository."""
    if commit is None:
        return []
    files = [folder / name for name in (DIFF, "config.yaml") if (folder / name).is_file()]
    return [Artifact(_name("code", commit[:12].rstrip("+")), "code", files, (), {"commit": commit})]


def write_diff(folder: Path, commit: str | None) -> None:
    """Write ``code.diff`` when mm's source tree has changes since ``commit`` (which ends in +)."""
    (folder / DIFF).unlink(missing_ok=True)
    if commit is None or not commit.endswith("+"):
        return
    try:
        done = subprocess.run(
            [
                "git",
                "-C",
                str(Path(__file__).parent),
                "diff",
                "HEAD",
                "--no-color",
                "--no-ext-diff",
            ],
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    if done.returncode == 0 and len(done.stdout) <= MAX_DIFF:
        (folder / DIFF).write_bytes(done.stdout)


def write(folder: Path, read: Sequence[Artifact], made: Sequence[Artifact]) -> dict[str, Any]:
    """Write ``lineage.json``; returns what it holds."""
    told = {"inputs": [_row(one) for one in read], "outputs": [_row(one) for one in made]}
    _save(folder, told)
    return told


def add_outputs(folder: Path, made: Sequence[Artifact]) -> None:
    """Set the outputs of ``lineage.json``."""
    _save(folder, _json(folder / FILE) | {"outputs": [_row(one) for one in made]})


def _save(folder: Path, told: Mapping[str, Any]) -> None:
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(told, indent=1))
    part.replace(folder / FILE)


def version(folder: Path) -> str | None:
    """Hash of what a folder says of itself, 12 letters; None where it says nothing."""
    for name in MARKS:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return None


def _row(one: Artifact) -> dict[str, Any]:
    where = [str(path) for path in (*one.files, *one.references)]
    return {"kind": one.kind, "name": one.name, "paths": where, **one.metadata}


def _folder(run: Run, kind: str, path: Path, facts: Mapping[str, Any]) -> Artifact:
    """A folder that the run reads; with what it was made from, where its own lineage says so."""
    inner = next((path / p for p in ("model", "tokenizer") if (path / p).is_dir()), path)
    before = _json(path / FILE) or _json(path.parent / FILE)
    made_from = [f"{row.get('kind')}:{row.get('name')}" for row in _rows(before)]
    facts = {"path": str(path), "version": version(inner), "made_from": made_from, **facts}
    kept = "data" in run.tracking.upload and kind == "tokens"
    return Artifact(
        _name(kind, path.parent.name if path.name == "model" else path.name),
        kind,
        files=[path] if kept else [],
        references=[] if kept or not path.is_dir() else [path],
        metadata=facts,
        is_input=True,
    )


def _with_origins(run: Run, path: Path) -> Iterator[Artifact]:
    """Packed data, and what they were packed from as far as manifests tell."""
    for _ in range(8):  # a chain, not a circle
        manifest = _json(path / "manifest.json")
        kind = "tokens" if manifest.get("kind") == "tokens" else "data"
        kept = {k: manifest[k] for k in ("source", "license", "modalities") if k in manifest}
        words = manifest.get("vocabulary")
        if isinstance(words, Mapping):
            kept["vocabulary"] = str(words.get("fingerprint"))[:12]
        splits = manifest.get("splits")
        if isinstance(splits, Mapping):
            kept["samples"] = {
                k: s.get("samples") for k, s in splits.items() if isinstance(s, Mapping)
            }
        source = manifest.get("source")
        # A manifest keeps the name of what was packed, not its place: it mostly lies beside.
        origin = path.parent / source if isinstance(source, str) and source else path
        goes_on = origin != path and (origin / "manifest.json").is_file()
        if goes_on:
            kept["made_from"] = [f"data:{_name('data', origin.name)}"]
        yield _folder(run, kind, path, kept)
        if not goes_on:
            return
        path = origin


def _paths(value: Any) -> Iterator[Path]:
    """Values of the keys ``path`` and ``shards`` anywhere in the config of a stream."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("path", "shards") and isinstance(inner, str):
                yield Path(inner)
            else:
                yield from _paths(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner)


def _name(kind: str, word: str) -> str:
    """A name that every tracker takes."""
    return f"{kind}-{''.join(c if c.isalnum() or c in '-_.' else '-' for c in word) or 'unnamed'}"


def _rows(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = lineage.get("inputs")
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _json(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
