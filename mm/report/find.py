"""What files of a run folder belong to: samples to prompts, tokenizers to their trainings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.data.modalities.base import table
from mm.reading import parse_json, parse_yaml
from mm.report.folder import Folder, Sampled

MAX_HEADER_BYTES = 50_000_000
INDEX = ".index.json"  # what the name of the index of several files ends in
STEP = re.compile(r"step_(\d{1,15})", re.ASCII)


def samples(inside: Folder) -> list[Sampled]:
    """Samples by prompt, in the order of the prompts.

    By ``samples/index.jsonl``; those of a run without one by the names of their files.
    """
    found: dict[str, Sampled] = {}
    for row in inside.lines("samples/index.jsonl"):
        prompt, to, step = row.get("prompt"), row.get("to"), row.get("step")
        named = [row.get("file")] if isinstance(row.get("file"), str) else []
        files = [p for name in named if (p := inside.file(f"samples/{name}")) is not None]
        if not (isinstance(prompt, Mapping) and isinstance(step, int) and files):
            continue
        shown: dict[str, str | Path] = {}
        for modality, value in prompt.items():
            is_file = isinstance(value, Mapping)
            path = inside.file(f"samples/{value.get('file')}") if is_file else None
            shown[str(modality)] = path if path is not None else str(value)
        key = str(row.get("number", files[0].stem))
        name = files[0].name.split(".")[0]
        one = found.setdefault(key, Sampled(name, str(to), shown, {}))
        if one.prompt != shown or one.to != str(to):  # the callback was changed: the newer holds
            one = found[key] = Sampled(name, str(to), shown, {})
        one.files[step] = files
    return list(found.values()) or _by_name(inside)


def _by_name(inside: Folder) -> list[Sampled]:
    """Files ``samples/step_N/NAME.*``: a row a name; an original stands with its reconstruction."""
    found: dict[str, Sampled] = {}
    for folder in sorted((inside.path / "samples").glob("step_*")):
        step = STEP.fullmatch(folder.name)
        if step is None or not folder.is_dir():
            continue
        for file in inside.media(f"samples/{folder.name}", texts=True):
            name = file.name.split(".")[0]
            one = found.setdefault(name, Sampled(name, "", None, {}))
            one.files.setdefault(int(step[1]), []).append(file)
    return [found[name] for name in sorted(found)]


def tokenizer_runs(
    inside: Folder, config: Mapping[str, Any], vocabulary: Mapping[str, Any]
) -> dict[str, Path]:
    """Modality -> the folder that its tokenizer was trained in.

    One below the run's own ``tokenizers/``; else the one that the config names, as long as it is
    the very tokenizer of the run's vocabulary; else the copy in the saved model.
    """
    found: dict[str, Path] = {}
    own = inside.path / "tokenizers"
    for child in sorted(own.iterdir()) if own.is_dir() and inside.holds(own) else ():
        if child.is_dir() and inside.holds(child) and any(child.iterdir()):
            found[child.name] = child
    named = config.get("tokenizers")
    ranges = vocabulary.get("ranges")
    prints = {
        str(r.get("modality")): r.get("fingerprint")
        for r in (ranges if isinstance(ranges, list) else ())
        if isinstance(r, Mapping)
    }
    for modality, path in named.items() if isinstance(named, Mapping) else ():
        if modality in found or modality not in table().raw or not isinstance(path, str):
            continue
        copy = inside.path / "model" / "tokenizers" / modality
        # A path is of the folder that the run was started in, which holds the run folder.
        places = [Path(path), *(parent / path for parent in inside.path.resolve().parents)]
        trained = (p for p in places if _fingerprint(p) == prints.get(modality) is not None)
        where = next(trained, copy if copy.is_dir() and inside.holds(copy) else None)
        if where is not None:
            found[modality] = where
    return found


def _fingerprint(folder: Path) -> str | None:
    """The fingerprint of the tokenizer in a folder or its ``model/``; None where there is none."""
    for card in (folder / "model" / "tokenizer.yaml", folder / "tokenizer.yaml"):
        try:
            if card.is_file() and card.stat().st_size < 100_000:
                text = card.read_text(encoding="utf-8", errors="replace")
                line = re.search(r"^fingerprint: (.+)$", text, re.MULTILINE)
                return str(parse_yaml(line[1])) if line else None
        except (OSError, ValueError):
            continue
    return None


def n_parameters(weights: Path | None) -> int | None:
    """Numbers in a folder's weights, from the headers of the files alone; None where it has none.

    Args:
        weights: the one file, or the index of several, which is looked for beside a file that is
            not there.
    """
    if weights is None:
        return None
    index = weights if weights.suffix == ".json" else weights.with_name(f"{weights.name}{INDEX}")
    files = [weights]
    try:
        if index == weights or not weights.is_file():
            named = parse_json(index.read_bytes())["weight_map"].values()
            files = [weights.with_name(name) for name in dict.fromkeys(named)]
        return sum(map(_numbers, files)) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _numbers(weights: Path) -> int:
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(size)) if size < MAX_HEADER_BYTES else {}
    return sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
