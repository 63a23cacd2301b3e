"""Float arrays: .npy of every kind against NumPy, hostile ones, patches by hand, packing."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm.data.modalities.array import ArrayModality
from mm.data.modalities.base import BadSample, get_modality, show_file
from mm.data.pack.job import pack
from mm.data.shards.inspect import inspect
from mm.data.shards.reader import ShardSet
from mm.errors import UserError
from mm.report.media import figure
from mm.specs import Encoded, FloatArray
from mm.tokenizers.array.patches import ArrayPatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.log.html_table import html_table

M = ArrayModality()


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), version)
    return out.getvalue()


def claimed(header: str, body: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode("latin1").ljust(117) + b"\n"
    return magic + struct.pack("<H", len(text)) + text + body


class Touch:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "i1", "<i8", ">u2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_wrote_is_read(dtype: str, order: Any) -> None:
    x = np.random.default_rng(0).integers(0, 100, (3, 4, 5)).astype(dtype, order=order)
    for version in ((1, 0), (2, 0)):
        data = npy(x, version)
        value = M.decode(data)
        assert value.values.dtype == np.float32 and value.values.flags.c_contiguous
        assert np.array_equal(value.values, x.astype(np.float32))
        assert M.check(data) == ("npy", 60) and M.length(data) == 60
    assert np.array_equal(np.load(io.BytesIO(M.file_of(value))), x.astype(np.float32))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    objects = npy(np.array([Touch(trap)], object))
    for data in (objects, pickle.dumps(Touch(trap)), b"\x93NUMPY" + pickle.dumps(Touch(trap))):
        with pytest.raises(BadSample, match="^array: not an .npy file"):
            M.check(data)
    assert not trap.exists()
    np.load(io.BytesIO(objects), allow_pickle=True)
    assert trap.exists(), "NumPy itself would have opened it"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (npy([1.0, np.nan]), r"element \(1,\) is nan: not finite"),
        (npy([[1.0, 2.0], [-np.inf, 0.0]]), r"element \(1, 0\) is -inf"),
        (npy([1.0, 1e300]), r"element \(1,\) is 1e\+300: not finite in float32"),
        (npy(np.zeros((3, 0))), r"shape \(3, 0\) has no element"),
        (npy(np.float32(3)), r"shape \(\) has no axis"),
        (npy(np.zeros(2, np.complex64)), "complex64, not real numbers"),
        (npy(np.array(["a"])), "<U1, not real numbers"),
        (npy(np.zeros(2, [("a", "f4")])), "not real numbers"),
        (npy(np.zeros((1,) * 9)), r"max_axes 8"),
        (npy(np.zeros((4, 4)))[:-1], "header says float64 .4, 4., 128 bytes; there are 127"),
        (npy(np.zeros((4, 4))) + b"\0", "128 bytes; there are 129"),
        (npy(np.zeros(4))[:40], "not an .npy file"),
        (claimed("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}"), "caps"),
        (claimed("{'descr': '<f4', 'fortran_order': False, 'shape': (2000000,)}"), "there are 0"),
        (claimed("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}"), "not an .npy file"),
        (claimed("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "not an .npy file"),
        (claimed("__import__('os').abort()"), "not an .npy file"),
        (claimed("{'shape': (1,)}"), "not an .npy file"),
        (claimed("{}", magic=b"\x93NUMPY\x03\x00"), "npy version"),
        (b"", "not an .npy file"),
    ],
)
def test_hostile_files_are_refused_in_one_line(data: bytes, said: str) -> None:
    for read in (M.decode, M.check):
        with pytest.raises(BadSample, match=f"^array: .*{said}") as found:
            read(data)
        assert "\n" not in str(found.value)


def test_damaged_bytes_are_bad_samples_and_nothing_else() -> None:
    rng, data = np.random.default_rng(0), npy(np.ones((4, 5)))
    refused = 0
    for _ in range(400):
        hurt = bytearray(data)
        for at in rng.integers(0, 140, int(rng.integers(1, 4))):
            hurt[at] = int(rng.integers(256))
        try:
            M.check(bytes(hurt))
        except BadSample as error:
            refused += 1
            assert str(error).startswith("array: ") and "\n" not in str(error)
    assert refused > 100


def test_limits_are_settings_that_the_message_names() -> None:
    data = npy(np.zeros((5, 5)))
    with pytest.raises(BadSample, match=r"shape \(5, 5\); .* max_axes 8 and max_elements 24"):
        get_modality("array", {"max_elements": 24}).check(data)
    assert get_modality("array", {"max_elements": 25, "max_axes": 2}).length(data) == 25


def test_what_python_has_is_accepted_or_told() -> None:
    for given in (
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]]),
        FloatArray(np.array([[1, 2], [3, 4]])),
    ):
        found = M.accept(given)
        assert M.owns(found) and found.values.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    for bad in ("x", [[1], [1, 2]], [np.nan], [], 3.0, [1j], FloatArray([np.inf])):
        with pytest.raises(BadSample, match="^array: "):
            M.accept(bad)


def test_patches_by_hand() -> None:
    x = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    patches = ArrayPatchesConfig(patch=(2, 3), normalise="none").build()
    (code,) = patches.encode([FloatArray(x)])
    assert code.values.shape == (2, 2, 6) and patches.spec.grid == (32, 32)
    assert code.values[1, 0].tolist() == x[2:, :3].ravel().tolist()
    assert np.array_equal(patches.decode([Encoded(values=code.values)])[0].values, x)
    odd = patches.encode([x[:3, :4]])[0]
    assert odd.values.shape == (2, 2, 6)
    assert odd.values[1, 1].tolist() == [15.0, 15.0, 15.0] * 2, "the last elements, repeated"
    assert np.array_equal(patches.decode([odd])[0].values, x[:3, :4])


@pytest.mark.parametrize(
    ("patch", "shape", "cells"),
    [((4,), (10,), (3,)), ((2,), (5, 3), (3,)), ((1, 2, 2), (2, 3, 4, 3), (2, 2, 2))],
)
def test_any_number_of_axes_with_channels_behind_them(
    patch: tuple[int, ...], shape: tuple[int, ...], cells: tuple[int, ...]
) -> None:
    channels = int(np.prod(shape[len(patch) :]))
    config = ArrayPatchesConfig(patch=patch, channels=channels, normalise="item")
    x = np.random.default_rng(1).normal(5, 2, shape)
    (code,) = config.build().encode([x])
    assert code.values.shape == (*cells, np.prod(patch) * channels)
    first = ((x - x.mean(axis=tuple(range(len(patch))))) / x.std(axis=tuple(range(len(patch)))))[
        tuple(slice(p) for p in patch)
    ]
    np.testing.assert_allclose(code.values[(0,) * len(patch)], first.ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(config.build().decode([code])[0].values, x, rtol=1e-5, atol=1e-5)


def test_normalised_by_what_the_training_part_has() -> None:
    rng = np.random.default_rng(2)
    arrays = [rng.normal((3, -50), (2, 10), (n, 7, 2)) for n in (4, 1, 9)]
    arrays = [np.concatenate((a, np.full((*a.shape[:2], 1), 6.0)), -1) for a in arrays]
    config = ArrayPatchesConfig(patch=(1, 1), channels=3)
    patches = config.fit(iter(arrays))
    rows = np.concatenate([a.reshape(-1, 3) for a in arrays])
    assert patches.config.mean == pytest.approx(rows.mean(0))
    assert patches.config.std[:2] == pytest.approx(rows.std(0)[:2])
    assert patches.config.std[2] == 6, "a channel that never varies is divided by its own size"
    seen = np.concatenate([c.values.reshape(-1, 3) for c in patches.encode(arrays)])
    assert np.abs(seen.mean(0)[:2]).max() < 1e-5 and np.abs(seen.std(0)[:2] - 1).max() < 1e-5
    assert patches.spec.fingerprint != config.fit(arrays[:1]).spec.fingerprint
    with pytest.raises(UserError, match="not measured yet: mm tokenizer train"):
        config.build()


def test_what_does_not_fit_is_told_with_its_key() -> None:
    patches = ArrayPatchesConfig(patch=(2, 2), normalise="none", max_patches=4).build()
    with pytest.raises(UserError, match=r"2x3 of them, tokenizer.max_patches is 4"):
        patches.encode([np.zeros((4, 5))])
    for shape in ((4,), (4, 4, 3)):
        with pytest.raises(UserError, match=r"set tokenizer.patch and tokenizer.channels"):
            patches.encode([np.zeros(shape)])
    with pytest.raises(UserError, match="not finite"):
        patches.encode([FloatArray(np.full((2, 2), np.nan))])
    for wrong in (
        {"mean": (0,)},
        {"mean": (0, 0), "std": (1, 1)},
        {"normalise": "item", "mean": (0,), "std": (1,)},
    ):
        with pytest.raises(ValueError, match="mean"):
            ArrayPatchesConfig.model_validate({"kind": "array_patches", **wrong})


def test_packed_from_files_inspected_and_put_on_their_grid(tmp_path: Path) -> None:
    source = tmp_path / "source" / "train"
    source.mkdir(parents=True)
    for i in range(5):
        np.save(source / f"{i}.npy", np.arange(20.0).reshape(4, 5) + i)
        (source / f"{i}.txt").write_text("ramp")
    np.save(source / "bad.npy", np.array([[np.nan]]))
    (source / "bad.txt").write_text("ramp")
    report = pack(tmp_path / "source", tmp_path / "raw", progress=False, max_bad=1.0)
    assert report.modalities == {"text": 5, "array": 5} and report.quarantined == 1
    assert "element (0, 0) is nan" in (tmp_path / "raw" / "quarantine.jsonl").read_text()
    example = inspect(tmp_path / "raw", out=tmp_path / "shown")["examples"]["array"]
    assert example["what"] == "4x5 from 0 to 19, mean 9.5"
    with Image.open(example["picture"]) as picture:
        pixels = np.asarray(picture).astype(int).sum(-1)
    assert pixels.shape == (4, 5) and pixels.argmin() == 0 and pixels.argmax() == 19
    tokenizers: dict[str, Any] = {
        "array": ArrayPatchesConfig(patch=(2, 2), normalise="item").build(),
        "text": BytesConfig(modality="text").build(),
    }
    pack(tmp_path / "raw", tmp_path / "tokens", tokenizers=tokenizers, progress=False)
    shards = ShardSet.open(tmp_path / "tokens")
    assert {shards.tokens(i)["array"].shape for i in range(5)} == {(2, 3, 4)}
    back = tokenizers["array"].decode([shards.read_encoded(2)["array"]])[0].values
    np.testing.assert_allclose(back, np.arange(20.0).reshape(4, 5) + 2, atol=1e-5)


def test_several_arrays_of_one_sample(tmp_path: Path) -> None:
    """Of an interleaved sample a raw array is `000.npy`, which is no member of tokens."""
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.full((2, 3), ord(name)))
    row = '{"segments": [{"array": "a.npy"}, {"text": "then"}, {"array": "b.npy"}]}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    pack(tmp_path / "rows.jsonl", tmp_path / "raw", progress=False)
    shards = ShardSet.open(tmp_path / "raw")
    assert shards.modalities == ("text", "array") and shards.interleaved
    assert [v.values[0, 0] for k, v in shards[0].values.items() if "array" in k] == [97, 98]
    (tmp_path / "raw/train/index.npz").unlink()  # made again from the headers
    assert ShardSet.open(tmp_path / "raw").lengths("array").tolist() == [12]


def test_pages_show_a_heat_map_or_a_line(tmp_path: Path) -> None:
    flat, deep = tmp_path / "flat.npy", tmp_path / "deep.npy"
    np.save(flat, np.eye(4)[:3])
    np.save(deep, np.ones((2, 3, 4)))
    (tmp_path / "bad.npy").write_bytes(npy(np.ones(3))[:-1])
    shown = show_file(flat)
    assert shown.kind == "image" and shown.ending == "png"
    with Image.open(io.BytesIO(shown.content)) as picture:
        assert picture.size == (4, 3)
    assert show_file(deep) == ("text", "2x3x4 from 1 to 1, mean 1", "npy")
    assert show_file(tmp_path / "bad.npy").content.startswith("bad.npy: array: header says")
    page = html_table([{"of": flat, "other": deep}])
    assert "data:image/png;base64," in page and "2x3x4 from 1 to 1" in page
    assert "data:image/png" in figure(flat) and "2x3x4 from 1 to 1" in figure(deep)
