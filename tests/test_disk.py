"""A disk that takes no more: one line, and nothing half-written."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mm.disk import tell_if_full
from mm.errors import UserError
from mm.model.model import LmConfig, Model
from mm.tokenizers.load import write_folder
from mm.tokenizers.text.bytes import BytesConfig

SMALL = {"kind": "stack", "depth": 1, "pattern": "attention"}


@contextmanager
def files_end_at(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond: a write fails as on a full disk, in Python and in Rust alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save_model(folder: Path) -> None:
    torch.manual_seed(len(list(folder.parent.iterdir())))
    model = LmConfig(d_model=16, backbone=SMALL).build()  # type: ignore[arg-type]
    assert isinstance(model, Model)
    model.save_pretrained(folder)


def save_tokenizer(folder: Path) -> None:
    weights = {"w": torch.full((4_000,), float(len(list(folder.parent.iterdir()))))}
    write_folder(folder, BytesConfig(), {}, weights)


@pytest.mark.parametrize("save", [save_model, save_tokenizer])
@pytest.mark.parametrize("limit", [0, 64, 8_000])
def test_saving_on_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    save: Callable[[Path], None], limit: int, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    with files_end_at(limit), pytest.raises(UserError, match="disk or a quota is full") as told:
        save(folder)
    assert "\n" not in str(told.value) and str(folder) in str(told.value)
    assert not contents(tmp_path)
    save(folder)
    before = contents(tmp_path)
    (tmp_path / "another").mkdir()  # so that other weights are saved
    with files_end_at(limit), pytest.raises(UserError, match="disk or a quota is full"):
        save(folder)
    assert contents(tmp_path) == before


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), tell_if_full(tmp_path, ""):
        (tmp_path / "a" / "b").write_text("x")
    with pytest.raises(ZeroDivisionError), tell_if_full(tmp_path, ""):
        _ = 1 / 0
