"""A modality of one's own: one class and one line, and every other part knows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import typer.main
from data_toys import ToyTokenizer, png, toys, wav

from mm.batch import Values
from mm.cli.generate import full_app
from mm.data.modalities.base import (
    BadSample,
    Features,
    Modality,
    get_modality,
    modality_of_value,
    raw_modality,
    sort_key,
    table,
)
from mm.data.modalities.video import VideoModality
from mm.data.pack.job import pack
from mm.data.shards.inspect import inspect
from mm.data.shards.reader import QUARANTINE, ShardSet
from mm.data.shards.verify import verify
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.shuffle import key_of
from mm.decoders.media import save_media
from mm.decoders.raws import read_raw
from mm.errors import UserError
from mm.registry import MODALITIES
from mm.report import build_report
from mm.specs import Encoded, FloatArray, Video
from mm.tasks.judges import Judge
from mm.tokenizers.evaluate import evaluate
from mm.tokenizers.text.bytes import BytesConfig

N = 24


class SeriesFeatures(Features):
    def __call__(self, raws: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([[r.mean(), r.std()] for r in raws], np.float32)


class SeriesModality(Modality):
    """A time series: float64 (L,), one number a line. Length: points."""

    kind: Literal["series"] = "series"
    max_points: int = 1000
    window: int = 4

    order: ClassVar[int] = 30
    extensions: ClassVar[tuple[str, ...]] = ("dat",)
    value_name: ClassVar[str] = "a series of floats (L,)"
    unit: ClassVar[str] = "points"
    tokens: ClassVar[Mapping[str, int]] = {"series": 6}
    has_items: ClassVar[bool] = True

    def decode(self, data: bytes) -> np.ndarray:
        try:
            values = np.array([float(line) for line in data.split()], np.float64)
        except ValueError as error:
            raise BadSample(f"series: {error}") from error
        if len(values) > self.max_points:
            raise BadSample(f"series: {len(values)} points, the cap is {self.max_points}")
        return values

    def length(self, data: bytes) -> int:
        return len(data.split())

    def owns(self, value: Any) -> bool:
        return isinstance(value, np.ndarray) and value.dtype == np.float64 and value.ndim == 1

    def describe(self, value: np.ndarray) -> str:
        return f"{len(value)} points from {value.min():g} to {value.max():g}"

    def save(self, value: np.ndarray, path: Path) -> None:
        path.write_text("".join(f"{x:g}\n" for x in value))

    def item(self, value: np.ndarray, config: Any) -> np.ndarray:
        return value.astype(np.float32)

    def stack(self, items: Sequence[np.ndarray], counts: np.ndarray, key: int, config: Any) -> Any:
        return Values.items(torch.from_numpy(np.stack([x[: self.window] for x in items])))

    def features(self) -> Features:
        return SeriesFeatures()


class SeriesTokenizer(ToyTokenizer):
    def _one(self, raw: Any) -> Encoded:
        return Encoded(np.clip(np.asarray(raw), 0, self.spec.n_ids - 1).astype(np.int32))

    def decode(self, codes: Sequence[Encoded]) -> list[Any]:
        return [np.asarray(c.ids, np.float64) for c in codes]


@pytest.fixture(autouse=True)
def series(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line of the registry, for a test alone."""
    monkeypatch.setitem(MODALITIES._modules, "series", __name__)
    monkeypatch.setitem(MODALITIES._classes, "series", SeriesModality)


def values(i: int) -> np.ndarray:
    return np.arange(4 + i % 3, dtype=np.float64) + i


def source(root: Path) -> Path:
    root.mkdir(parents=True)
    for i in range(N):
        (root / f"{i:02d}.txt").write_text(f"series {i}")
        SeriesModality().save(values(i), root / f"{i:02d}.dat")
    return root


def test_packed_read_inspected_and_verified(tmp_path: Path) -> None:
    report = pack(source(tmp_path / "src"), tmp_path / "raw", progress=False)
    assert report.samples == {"train": N} and report.modalities == {"text": N, "series": N}
    assert report.lengths["series"] == sum(len(values(i)) for i in range(N)) and not report.ignored
    shards = ShardSet.open(tmp_path / "raw")
    assert shards.modalities == ("text", "series")
    for i in range(N):
        assert np.array_equal(shards[i].values["series"], values(i))
    found = inspect(tmp_path / "raw", out=tmp_path / "examples")
    assert found["splits"]["train"]["modalities"]["series"]["unit"] == "points"
    example = found["examples"]["series"]
    assert example["what"] == "4 points from 0 to 3"
    assert Path(example["file"]).name == "series-train-000000.dat"
    assert Path(example["file"]).read_text() == "0\n1\n2\n3\n"
    (tmp_path / "raw/train/index.npz").unlink()  # lengths from the headers, too
    assert ShardSet.open(tmp_path / "raw").lengths("series")[1] == 5
    assert verify(tmp_path / "raw")["problems"] == [
        f"{tmp_path}/raw/train/index.npz: missing or changed (training rebuilds it in memory)"
    ]


def test_settings_quarantine_and_duplicates(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    (src / "90.dat").write_text("no number")
    (src / "90.txt").write_text("bad")
    (src / "91.dat").write_bytes((src / "00.dat").read_bytes())
    (src / "91.txt").write_text("the same series")
    limits = {"series": {"max_points": 5}}
    report = pack(
        src, tmp_path / "out", progress=False, max_bad=1, dedupe="series", limits=limits, workers=2
    )
    long = sum(len(values(i)) > 5 for i in range(N))
    assert report.quarantined == 1 + long and report.duplicates == 1
    lines = (tmp_path / "out" / QUARANTINE).read_text()
    assert "series: 6 points, the cap is 5" in lines and "could not convert" in lines
    settings = json.loads((tmp_path / "out/manifest.json").read_text())["settings"]
    assert settings["limits"]["series.max_points"] == 5
    with pytest.raises(UserError, match="unknown modality 'serie'; did you mean 'series'"):
        pack(src, tmp_path / "b", progress=False, limits={"serie": {}})


def test_a_new_modality_leaves_old_packs_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    monkeypatch.delitem(MODALITIES._modules, "series")
    assert not pack(tmp_path / "a.txt", tmp_path / "out", progress=False).already
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setitem(MODALITIES._modules, "series", __name__)
        patch.setitem(MODALITIES._classes, "series", SeriesModality)
        assert pack(tmp_path / "a.txt", tmp_path / "out", progress=False).already


def test_interleaved_tokens_and_streams(tmp_path: Path) -> None:
    src = source(tmp_path / "src")
    rows = [
        {"segments": [{"text": "of"}, {"series": f"{i:02d}.dat"}, {"text": str(i)}]}
        for i in range(N)
    ]
    (src / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pack(src / "rows.jsonl", tmp_path / "raw", progress=False)
    tokenizers = toys() | {"series": SeriesTokenizer("series", 64)}
    pack(tmp_path / "raw", tmp_path / "tokens", tokenizers=tokenizers, progress=False)
    shards = ShardSet.open(tmp_path / "tokens")
    assert list(shards.tokens(3)) == ["000.text", "001.series", "002.text"]
    assert shards.tokens(3)["001.series"].tolist() == values(3).tolist()
    names = [spec.modality for spec in shards.specs]
    assert names == sorted(names, key=sort_key) and names[-1] == "series"
    example = inspect(tmp_path / "tokens", tokenizers=tokenizers)["examples"]["series"]
    assert example["what"] == "4 points from 0 to 3"
    config = PackedConfig(
        sources=({"path": tmp_path / "tokens"},),  # type: ignore[arg-type]
        seq_len=32,
        batch_size=2,
        block_samples=8,
        prefetch=0,
    )
    stream = config.build()
    stream.next()
    assert stream.stats["tokens_seen"]["series"] > 0


def test_items(tmp_path: Path) -> None:
    pack(source(tmp_path / "src"), tmp_path / "raw", progress=False)
    config = ItemsConfig(path=tmp_path / "raw", modality="series", batch_size=3, prefetch=0)
    stream = config.build()
    (batch,) = stream.next()
    assert batch.values["series"].data.shape == (3, 4)
    aside = {"path", "micro_batch_size", "prefetch", "cache_mb", "options"}
    before = key_of(config.model_dump_json(exclude=aside)) % 2**32  # of a plan without any
    shorter = config.model_copy(update={"options": {"window": 2}}).build()
    assert stream.plan["settings"] == before != shorter.plan["settings"]
    assert shorter.next()[0].values["series"].data.shape == (3, 2)
    with pytest.raises(ValueError, match="no items of 'text'; there are: image, audio, series"):
        ItemsConfig(path=tmp_path, modality="text")
    with pytest.raises(ValueError, match="unknown key 'windw'; did you mean 'window'"):
        ItemsConfig(path=tmp_path, modality="series", options={"windw": 2})


def test_prompts_files_judges_and_the_report(tmp_path: Path) -> None:
    assert modality_of_value(values(0)).kind == "series" == raw_modality("series").kind
    run = tmp_path / "run"
    file = save_media(values(2), run / "samples/step_000001/00_text-seven_to_series")
    assert file.suffix == ".dat" and np.array_equal(read_raw("series", file), values(2))
    command = typer.main.get_command(full_app())
    assert {"--image", "--audio", "--series"} <= {o for p in command.params for o in p.opts}
    shares = {"data/token_shares/series": 0.5, "data/token_shares/text": 0.5}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss/series": 1.0, **shares}) + "\n" for n in (1, 2))
    )
    (run / "config.yaml").write_text("name: run\n")
    page = build_report(run).read_text(encoding="utf-8")
    assert "Text: seven → series" in page and "2\n3\n4\n5\n6" in page
    assert 'class="line s6"' in page, "its own colour in every chart"
    figures = evaluate(SeriesTokenizer("series", 64), [values(0), values(1)])
    assert figures["tokens"] == 9 and figures["modality"] == "series"
    judge = Judge("series").fit([values(i) for i in (0, 1, 20, 21)], ["low", "low", "high", "high"])
    assert judge.predict([values(2), values(22)]) == ["low", "high"]


def test_two_modalities_cannot_claim_one_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clash(SeriesModality):
        kind: Literal["clash"] = "clash"  # type: ignore[assignment]
        extensions: ClassVar[tuple[str, ...]] = ("png",)

    monkeypatch.setitem(MODALITIES._modules, "clash", __name__)
    monkeypatch.setitem(MODALITIES._classes, "clash", Clash)
    with pytest.raises(ValueError, match=r"'image' and 'clash' both claim \.png"):
        table()


def test_what_is_unknown_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="unknown modality 'imagge'; did you mean 'image'"):
        get_modality("imagge")
    with pytest.raises(UserError, match=r"a dict is neither text, .* nor a series of floats"):
        modality_of_value({})
    with pytest.raises(
        UserError, match="no judge for 'text'; there are: array, audio, image, series"
    ):
        Judge("text")


# ---- over whatever is registered -------------------------------------------------------------

FILES = {"text": b"a text", "image": png(), "audio": wav(), "series": b"1\n2\n3\n4\n5\n"}
FILES["time_series"] = b"1 2\n3,4.5\n"
FILES["array"] = get_modality("array").file_of(FloatArray(np.eye(3, 4, dtype=np.float32)))
FILES["video"] = VideoModality().file_of(Video(np.zeros((4, 8, 8, 3), np.uint8), 8.0))


@pytest.mark.parametrize("kind", [*MODALITIES, "series"])
def test_every_modality_keeps_the_contract(kind: str, tmp_path: Path) -> None:
    m, data = get_modality(kind), FILES[kind]
    value = m.decode(data)
    assert [other.kind for other in table().modalities.values() if other.owns(value)] == [kind]
    extension, length = m.check(data)
    assert extension in m.extensions and length == m.length(data) > 0
    file = save_media(value, tmp_path / "value")
    assert file.suffix == f".{m.extensions[0]}"
    again = m.decode(file.read_bytes())
    assert m.describe(again) == m.describe(value) and "\n" not in m.describe(value)
    assert m.n_bytes(value) > 0
    assert m.describe(m.accept(value)) == m.describe(value)
    bytes_of = BytesConfig(modality=kind).build()
    read = m.read(data, bytes_of)  # text, or the file as it is
    assert bytes_of.decode(bytes_of.encode([read, value]))[0] == data
    assert m.decode(m.file_of(value)) is not None and m.line(read) == m.describe(value)
    m.check_ending(Path(f"x.{m.extensions[0].upper()}"))
    with pytest.raises(UserError, match=f"is written as .{m.extensions[0]}"):
        m.check_ending(Path("x.wav" if kind != "audio" else "x.png"))
    with pytest.raises(BadSample, match=f"^{kind}: "):
        m.decode(b"\xff\x00\xfe no file of any kind")
    if m.has_items:
        config = ItemsConfig(path=tmp_path, modality=kind, sample_rate=8000, crop_seconds=0.01)
        items = [m.item(value, config), m.item(again, config)]
        assert len(m.stack(items, np.arange(2), 7, config).data) == 2
