"""Doors that files of strangers come through: a small valid folder, its damage, and who reads it.

A door may take a damaged file or refuse it with `UserError` or `BadSample`, in one line. Nothing
else may come out, and what packed data `verify` refuses to vouch for, no door may call whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import yaml
from damage import (
    byte_edits,
    edit_bytes,
    edit_tree,
    tree_edits,
    tree_or_byte_edits,
    word_of,
)

from mm.config import read
from mm.data.chat.conversation import Media, read_row
from mm.data.modalities.base import BadSample, get_modality, table
from mm.data.pack.job import pack
from mm.data.shards.manifest import read_manifest
from mm.data.shards.reader import ShardSet
from mm.data.shards.verify import verify
from mm.data.sources.chat import ChatConfig
from mm.data.sources.chat import reader as media_reader
from mm.errors import UserError
from mm.vocabulary import Vocabulary

REFUSALS = (UserError, BadSample)
ITEMS = 2  # samples that a door looks at
PACKED = 3  # samples of a seed


class Door(NamedTuple):
    """``seed`` fills a folder once; ``damage`` changes files of a copy; ``enter`` reads it.

    ``draw`` makes the edits that ``damage`` applies.
    """

    seed: Callable[[Path], Any]
    draw: Callable[[Random], Any]
    damage: Callable[[Path, Any], Any]
    enter: Callable[[Path], Any]


def resign_manifest(root: Path, split: str = "train") -> None:
    """Write the index's own hash and size into the manifest, as its editor would."""
    path, manifest = root / split / "index.npz", root / "manifest.json"
    found = json.loads(manifest.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found["splits"][split]["index"] |= {"sha256": digest, "bytes": path.stat().st_size}
    manifest.write_text(json.dumps(found))


# ---- packed data ----


def shards_seed(folder: Path) -> None:
    from data_toys import token_shards

    token_shards(folder, PACKED)
    for name in ("raw", "shards"):
        shutil.rmtree(folder / name)


def edit_json(path: Path, edits: Any) -> None:
    """Apply edits of the tree or of the bytes of a JSON file."""
    tree, of_bytes = edits
    if of_bytes:
        path.write_bytes(edit_bytes(path.read_bytes(), of_bytes))
    else:
        path.write_text(json.dumps(edit_tree(json.loads(path.read_text()), tree)))


def manifest_damage(folder: Path, edits: Any) -> None:
    edit_json(folder / "tokens" / "manifest.json", edits)


def index_damage(folder: Path, edits: Any) -> None:
    path = folder / "tokens" / "train" / "index.npz"
    with np.load(path) as file:
        columns = {name: file[name].copy() for name in file.files}
    for number, what, value in edits:
        names = sorted(columns)
        name = names[number % len(names)]
        if what == "drop":
            del columns[name]
        elif what == "rename":
            word = word_of(value)[:300].encode(errors="replace").decode()
            columns[word.replace("/", "").replace("\0", "") or "x"] = columns.pop(name)
        elif what == "twice":
            columns[name] = np.concatenate([columns[name], columns[name][-1:]])
        elif len(columns[name]):
            column = columns[name].copy()
            if column.dtype.kind in "iu":
                info = np.iinfo(column.dtype)
                column[number % len(column)] = max(info.min, min(info.max, _integer(value)))
            columns[name] = column
    with path.open("wb") as out:
        np.savez(out, **columns)
    resign_manifest(folder / "tokens")


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, (bool, int)) else len(repr(value))


def shards_enter(folder: Path) -> None:
    root = folder / "tokens"
    found = {"ok": False}
    try:
        found = verify(root)
    finally:
        manifest = read_manifest(root)
        for split in manifest["splits"]:
            shards = ShardSet.open(root, split)
            for modality in shards.modalities:
                shards.lengths(modality)
            for i in range(min(ITEMS, len(shards))):
                shards.key(i), shards.meta(i), shards.tokens(i), shards.read_encoded(i)
    if found["ok"]:
        assert found["samples"] == PACKED, "another set is called whole"


def tar_seed(folder: Path) -> None:
    from data_toys import token_shards

    token_shards(folder, PACKED)
    for name in ("raw", "tokens"):
        shutil.rmtree(folder / name)


def tar_damage(folder: Path, edits: Any) -> None:
    path = sorted((folder / "shards" / "train").glob("*.tar"))[0]
    path.write_bytes(edit_bytes(path.read_bytes(), edits))


def tar_enter(folder: Path) -> None:
    """As foreign shards: one tar packed anew."""
    path = sorted((folder / "shards" / "train").glob("*.tar"))[0]
    pack(path, folder / "out", progress=False, max_bad=1.0, workers=1)
    assert verify(folder / "out")["ok"]


def vocabulary_seed(folder: Path) -> None:
    from data_toys import toys

    from mm.vocabulary import extend_vocabulary

    extend_vocabulary([t.spec for t in toys().values()]).save(folder / "vocabulary.json")


def vocabulary_damage(folder: Path, edits: Any) -> None:
    path = folder / "vocabulary.json"
    raw = json.loads(path.read_text())
    raw.pop("sha256")
    raw = edit_tree(raw, edits)
    text = json.dumps(raw, indent=1)
    if isinstance(raw, dict):
        raw = raw | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(raw))


def vocabulary_enter(folder: Path) -> None:
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    assert 0 < vocabulary.size < 2**31
    for name in vocabulary.modalities:
        vocabulary.range(name)
    vocabulary.modality_of(np.arange(5))


# ---- checkpoints ----


def checkpoint_seed(folder: Path) -> None:
    import torch

    from mm.trainer.checkpoint.save import Moment, save

    guard = {"skipped": 0, "rollbacks": 0, "bad": [], "losses": [1.0], "spikes": 0}
    state = {
        "step": 3,
        "stage": 0,
        "guard": guard,
        "data": {"cursor": {"step": 3}, "plan": {"seq_len": 8}},
        "optimizers": {"model": {"step": 3.0}},
        "bytes_per_token": {"text": [1, 2, 3]},
        "world": 1,
        "vocabulary": None,
        "config": {"model": {"kind": "x"}, "seed": 0, "stages": [{}]},
        "tracker": None,
    }
    tensors = {"model": {"w": torch.ones(4)}, "model.optimizer": {"m/w": torch.ones(4)}}
    save(folder / "checkpoints", Moment.of(state, tensors), 2)


CHECKPOINT_FILES = ("model.safetensors", "model.optimizer.safetensors", "index.json", "COMPLETE")


def checkpoint_damage(folder: Path, edits: Any) -> None:
    tree, of_bytes, which = edits
    step = folder / "checkpoints" / "step_000003"
    path = step / "state.json"
    path.write_text(json.dumps(edit_tree(json.loads(path.read_text()), tree)))
    if which:
        file = step / CHECKPOINT_FILES[which - 1]
        file.write_bytes(edit_bytes(file.read_bytes(), of_bytes))
    if which < len(CHECKPOINT_FILES):
        files = [f for f in step.iterdir() if f.name != "COMPLETE"]
        hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        (step / "COMPLETE").write_text(json.dumps(hashes))


def checkpoint_enter(folder: Path) -> None:
    from mm.trainer.checkpoint import format as checkpoint

    saved = checkpoint.newest(folder / "checkpoints")
    if saved is not None:
        saved.require({"model": {"kind": "x"}, "seed": 0, "stages": [{}]}, None)
        dict(saved.tensors("model")), dict(saved.optimizer("model"))


# ---- configs ----


def config_seed(folder: Path) -> None:
    vocabulary_seed(folder)
    values = read("configs/quickstart/hybrid.yaml")
    values["name"] = "fuzz"
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def config_damage(folder: Path, edits: Any) -> None:
    path = folder / "run.yaml"
    tree, of_bytes = edits
    if of_bytes:
        path.write_bytes(edit_bytes(path.read_bytes(), of_bytes))
        return
    values = edit_tree(yaml.load(path.read_text(), yaml.CSafeLoader), tree)
    try:
        path.write_text(yaml.dump(values, Dumper=yaml.CSafeDumper))
    except UnicodeEncodeError:  # JSON, which is YAML, says half a character by its number
        path.write_text(json.dumps(values))


def config_enter(folder: Path) -> None:
    from mm.run import Run

    run = Run.load(folder / "run.yaml")
    assert run.folder.resolve().is_relative_to(run.out.resolve())


# ---- media ----


def media_seed(folder: Path) -> None:
    import soundfile
    from data_toys import png, wav
    from PIL import Image

    (folder / "a.png").write_bytes(png(3, 16))
    (folder / "a.wav").write_bytes(wav(3, 800))
    np.save(folder / "a.npy", np.linspace(0, 1, 12).reshape(3, 4))
    picture = Image.open(io.BytesIO(png(5, 24)))
    for ending in ("jpg", "webp", "bmp", "gif"):
        picture.save(folder / f"a.{ending}")
    sound, rate = soundfile.read(folder / "a.wav")
    for ending in ("flac", "ogg", "aiff"):
        soundfile.write(folder / f"a.{ending}", sound, rate)


def media_damage(folder: Path, edits: Any) -> None:
    which, changes = edits
    files = sorted(folder.iterdir())
    for path in files:
        if path != files[which % len(files)]:
            path.unlink()
    path = files[which % len(files)]
    path.write_bytes(edit_bytes(path.read_bytes(), changes))


def media_enter(folder: Path) -> None:
    for path in folder.iterdir():
        modality = get_modality(table().extensions[path.suffix[1:]])
        data = path.read_bytes()
        modality.check(data)
        modality.describe(modality.decode(data))


# ---- tables ----


def table_seed(folder: Path) -> None:
    from data_toys import png

    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [{"key": f"k{i}", "text": f"row {i}", "image": f"{i}.png"} for i in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table_damage(folder: Path, edits: Any) -> None:
    tree, of_bytes = edits
    path = folder / "rows.jsonl"
    if of_bytes:
        path.write_bytes(edit_bytes(path.read_bytes(), of_bytes))
        return
    rows = edit_tree([json.loads(line) for line in path.read_text().splitlines()], tree)
    lines = rows if isinstance(rows, list) else [rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))


def table_enter(folder: Path) -> None:
    pack(folder / "rows.jsonl", folder / "out", progress=False, max_bad=1.0, workers=1)
    assert verify(folder / "out")["ok"]


# ---- conversations ----


def chat_seed(folder: Path) -> None:
    asked = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "0.png"}}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]
    other = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "blue"}]
    rows: list[Any] = [{"messages": turns}, {"messages": other, "image": ["0.png"], "tools": []}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat_enter(folder: Path) -> None:
    """All but the template's process: it may start no program while it is watched."""
    source = ChatConfig(path=folder / "rows.jsonl", table="jsonl").build()
    source.fingerprint()
    for rows, _ in source.parts:
        for _, row in rows.rows():
            with suppress(BadSample):
                if isinstance(row, dict):
                    for part in (
                        p for m in read_row(row, source.mapping).messages for p in m.parts
                    ):
                        if isinstance(part, Media):
                            media_reader(part, folder)()


DOORS: Mapping[str, Door] = {
    "chat": Door(chat_seed, tree_or_byte_edits, table_damage, chat_enter),
    "manifest": Door(shards_seed, tree_or_byte_edits, manifest_damage, shards_enter),
    "index": Door(shards_seed, tree_edits, index_damage, shards_enter),
    "tar": Door(tar_seed, byte_edits, tar_damage, tar_enter),
    "vocabulary": Door(vocabulary_seed, tree_edits, vocabulary_damage, vocabulary_enter),
    "checkpoint": Door(
        checkpoint_seed,
        lambda draw: (
            tree_edits(draw),
            byte_edits(draw),
            draw.randrange(1 + len(CHECKPOINT_FILES)),
        ),
        checkpoint_damage,
        checkpoint_enter,
    ),
    "config": Door(config_seed, tree_or_byte_edits, config_damage, config_enter),
    "media": Door(
        media_seed,
        lambda draw: (draw.randrange(21), byte_edits(draw)),
        media_damage,
        media_enter,
    ),
    "table": Door(table_seed, tree_or_byte_edits, table_damage, table_enter),
}
