"""Transforms, raw items, prefetching and what goes wrong when a stream is opened."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_toys import ToyTokenizer, folder

from mm.data.modalities.audio import loudness
from mm.data.modalities.image import Augment, affine, fit_image
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.data.streams.base import Step, Stream
from mm.data.streams.blocks import Document, first_fit, lay_rows
from mm.data.streams.packed import PackedConfig
from mm.data.streams.raw_items import ItemsConfig
from mm.data.streams.shuffle import Reseeded, fold_seed, generator, permute, uniform
from mm.data.streams.stateful import StatefulConfig
from mm.errors import UserError
from mm.registry import STREAMS
from mm.specs import TokenSpec
from mm.vocabulary import extend_vocabulary

# ---- packing ---------------------------------------------------------------------------------


def test_first_fit() -> None:
    fit = lambda lengths, *sizes: [
        [lengths[i] for i in row] for row in first_fit(np.array(lengths, np.int64), *sizes)
    ]
    assert fit([6, 5, 4, 3, 2, 2], 10, 3) == [[6, 4], [5, 3, 2], [2]]
    assert [len(row) for row in fit([2] * 5, 100, 2)] == [2, 2, 1]
    assert fit([], 10, 2) == []


def test_rows_are_packed_the_better_way() -> None:
    """In a drawn order; longest first where that takes at least 2 % fewer rows."""
    named = lambda lengths: [Document(0, 0, i, 0, n) for i, n in enumerate(lengths)]
    rng = np.random.default_rng(0)
    for lengths, most in ((rng.integers(2, 100, 200), 50), ([90] * 40 + [5] * 160, 6)):
        documents = named([int(n) for n in lengths])
        rows = lay_rows(documents, 100, most, key=3)
        assert sorted(d for row in rows for d in row) == documents
        assert all(sum(d.length for d in row) <= 100 and len(row) <= most for row in rows)
        mixed = np.array([d.length for d in documents])
        either = [first_fit(np.sort(mixed)[::-1], 100, most), first_fit(mixed, 100, most)]
        assert len(rows) <= 1.04 * min(len(e) for e in either) + 1
        assert lay_rows(documents, 100, most, key=4) != rows


def test_transform_of_the_objective_comes_last_and_stats_are_global(data: Path) -> None:
    config = PackedConfig(
        sources=[{"path": data / "tokens"}],
        seq_len=64,
        batch_size=4,
        transform=["chunk"],
        prefetch=0,
    )
    stream = config.build(
        transform={"kind": "any_to_any", "tasks": {"image>text": 1}, "condition_dropout": 0}
    )
    (b,) = stream.next()
    vocabulary = stream.vocabulary
    numbers = b.layout.fields.modality
    for modality in ("text", "image"):
        assert stream.stats["tokens"][modality] == int(
            (numbers == vocabulary.range(modality).index).sum()
        )
    assert "audio" not in stream.stats["tokens"] and stream.stats["documents"] == len(b.keys)
    assert stream.stats["filtered"] > 0, "text without an image"
    goal = b.labels["target_modality"][b.weight > 0]
    assert (goal == vocabulary.range("text").index).all() and len(goal) > 0


def test_mapped_shards_equal_shards_in_memory(data: Path) -> None:
    a, b = ShardSet.open(data / "tokens"), ShardSet.open(data / "tokens", cache_mb=0)
    assert isinstance(b._contents(0).base, np.memmap) and a._contents(0).base is None
    for i in range(len(a)):
        left, right = a.tokens(i), b.tokens(i)
        assert left.keys() == right.keys() and all((left[m] == right[m]).all() for m in left)


def test_a_model_vocabulary_may_be_longer_but_not_another(data: Path) -> None:
    config = PackedConfig(sources=[{"path": data / "tokens"}], seq_len=64, prefetch=0)
    own = ShardSet.open(data / "tokens").vocabulary
    first = config.build().next()[0]
    longer = config.build(vocabulary=own.add(TokenSpec("smell", 5))).next()[0]
    assert torch.equal(first.ids, longer.ids), "old ids never move"
    other = extend_vocabulary([TokenSpec("smell", 5), *own.ranges])
    moved = config.build(vocabulary=other).next()[0]
    assert torch.equal(torch.where(first.ids > 15, first.ids + 7, first.ids), moved.ids)
    with pytest.raises(UserError, match="uses modality 'text' that this vocabulary lacks"):
        config.build(vocabulary=extend_vocabulary([TokenSpec("smell", 5)]))
    with pytest.raises(UserError, match="was tokenised by toy-text"):
        config.build(vocabulary=extend_vocabulary([ToyTokenizer("text", 65).spec, *own.ranges[1:]]))


def test_wrong_folders(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="raw shards, not tokens; make them with: mm data pack"):
        PackedConfig(sources=[{"path": data / "shards"}]).build()
    with pytest.raises(UserError, match="no split 'tran'; did you mean 'train'"):
        PackedConfig(sources=[{"path": data / "tokens", "split": "tran"}]).build()
    with pytest.raises(UserError, match="token shards hold no raw items"):
        ItemsConfig(path=data / "tokens").build()
    (tmp_path / "a.txt").write_text("text only")
    pack(tmp_path / "a.txt", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="split 'train' has no raw 'image'; it has: text"):
        ItemsConfig(path=tmp_path / "out").build()
    with pytest.raises(UserError, match="no packed data at"):
        ItemsConfig(path=tmp_path / "none").build()


# ---- prefetching -----------------------------------------------------------------------------


class Counting(Stream):
    """Steps that are their own number; step 5 is broken."""

    counted = ("step",)

    def __init__(self, prefetch: int):
        self.made = 0
        super().__init__({}, prefetch)

    def start(self) -> dict[str, int]:
        return {"step": 0}

    def advance(self, cursor):
        self.made += 1
        if cursor["step"] == 5:
            raise UserError("step 5 is broken")
        return Step([], {"step": cursor["step"] + 1}, {"step": cursor["step"]})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_come_where_they_belong(prefetch: int) -> None:
    stream = Counting(prefetch)
    for i in range(5):
        stream.next()
        assert stream.stats == {"step": i}
    for _ in range(2):
        with pytest.raises(UserError, match="step 5 is broken"):
            stream.next()
    assert stream.state_dict()["cursor"] == {"step": 5}
    stream.load_state_dict({"cursor": {"step": 6}, "plan": {}})
    stream.next()
    assert stream.stats == {"step": 6}
    stream.close()


def test_prefetch_is_bounded_and_close_ends_the_thread() -> None:
    before = threading.active_count()
    stream = Counting(2)
    stream.next()
    for _ in range(100):
        if stream.made == 4:
            break
        time.sleep(0.01)
    time.sleep(0.1)
    assert stream.made == 4, "one consumed, two waiting, one in hand"
    stream.close()
    assert threading.active_count() == before
    stream.close()


# ---- items -----------------------------------------------------------------------------------


def test_images(data: Path) -> None:
    config = ItemsConfig(path=data / "shards", batch_size=5, size=8, prefetch=0)
    stream = config.build(seed=0)
    (b,) = stream.next()
    values = b.values["image"]
    assert values.data.shape == (5, 3, 8, 8) and values.data.dtype == torch.float32
    raw = {
        stream.shards.key(i): stream.shards[i].values["image"]
        for i in range(len(stream.shards))
        if i % 4
    }
    for key, image in zip(b.keys, values.data, strict=True):
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), raw[key] / 255.0, atol=1e-6)
    gray = (
        config.model_copy(update={"gray": True, "size": 4})
        .build(seed=0)
        .next()[0]
        .values["image"]
        .data
    )
    assert gray.shape == (5, 1, 4, 4)
    changed = config.model_copy(update={"augment": Augment(shift=0.2)}).build(seed=0).next()[0]
    assert changed.keys == b.keys and not torch.allclose(changed.values["image"].data, values.data)


def test_affine() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((6, 3, 9, 9), np.float32))
    counts = np.arange(6)
    torch.testing.assert_close(affine(images, Augment(), counts, 1), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        affine(images, Augment(flip=1.0), counts, 1), images.flip(-1), atol=1e-5, rtol=0
    )
    strong = Augment(shift=0.2, rotate_deg=30, scale=0.3, flip=0.5)
    out = affine(images, strong, counts, 1)
    torch.testing.assert_close(
        affine(images[2:4], strong, counts[2:4], 1), out[2:4], msg="an item is changed alone"
    )
    assert (
        out.min() >= 0
        and out.max() <= 1
        and not torch.allclose(out, affine(images, strong, counts + 6, 1))
    )


def test_fit_image_keeps_the_middle() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    assert (fit_image(wide, 10) == 200).all()
    assert (
        fit_image(wide, 5).shape == (5, 5, 3)
        and (fit_image(wide, 5, gray=True)[1:4, 1:4] == 200).all()
    )


def test_sounds(data: Path) -> None:
    config = ItemsConfig(
        path=data / "shards",
        modality="audio",
        batch_size=9,
        sample_rate=8000,
        crop_seconds=0.04,
        prefetch=0,
    )
    stream = config.build(seed=0)
    lengths = set()
    for _ in range(3):
        (b,) = stream.next()
        values = b.values["audio"]
        assert values.data.shape == (9, 320) and values.data.dtype == torch.float32
        for row, n, key in zip(values.data.numpy(), values.length.tolist(), b.keys, strict=True):
            whole = stream.shards[int(key[1:])].values["audio"].samples
            assert n == min(320, len(whole)) and (row[n:] == 0).all()
            assert any(np.array_equal(whole[s : s + n], row[:n]) for s in range(len(whole) - n + 1))
            lengths.add(n)
    assert lengths == {200, 280, 320}
    up = config.model_copy(update={"sample_rate": 16000}).build(seed=0).next()[0].values["audio"]
    assert up.data.shape == (9, 640) and set(up.length.tolist()) <= {400, 560, 640}


def test_unique_items(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 5, splits=("train", "test"))
    for path in (src / "train").glob("*.png"):
        path.write_bytes((src / "train/item000.png").read_bytes())
    pack(src, tmp_path / "out", progress=False)
    assert len(ItemsConfig(path=tmp_path / "out").build()) == 5
    assert len(ItemsConfig(path=tmp_path / "out", repeat="unique").build()) == 1


def test_loudness() -> None:
    quiet = np.sin(np.arange(1000) * 0.1).astype(np.float32) * 0.01
    assert np.abs(loudness(quiet, "peak")).max() == pytest.approx(0.95, abs=1e-3)
    assert np.sqrt(np.mean(loudness(quiet, "rms") ** 2)) == pytest.approx(0.1, rel=1e-3)
    click = np.zeros(1000, np.float32)
    click[3] = 0.5
    assert np.abs(loudness(click, "rms")).max() == pytest.approx(0.95, abs=1e-3), "never clipped"
    assert (loudness(np.zeros(5, np.float32), "rms") == 0).all() and loudness(
        quiet, "none"
    ) is quiet


def test_damaged_shards_stop_training_with_a_name(tmp_path: Path) -> None:
    pack(folder(tmp_path / "src", 3, splits=("train",)), tmp_path / "out", progress=False)
    shard = tmp_path / "out/train/shard-000000.tar"
    shard.write_bytes(
        shard.read_bytes().replace(b"IDAT", b"IDAX")
    )  # same size: only decoding notices
    stream = ItemsConfig(path=tmp_path / "out", batch_size=2).build()
    with pytest.raises(
        UserError, match=r"out/train/shard-000000.tar:train/item00\d: image: .*run: mm data verify"
    ):
        stream.next()


# ---- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100, 1023, 1024, 1025, 5000])
def test_permutation_is_one_and_seeks(n: int) -> None:
    whole = permute(np.arange(n), n, 7)
    assert sorted(whole) == list(range(n))
    some = np.arange(n)[:: max(1, n // 7)]
    np.testing.assert_array_equal(permute(some, n, 7), whole[some])
    if n > 100:
        assert (whole != permute(np.arange(n), n, 8)).mean() > 0.9
        assert abs(np.corrcoef(whole, np.arange(n))[0, 1]) < 0.1


def test_uniform_is_uniform_and_its_draws_are_independent() -> None:
    a, b = (uniform(3, np.arange(20000), draw) for draw in (0, 1))
    for x in (a, b):
        assert (
            abs(x.mean() - 0.5) < 0.01
            and abs(x.std() - 12**-0.5) < 0.01
            and 0 <= x.min()
            and x.max() < 1
        )
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03


def test_an_old_kind_and_an_old_cursor_are_refused_by_name(data: Path) -> None:
    with pytest.raises(UserError, match="data kind 'lanes' is called 'stateful' now"):
        STREAMS.get("lanes")
    config = StatefulConfig(source={"path": data / "tokens"}, seq_len=64, batch_size=2, prefetch=0)  # type: ignore[arg-type]
    stream = config.build()
    state = stream.state_dict()
    state["cursor"] = {k.replace("index/", "place/"): n for k, n in state["cursor"].items()}
    with pytest.raises(UserError, match="the checkpoint's cursor has no 'index/0'"):
        stream.load_state_dict(state)


def test_a_reseeded_generator_draws_as_a_new_one() -> None:
    """Whatever was drawn before: a buffered half of 64 bits must not be left over."""
    again = Reseeded()
    for parts in ((1, "source", 3), (0, 0, 7, 2), (1, "source", 3)):
        for draw in (
            lambda g: g.random(5),
            lambda g: g.integers(0, 9, 7),
            lambda g: g.integers(0, 5, 3, dtype=np.uint32),
            lambda g: g.normal(size=3),
        ):
            np.testing.assert_array_equal(draw(again(*parts)), draw(generator(*parts)))


def test_fold_seed_keeps_its_values() -> None:
    """They seed dropout and sampling: other values would change the bits of every run."""
    assert fold_seed() == 0
    assert fold_seed(0) == 4073552104164651883
    assert fold_seed(1, 2, 3) == 1925646664898125709
    assert fold_seed(-1, 2**64 + 5) == 961664543507548700
