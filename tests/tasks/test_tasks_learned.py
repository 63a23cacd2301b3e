"""Figures of the tasks on a small model that has learned three classes in three modalities."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from thinned import only

from mm.data.batching.collate import to_batch
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.decoders.generate import Generator, generate, save_media
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS, TASKS
from mm.specs import Encoded, ModalityTokenizer, Segment, TokenSpec, Waveform
from mm.tasks.base import first_class
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import extend_vocabulary

WORDS = ("rows", "columns", "checks")
RATE, FRAME = 16000, 800
TONES = np.array([300, 450, 700, 1000, 1500, 2200, 3200, 4600])  # Hz


class Palette(ModalityTokenizer):
    """16 x 16 gray images as a 4 x 4 grid of 4 levels."""

    spec = TokenSpec("image", 4, grid=(4, 4), fingerprint="palette")

    def encode(self, raws):
        cells = [np.asarray(raw)[..., 0].reshape(4, 4, 4, 4).mean((1, 3)) for raw in raws]
        return [Encoded((c / 64).astype(np.int32).clip(0, 3).ravel()) for c in cells]

    def decode(self, codes):
        grids = [np.asarray(c.ids).reshape(4, 4) * 64 + 32 for c in codes]
        return [
            np.repeat(g.repeat(4, 0).repeat(4, 1)[..., None], 3, 2).astype(np.uint8) for g in grids
        ]

    def save(self, folder):
        raise NotImplementedError

    load = save


class Tones(Palette):
    """Frames of 50 ms as (pitch, loudness): two codebooks."""

    spec = TokenSpec("audio", 8, n_codebooks=2, tokens_per_second=40, fingerprint="tones")

    def encode(self, raws):
        out = []
        for raw in raws:
            frames = np.asarray(raw.samples)[: len(raw.samples) // FRAME * FRAME].reshape(-1, FRAME)
            t = np.arange(FRAME) / RATE
            power = np.abs(frames @ np.exp(-2j * np.pi * TONES[:, None] * t).T)
            loud = (np.sqrt((frames**2).mean(1)) * 11).astype(int).clip(0, 7)
            out.append(Encoded(np.stack([power.argmax(1), 8 + loud], 1).ravel().astype(np.int32)))
        return out

    def decode(self, codes):
        t = np.arange(FRAME) / RATE
        pairs = [np.asarray(c.ids).reshape(-1, 2) for c in codes]
        wave = [
            [(q - 7.5) / 8 * np.sin(2 * np.pi * TONES[p] * t) for p, q in pair] for pair in pairs
        ]
        return [Waveform(np.concatenate(w).astype(np.float32), RATE) for w in wave]


def make_image(label: int, rng) -> np.ndarray:
    y, x = np.mgrid[:4, :4]
    on = (y % 2, x % 2, (x + y) % 2)[label]
    cells = on * 170 + 40 + rng.integers(-30, 30, (4, 4))
    return np.repeat(cells.repeat(4, 0).repeat(4, 1)[..., None], 3, 2).astype(np.uint8)


def make_audio(label: int, rng) -> Waveform:
    pitch = TONES[np.clip(3 * label + rng.integers(0, 2, rng.integers(3, 6)), 0, 7)]
    t = np.arange(FRAME) / RATE
    tones = [(0.2 + 0.5 * rng.random()) * np.sin(2 * np.pi * f * t) for f in pitch]
    return Waveform(np.concatenate(tones).astype(np.float32), RATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Packed shards of 240 / 30 / 45 triples (image, audio, caption with its label)."""
    root, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    rows = []
    for split, n in (("train", 240), ("val", 30), ("test", 45)):
        for i in range(n):
            key = f"{split}-{i:03d}"
            save_media(make_image(i % 3, rng), root / "source" / f"{key}.png")
            save_media(make_audio(i % 3, rng), root / "source" / f"{key}.wav")
            rows.append({
                "key": key, "image": f"{key}.png", "audio": f"{key}.wav", "split": split,
                "text": f"{'some ' * (i % 2)}{WORDS[i % 3]}", "label": WORDS[i % 3],
            })  # fmt: skip
    manifest = root / "source" / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    pack(manifest, root / "packed", progress=False)
    return root / "packed"


@pytest.fixture(scope="module")
def generator(data):
    """A two-layer model after some seconds of training on all six directions."""
    tokenizers = {
        "text": BytesConfig(modality="text").build(),
        "image": Palette(),
        "audio": Tones(),
    }
    vocabulary = extend_vocabulary([t.spec for t in tokenizers.values()])
    torch.manual_seed(0)
    backbone = {"kind": "stack", "depth": 2}
    model = NETWORKS.parse({"kind": "lm", "d_model": 48, "backbone": backbone}).build(vocabulary)
    init_weights(model)
    generator = Generator(model, vocabulary, tokenizers)
    shards = ShardSet.open(data, split="train")
    samples = [shards[i].values for i in range(len(shards))]
    ids = {m: generator.encode(m, [s[m] for s in samples]) for m in tokenizers}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    rng, steps = np.random.default_rng(0), 220
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        documents = []
        for i in rng.integers(len(samples), size=24):
            a, b = rng.choice(list(tokenizers), 2, replace=False)
            given = Segment(a, None if rng.random() < 0.15 else ids[a][i], role="condition")
            documents.append(
                [[given] * (rng.random() < 0.9 or b != "text") + [Segment(b, ids[b][i])]]
            )
        b = to_batch(documents, vocabulary)
        loss = model(b).heads["tokens"].nll.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return generator


def parse(**values):
    return TASKS.parse(values).build()


@pytest.mark.parametrize("source", only(["image", "audio"], "image"))
def test_recognition_of_what_was_learned(generator, data, source):
    task = parse(kind="recognition", data=data, sources=(source,), linear_probe=source == "image")
    figures = task.evaluate(generator)
    name = f"{source}_to_text"
    assert figures[f"{name}_chance"] == pytest.approx(1 / 3)
    assert figures[f"{name}_n"] == 45
    assert figures[f"{name}_accuracy"] > 0.9
    table = np.array(figures[f"{name}_confusion"])
    assert table.shape == (3, 4) and table.sum() == 45
    assert np.trace(table) / 45 == pytest.approx(figures[f"{name}_accuracy"])
    if source == "image":
        assert figures["image_to_text_linear_probe_accuracy"] > 0.9
    assert json.dumps(figures)


@pytest.mark.parametrize(
    "source, to", [("text", "image"), ("text", "audio"), ("image", "audio"), ("audio", "image")]
)
def test_judged_generation_of_what_was_learned(generator, data, source, to):
    task = parse(
        kind="judged_generation", data=data, sources=(source,), to=to,
        settings=[{"temperature": 0.7, "cfg_scale": 2.0}], max_tokens=12 if to == "audio" else None,
    )  # fmt: skip
    figures = task.evaluate(generator, seed=1)
    name = f"{source}_to_{to}"
    assert figures[f"{name}_chance"] == pytest.approx(1 / 3)
    assert figures[f"{name}_judge_on_real_accuracy"] > 0.95
    assert figures[f"{name}_judge_on_reconstruction_accuracy"] > 0.9
    assert figures[f"{name}_accuracy"] > 0.8
    assert task.evaluate(generator, seed=1) == figures
    assert json.dumps(figures)


def test_figures_of_an_untrained_model_are_near_chance(generator, data):
    torch.manual_seed(1)
    model = generator.model.config.build(generator.vocabulary)
    init_weights(model)
    untrained = Generator(model, generator.vocabulary, generator.tokenizers)
    recognised = parse(kind="recognition", data=data).evaluate(untrained)
    assert recognised["image_to_text_accuracy"] < 0.2
    drawn = parse(kind="judged_generation", data=data).evaluate(untrained)
    assert drawn["text_to_image_accuracy"] < 0.7
    figures = parse(kind="bits_per_byte", data=data).evaluate(untrained)
    for m in ("text", "image", "audio"):
        assert figures[f"{m}_bits_per_byte"] > figures[f"{m}_bits_per_byte_chance"]


def test_settings_are_chosen_on_the_validation_split_only(generator, data):
    grid = [{"temperature": 50.0}, {"temperature": 0.5}]
    figures = parse(
        kind="judged_generation", data=data, settings=grid, reconstruction=False
    ).evaluate(generator)
    assert figures["text_to_image_settings"]["temperature"] == 0.5
    tried = figures["text_to_image_tried_on_val"]
    assert [t["temperature"] for t in tried] == [50.0, 0.5]
    assert tried[0]["accuracy"] < tried[1]["accuracy"]
    for kind in ("judged_generation", "recognition"):
        with pytest.raises(UserError, match="no split 'held_in'"):
            parse(kind=kind, data=data, settings=grid, val_split="held_in").evaluate(generator)


def test_bits_per_byte_of_what_was_learned(generator, data):
    figures = parse(kind="bits_per_byte", data=data, given={"image": "text"}).evaluate(generator)
    for m, n_bytes in (("image", 45 * 16 * 16 * 3), ("audio", None), ("text", None)):
        assert 0 < figures[f"{m}_bits_per_byte"] < 0.8 * figures[f"{m}_bits_per_byte_chance"]
        assert figures[f"{m}_n"] == 45
        assert n_bytes is None or figures[f"{m}_bytes"] == n_bytes
    assert figures["image_tokens"] == 45 * 17
    total = (
        figures["text_nats_per_token"]
        * figures["text_tokens"]
        / math.log(2)
        / figures["text_bytes"]
    )
    assert figures["text_bits_per_byte"] == pytest.approx(total)
    blind = parse(kind="bits_per_byte", data=data, modalities=("image",)).evaluate(generator)
    assert (
        figures["image_bits_per_byte"] < blind["image_bits_per_byte"]
    )  # the caption tells something


def test_missing_modality_and_missing_classes_are_named(generator, data):
    with pytest.raises(
        UserError, match="unknown modality 'smell'; known: array, audio, image, text"
    ):
        parse(kind="bits_per_byte", data=data, modalities=("smell",)).evaluate(generator)
    with pytest.raises(UserError, match="a column 'genre'"):
        parse(kind="recognition", data=data, label="genre").evaluate(generator)
    by_caption = parse(kind="recognition", data=data, label="genre", classes=WORDS).evaluate(
        generator
    )
    assert by_caption["image_to_text_n"] == 45


def test_raw_generation_takes_prompts_of_all_kinds(generator):
    rng = np.random.default_rng(5)
    image, audio = make_image(1, rng), make_audio(1, rng)
    words = generator.generate([{"image": image}, {"audio": audio}], "text", temperature=0)
    assert all(first_class(w.decode(), WORDS) == "columns" for w in words)
    (drawn,) = generator.generate([{}], "image", seed=3)
    assert drawn.shape == (16, 16, 3) and drawn.dtype == np.uint8
    (continued,) = generator.generate([{"text": "colum"}], "text", temperature=0, max_tokens=10)
    assert continued == b"columns"
    assert generate(generator, {"image": image}, to="text", temperature=0) == words[0]
    assert len(generate(generator, [{}, {}], to="audio", max_tokens=6)) == 2
    with pytest.raises(UserError, match="must be a list"):
        generator.generate({"text": "rows"}, "image")
    with pytest.raises(UserError, match="no modality 'vidio'"):
        generator.generate([{"vidio": 1}], "text")
