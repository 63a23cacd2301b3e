"""Continuous values from files to the model: packed, streamed, laid out, read alone and packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import png, wav
from PIL import Image

from mm.batch import Values
from mm.data.batching.borders import document_length
from mm.data.batching.collate import to_batch
from mm.data.batching.document import document_tokens, of_array
from mm.data.modalities.base import get_modality
from mm.data.pack.job import pack
from mm.data.shards.reader import ShardSet
from mm.data.shards.token_codec import encode_tokens
from mm.data.shards.verify import verify
from mm.data.transforms.chunk import ChunkConfig
from mm.decoders.generate import Generator, generate_tokens
from mm.errors import UserError
from mm.model.adapters.patches import PatchesAdapterConfig
from mm.model.layer import init_weights
from mm.registry import ADAPTERS, NETWORKS, STREAMS
from mm.specs import Segment, TokenSpec, Waveform
from mm.tokenizers.array.patches import ArrayPatchesConfig
from mm.tokenizers.audio.mel_frames import MelFramesConfig
from mm.tokenizers.image.patches import ImagePatchesConfig
from mm.tokenizers.text.bytes import BytesConfig
from mm.vocabulary import Vocabulary

SHAPES = ((8, 8), (8, 16), (12, 8), (4, 4))
TASKS = {"kind": "any_to_any", "tasks": {"image>text": 1.0, "audio>text": 1.0}}
MODEL = {
    "kind": "lm",
    "d_model": 16,
    "mask": "prefix",
    "adapters": {
        "image": {"kind": "patches", "patch": 4, "width": 4},
        "audio": {"kind": "mel", "n_mels": 8, "stack": 2, "width": 4},
    },
    "backbone": {"kind": "stack", "depth": 2, "pattern": "attention"},
}


def tokenizers() -> dict[str, Any]:
    mel = MelFramesConfig(sample_rate=8000, n_mels=8, n_fft=128, hop=40, stack=2)
    return {
        "text": BytesConfig(modality="text").build(),
        "image": ImagePatchesConfig(patch=4, max_patches=16).build(),
        "audio": mel.build(),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of pictures of four shapes and recordings of three lengths, with captions."""
    source = tmp_path_factory.mktemp("values") / "source"
    source.mkdir()
    for i in range(12):
        if i % 3:
            pixels = np.random.default_rng(i).integers(0, 256, (*SHAPES[i % 4], 3), np.uint8)
            Image.fromarray(pixels).save(source / f"{i:02d}.png")
        else:
            (source / f"{i:02d}.wav").write_bytes(wav(i, 400 + 160 * i))
        (source / f"{i:02d}.txt").write_text(f"{i} " * (1 + i % 4))
    out = source.parent / "tokens"
    pack(source, out, tokenizers=tokenizers(), progress=False)
    return out


@pytest.fixture(scope="module")
def model(root: Path) -> torch.nn.Module:
    module = NETWORKS.parse(MODEL).build(ShardSet.open(root).vocabulary).double()
    torch.manual_seed(0)
    init_weights(module)
    return module.eval()


def stream(root: Path, kind: str = "packed", **more: Any) -> Any:
    sizes = {"seq_len": 96, "max_documents": 8} if kind == "packed" else {}
    given = {"kind": kind, "batch_size": 2, "prefetch": 0, "transform": [TASKS], **sizes, **more}
    source = {"path": str(root)}
    given |= {"sources": [source]} if kind == "packed" else {"source": source}
    return STREAMS.parse(given).build()


def test_shards_hold_what_the_tokenizer_gave(root: Path, tmp_path: Path) -> None:
    shards, made = ShardSet.open(root), tokenizers()
    spec = shards.vocabulary.spec("image")
    assert spec.continuous and spec.n_ids == 0 and spec.n_features == 48
    assert shards.vocabulary.size == 16 + (256 + 2) + 2 + 2
    for i in range(len(shards)):
        for modality, code in shards.read_encoded(i).items():
            file = root.parent / "source" / shards.key(i)
            if modality == "image":
                pixels = np.asarray(Image.open(file.with_suffix(".png")))
                assert np.array_equal(made["image"].decode([code])[0], pixels)
                assert shards.lengths("image")[i] == pixels.size // 48
            elif modality == "audio":
                raw = get_modality("audio").decode(file.with_suffix(".wav").read_bytes())
                assert np.array_equal(made["audio"].encode([raw])[0].values, code.values)
    assert verify(root)["ok"]


def test_a_document_keeps_places_without_ids(root: Path) -> None:
    shards = ShardSet.open(root)
    i = int(shards.having("image")[1])
    segments = [of_array(shards.vocabulary.spec(m), a) for m, a in shards.tokens(i).items()]
    segments.sort(key=lambda s: s.values is None)
    tokens = document_tokens(segments, shards.vocabulary)
    (item,) = tokens.features
    span = shards.vocabulary.range("image")
    n = len(item.data)
    assert tokens.ids[[0, 1 + n]].tolist() == [span.begin, span.end] and item.start == 1
    assert (tokens.ids[1 : 1 + n] == -1).all() and (tokens.modality[: n + 2] == span.index).all()
    assert not tokens.weights[: n + 1].any() and len(tokens.ids) == document_length(segments)
    cut = tokens.part(3, len(tokens.ids))
    assert np.array_equal(cut.features[0].data, item.data[2:]) and cut.features[0].start == 0
    assert cut.features[0].grid == () and tokens.part(n + 1, n + 3).features == ()


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
def test_streams_carry_values_and_resume(root: Path, kind: str) -> None:
    one = stream(root, kind)
    shards = ShardSet.open(root)
    stored = {m: [shards.tokens(i).get(m) for i in range(len(shards))] for m in ("image", "audio")}
    seen, state = [], None
    for step in range(6):
        if step == 3:
            state = one.state_dict()
        (batch,) = one.next()
        seen.append(batch)
        for modality, values in batch.values.items():
            for row in range(len(values.data)):
                n, first = int(values.length[row]), int(values.place[row])
                found = values.data[row, :n].numpy()
                flat = [a.reshape(-1, a.shape[-1]) for a in stored[modality] if a is not None]
                assert any(np.array_equal(found, a) for a in flat)
                assert (batch.ids.flatten()[first : first + n] == -1).all()
                rows, columns = values.grid[row]
                cells = batch.layout.fields.position.flatten(0, 1)[first : first + n]
                if modality == "image":
                    down = cells[:, 1] - cells[0, 1]
                    assert down.tolist() == np.repeat(np.arange(rows), columns).tolist()
    assert {m for batch in seen for m in batch.values} == {"image", "audio"}
    other = stream(root, kind)
    other.load_state_dict(state)
    for batch in seen[3:]:
        (again,) = other.next()
        assert torch.equal(again.ids, batch.ids) and again.keys == batch.keys
        for modality, values in batch.values.items():
            assert torch.equal(again.values[modality].data, values.data)


def test_packed_equals_alone(root: Path, model: Any) -> None:
    """Values of one document touch no other, whatever their shapes."""
    shards = ShardSet.open(root)
    documents = []
    for i in range(6):
        found = shards.tokens(i).items()
        segments = [of_array(shards.vocabulary.spec(m), a) for m, a in found]
        documents.append(sorted(segments, key=lambda s: s.values is None))
    together = to_batch([documents[:3], documents[3:]], shards.vocabulary)
    hidden = model(together).hidden.flatten(0, 1)
    for number, document in enumerate(documents, 1):
        alone = model(to_batch([[document]], shards.vocabulary)).hidden[0]
        mine = hidden[together.layout.fields.document.flatten() == number]
        torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [*ADAPTERS])
def test_an_item_is_read_as_if_it_were_alone(kind: str) -> None:
    """The law over adapters: neither its neighbours nor what fills it up is seen."""
    config = ADAPTERS.get(kind).smallest()
    adapter = config.build(8).double()
    torch.manual_seed(1)
    init_weights(adapter)
    shapes = [(2, 3), (4, 1), (1, 5), (1, 1)]
    L, g = 6, torch.Generator().manual_seed(2)
    lengths = torch.tensor([r * c for r, c in shapes], dtype=torch.int32)
    width = adapter.zero_item(torch.device("cpu")).shape[-1]
    assert width == config.d_in
    data = torch.randn(4, L, width, generator=g, dtype=torch.float64)  # noise after the end, too
    values = Values(data, lengths, lengths, lengths, tuple(shapes))
    together = adapter(values, None)
    for i, (shape, n) in enumerate(zip(shapes, lengths.tolist(), strict=True)):
        own = lengths[i : i + 1]
        one = adapter(Values(data[i : i + 1, :n], own, own, own, (shape,)), None)
        torch.testing.assert_close(together.x[i, :n], one.x[0, :n])
        assert int(together.length[i]) == int(one.length[0])


def test_augmented_pictures_keep_their_length_and_what_they_show(root: Path) -> None:
    moved = stream(root, transform=[{"kind": "augment_image", "shift": 0, "mirror": 1.0}, TASKS])
    shards = ShardSet.open(root)
    tokenizer, pictures = tokenizers()["image"], []
    for i in shards.having("image"):
        pictures.append(tokenizer.decode([shards.read_encoded(int(i))["image"]])[0])
    found = 0
    for _ in range(4):
        (batch,) = moved.next()
        for modality, values in batch.values.items():
            for row in range(len(values.data) if modality == "image" else 0):
                rows, columns = values.grid[row]
                parts = values.data[row, : rows * columns].numpy().reshape(rows, columns, -1)
                mirrored = tokenizer._image(parts)[:, ::-1]
                found += any(np.array_equal(mirrored, p) for p in pictures)
    assert found > 5


def test_a_model_writes_after_what_it_reads(root: Path, model: Any) -> None:
    made, vocabulary = tokenizers(), ShardSet.open(root).vocabulary
    generator = Generator(model, vocabulary, made)
    pictures = [np.full((8, 8, 3), level, np.uint8) for level in (0, 90, 0)]
    spans = generator.generate([{"image": p} for p in pictures], "text", temperature=0)
    assert spans[0] == spans[2] and len(spans) == 3
    (code,) = made["image"].encode([pictures[1]])
    segment = of_array(vocabulary.spec("image"), code.values)
    # Step by step with a State is what one whole pass says: greedy, token after token.
    ids = generate_tokens(
        model, vocabulary, [[segment]], "text", temperature=0, cfg_scale=1.0, max_tokens=5
    )[0]
    span = vocabulary.range("text")
    for n in range(len(ids)):
        document = [segment, Segment("text", ids[:n])]
        batch = to_batch([[document]], vocabulary)
        out = model(batch, loss=False).heads["tokens"].dist.logits
        at = len(segment.ids) + 2 + n
        logits = out.view(-1, out.shape[-1])[-1 if len(out) == 1 else _row(batch, at)]
        allowed = torch.cat((logits[span.first : span.stop], logits[span.end : span.end + 1]))
        assert int(allowed.argmax()) == int(ids[n])


def _row(batch: Any, at: int) -> int:
    places = batch.places["tokens"].tolist()
    return places.index(at)


def test_what_does_not_fit_is_refused_by_name(root: Path, model: Any, tmp_path: Path) -> None:
    vocabulary = ShardSet.open(root).vocabulary
    adapters = MODEL["adapters"]
    parse = lambda given: NETWORKS.parse({**MODEL, "adapters": given}).build(vocabulary)
    with pytest.raises(UserError, match=r"model.adapters has none for 'audio'.*d_in: 16"):
        parse({"image": adapters["image"]})
    with pytest.raises(UserError, match=r"model.adapters.image reads 3 .* the data have 48"):
        parse({**adapters, "image": {"kind": "linear", "d_in": 3}})
    asked = stream(root, transform=[{"kind": "any_to_any", "tasks": {"text>image": 1.0}}])
    with pytest.raises(UserError, match=r"'image' is predicted \(values\).*add model.heads.image"):
        asked.require_heads({"tokens": None})
    generator = Generator(model, vocabulary, tokenizers())
    with pytest.raises(UserError, match=r"'image' is values, not ids.*are written of: text"):
        generator.generate([{"text": "x"}], "image")
    with pytest.raises(ValueError, match="values .* at 3 places"):
        document_tokens(
            [Segment("image", np.full(3, -1), np.zeros((2, 48)), role="condition")], vocabulary
        )
    with pytest.raises(UserError, match="expected a finite Waveform"):
        tokenizers()["audio"].encode([Waveform(np.array([np.nan], np.float32), 8000)])
    assert png() and encode_tokens(np.zeros(1))[:6] == b"\x93NUMPY"


@pytest.mark.parametrize("bad", ["ids", "features", "type", "not finite"])
def test_shards_that_lie_about_values_are_found(root: Path, tmp_path: Path, bad: str) -> None:
    class Lying(type(tokenizers()["image"])):  # type: ignore[misc]
        def encode(self, raws: Any) -> Any:
            codes = super().encode(raws)
            change = {
                "features": lambda v: v[..., :-1],
                "type": lambda v: v.astype(np.float64),
                "not finite": lambda v: np.where(v > 0, np.nan, v).astype(np.float32),
                "ids": lambda v: v.reshape(-1).astype(np.int32),
            }[bad]
            return [c._replace(values=change(c.values)) for c in codes]

    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png())
    lying = Lying(tokenizers()["image"].config)
    with pytest.raises(ValueError, match="tokenizer 'image' gave"):
        pack(source, tmp_path / "out", tokenizers={"image": lying}, progress=False)


def test_a_window_of_a_recording_takes_its_values(root: Path) -> None:
    shards = ShardSet.open(root)
    i = int(shards.having("audio")[2])
    whole = of_array(shards.vocabulary.spec("audio"), shards.tokens(i)["audio"])
    chunk = ChunkConfig(modality="audio", tokens=3, window="first").build()
    (cut,) = chunk([whole], np.random.default_rng(0))
    assert len(cut.ids) == 3 and np.array_equal(cut.values, whole.values[:3])


def test_an_old_vocabulary_reads_as_it_did() -> None:
    """A spec of ids says nothing of features, so its hash is what it was."""
    words = Vocabulary().add(TokenSpec("text", 4, fingerprint="x"))
    assert "n_features" not in words.to_json()
    values = words.add(TokenSpec("image", 0, continuous=True, n_features=3, fingerprint="y"))
    assert Vocabulary.from_json(values.to_json()) == values
    with pytest.raises(UserError, match="either ids"):
        Vocabulary.from_json(values.to_json().replace('"vocab_size": 0', '"vocab_size": 5'))


def test_convolutions_read_an_array_of_any_channels() -> None:
    """The adapter `patches` over patches of two channels: its own convolution over the array."""
    x = np.random.default_rng(4).normal(0, 1, (4, 6, 2)).astype(np.float32)
    tokenizer = ArrayPatchesConfig(patch=(2, 2), channels=2, normalise="none").build()
    values = tokenizer.encode([x])[0].values
    config = PatchesAdapterConfig(patch=2, width=4, channels=2)
    assert config.d_in == tokenizer.spec.n_features == 8
    adapter: Any = config.build(5)
    adapter.init_weights()
    flat = torch.from_numpy(values.reshape(1, 6, 8))
    given = replace(Values.items(flat), grid=((2, 3),))
    found = adapter(given, None).x
    by_hand = adapter.stages[0].down(torch.from_numpy(x).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, adapter.out(by_hand.flatten(2).transpose(1, 2)))
