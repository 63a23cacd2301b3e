"""Tokenizer folders.

`tokenizer.yaml` (config and fingerprint) beside its data files; written atomically, checked at
load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mm.config import Config, validate
from mm.data.modalities.base import sort_key
from mm.disk import tell_if_full
from mm.errors import UserError
from mm.hashes import check_hashes, write_hashes
from mm.reading import parse_yaml
from mm.registry import TOKENIZERS
from mm.specs import ModalityTokenizer

if TYPE_CHECKING:
    from torch import Tensor

CARD, WEIGHTS = "tokenizer.yaml", "model.safetensors"
DATA_FILES = ("config.json", "tokenizer.json")


class ConfigTokenizer(ModalityTokenizer):
    """Base of tokenizers whose folder holds nothing but their ``config``."""

    config: Any

    def save(self, folder: str | Path) -> None:
        write_folder(folder, self.config)

    @classmethod
    def load(cls, folder: str | Path) -> ModalityTokenizer:
        return load_tokenizer(folder)


def load_tokenizer(path: str | Path) -> ModalityTokenizer:
    """Load a tokenizer folder, or the one in ``model/`` of a run folder.

    Raises:
        UserError: nothing is there, its kind is unknown, or its files do not match their
            fingerprint: ids of a changed tokenizer mean something else, and a model trained on the
            old ones would go on without any error.
    """
    folder = tokenizer_folder(path)
    check_hashes(folder, "restore it, or train the tokenizer again with: mm tokenizer train CONFIG")
    card = _read_card(folder)
    claimed, found = card.pop("fingerprint", None), fingerprint(folder)
    if claimed != found:
        raise UserError(
            f"{folder}: fingerprint {found[:12]} is not the {str(claimed)[:12]} that {CARD} "
            "promises: a file was changed or damaged; restore it, or train it again with: "
            "mm tokenizer train CONFIG"
        )
    cls = TOKENIZERS.get(str(card.get("kind")))
    return validate(cls, card, str(folder / CARD)).build(folder)


def load_tokenizers(given: str | Path | Mapping[str, Any]) -> dict[str, ModalityTokenizer]:
    """Load tokenizers from a folder of one sub-folder a modality, or from modality -> folder.

    What a sub-folder is called does not matter: the tokenizer in it says its modality.

    Raises:
        UserError: none is found, two are of one modality, or a mapping's name is not the
            modality of its tokenizer.
    """
    named = isinstance(given, Mapping)
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        root = Path(given)
        if not root.is_dir():
            raise UserError(f"no tokenizers at {root}; make them with: mm tokenizer train CONFIG")
        found = {}
        for folder in sorted(
            p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")
        ):
            if any((f / "tokenizer.yaml").is_file() for f in (folder, folder / "model")):
                found[folder.name] = folder
            elif (folder / "checkpoints").is_dir():
                tokenizer_folder(folder)  # says that its training has not finished
        if not found:
            raise UserError(
                f"{root}: no sub-folder holds a tokenizer; expected {root}/text, {root}/image, ..."
            )
    out: dict[str, ModalityTokenizer] = {}
    for name, value in found.items():
        tokenizer = value if isinstance(value, ModalityTokenizer) else load_tokenizer(value)
        modality = tokenizer.spec.modality
        if named and modality != name:
            raise UserError(
                f"tokenizers: '{name}' is given a tokenizer of '{modality}': its key must be "
                f"'{modality}'"
            )
        if modality in out:
            raise UserError(
                f"{given}: two tokenizers of '{modality}', one of them in {value}: move one of "
                "them out of the folder"
            )
        out[modality] = tokenizer
    return {modality: out[modality] for modality in sorted(out, key=sort_key)}


def tokenizer_folder(path: str | Path) -> Path:
    """The folder that holds ``tokenizer.yaml``: ``path`` or ``path/model``.

    Raises UserError when neither does.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / CARD).is_file():
            return folder
    unfinished = " (its training has not finished)" if (path / "checkpoints").is_dir() else ""
    raise UserError(f"no tokenizer at {path}{unfinished}; make one with: mm tokenizer train CONFIG")


def fingerprint(folder: str | Path) -> str:
    """sha256 over config, data files and weights of a tokenizer folder.

    Raises UserError when it is unreadable.
    """
    folder = Path(folder)
    card = _read_card(folder)
    card.pop("fingerprint", None)
    files = {name: (folder / name).read_bytes() for name in DATA_FILES if (folder / name).is_file()}
    tensors: Mapping[str, Tensor] = {}
    if (folder / WEIGHTS).is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / WEIGHTS}: not readable ({error}); restore it from a backup"
            ) from error
    return fingerprint_of(card, files, tensors)


def fingerprint_of(
    config: Config | Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> str:
    """What `fingerprint` gives of a folder that `write_folder` makes of the same things.

    Tensors count by content.
    """
    values = config.to_dict() if isinstance(config, Config) else dict(config)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, content in sorted((files or {}).items()):
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    for name, tensor in sorted((tensors or {}).items()):
        import torch

        plain = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_folder(
    folder: str | Path,
    config: Config,
    files: Mapping[str, bytes] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    beside: Mapping[str, bytes] | None = None,
) -> str:
    """Write a tokenizer folder: all files whole, or none; its hashes last.

    Args:
        config: of the tokenizer, with ``kind`` and ``modality``.
        files: data files by name, of `DATA_FILES`.
        tensors: state dict of a trained one, written as ``model.safetensors``.
        beside: files that change no id, which the fingerprint does not cover.
    Returns:
        The fingerprint.
    Raises:
        UserError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unknown = set(files or {}) - set(DATA_FILES)
    if unknown:
        raise ValueError(
            f"{sorted(unknown)} would not be covered by the fingerprint; known: {DATA_FILES}"
        )
    contents = {**(files or {}), **(beside or {})}
    if tensors is not None:
        from safetensors.torch import save

        contents[WEIGHTS] = save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})
    mark = fingerprint_of(config, files, tensors)
    card = config.to_dict() | {"fingerprint": mark}
    contents[CARD] = yaml.safe_dump(card, sort_keys=False, allow_unicode=True).encode()
    parts = {name: folder / (name + ".part") for name in contents}
    try:
        with tell_if_full(folder, ", and save it again"):
            for name, content in contents.items():
                parts[name].write_bytes(content)
            for name, part in parts.items():
                part.replace(folder / name)
            write_hashes(folder)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return mark


def _read_card(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        raise UserError(f"no {CARD} in {folder}; make a tokenizer with: mm tokenizer train CONFIG")
    try:
        card = parse_yaml((folder / CARD).read_bytes())
    except ValueError as error:
        raise UserError(
            f"{folder / CARD}: not valid YAML ({error}); restore it from a backup"
        ) from error
    if not isinstance(card, dict) or "kind" not in card:
        raise UserError(f"{folder / CARD}: has no 'kind'; restore it from a backup")
    return card
