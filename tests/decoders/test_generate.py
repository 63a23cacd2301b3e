"""Generation: rules on hand cases, cached decoding against full forwards, guidance, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from generation_toys import VOCABULARY, session

from mm.cli.generate import generate as command
from mm.decoders import rules
from mm.decoders.generate import (
    Generator,
    generate,
    generate_tokens,
    save_media,
    sequence_nll,
    stream_tokens,
)
from mm.decoders.prompts import Stream, batch
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import NETWORKS
from mm.specs import Segment, TokenSpec, Waveform
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.checkpoint.save import Moment, save
from mm.vocabulary import Vocabulary, extend_vocabulary

PATTERNS = {"attention": "attention", "window": "near", "hybrid": "rg_lru attention"}
NEAR = {"kind": "attention", "window": 4}  # shorter than the prompts


def tiny(
    pattern: str = "attention", seed: int = 0, vocabulary: Vocabulary = VOCABULARY
) -> torch.nn.Module:
    """A random model in float64: sampling must not hang on rounding."""
    torch.manual_seed(seed)
    backbone = {"kind": "stack", "depth": 2, "pattern": PATTERNS[pattern], "mixers": {"near": NEAR}}
    model = NETWORKS.parse({"kind": "lm", "d_model": 32, "backbone": backbone}).build(vocabulary)
    init_weights(model)
    with (
        torch.no_grad()
    ):  # sharper than at initialisation, so that greedy paths differ between prompts
        for parameter in model.parameters():
            parameter.mul_(1.7)
    return model.double().eval()


@pytest.fixture(scope="module", params=list(PATTERNS))
def model(request):
    return tiny(request.param)


def text(*ids: int, role: str = "condition") -> Segment:
    return Segment("text", np.array(ids), role=role)


IMAGE = Segment("image", np.array([1, 2, 3, 4, 5, 6]), role="condition")
AUDIO = Segment("audio", np.array([0, 5, 4, 9]), role="condition")
PROMPTS = [[text(3, 4)], [IMAGE], [AUDIO, text(7, 8, 9, 10, 11)], [], [text(1)], [text(3, 4)]]


def stream_of(segments: list[Segment], to: str) -> list[int]:
    """The convention, written out a second time."""
    out = []
    for s in segments:
        r = VOCABULARY.range(s.modality)
        out += [r.begin, *(int(i) + r.first for i in s.ids), r.end]
    return [*(out or [1]), VOCABULARY.range(to).begin]


def full_logits(model, stream: list[int]) -> torch.Tensor:
    """Logits after a stream by one forward without any state."""
    b = batch([Stream(np.array(stream, np.int32)[:, None])], VOCABULARY)
    return model(b, heads=("tokens",), loss=False).heads["tokens"].dist.logits.detach().double()


def uncached(model, prompt, to: str, limit: int, scale: float = 1.0) -> list[int]:
    """Greedy generation that runs the whole sequence again for every token."""
    r = VOCABULARY.range(to)
    stream, null = stream_of(prompt, to), [1] * max(1, len(prompt)) + [r.begin]
    ids: list[int] = []
    while True:
        logits = full_logits(model, stream + ids)
        if scale != 1:
            empty = full_logits(model, null + ids)
            logits = empty + scale * (logits - empty)
        logits = rules.span_grammar(logits, session(to, len(ids), limit=limit))
        best = int(logits.argmax())
        if best == r.end:
            return [i - r.first for i in ids]
        ids.append(best)


@pytest.mark.parametrize("to, limit", [("text", 9), ("image", 6), ("audio", 6)])
def test_cached_equals_uncached(model, to, limit):
    length = None if to == "image" else limit
    spans = generate_tokens(model, VOCABULARY, PROMPTS, to, temperature=0, max_tokens=length)
    assert [s.tolist() for s in spans] == [uncached(model, p, to, limit) for p in PROMPTS]
    assert len({tuple(s) for s in map(tuple, spans)}) > 1  # the prompts matter
    assert all(s.dtype == np.int32 for s in spans)


def test_guidance_is_uncond_plus_scale_times_difference(model):
    spans = generate_tokens(
        model, VOCABULARY, PROMPTS, "text", temperature=0, max_tokens=8, cfg_scale=2.5
    )
    assert [s.tolist() for s in spans] == [uncached(model, p, "text", 8, 2.5) for p in PROMPTS]
    plain = generate_tokens(model, VOCABULARY, PROMPTS, "text", temperature=0, max_tokens=8)
    assert any(not np.array_equal(a, b) for a, b in zip(spans, plain, strict=True))


def test_guidance_of_scale_one_is_no_guidance(model):
    one, none = (
        generate_tokens(model, VOCABULARY, PROMPTS, "audio", max_tokens=8, seed=5, **kw)
        for kw in ({"cfg_scale": 1.0}, {})
    )
    nearly = generate_tokens(
        model, VOCABULARY, PROMPTS, "audio", max_tokens=8, seed=5, cfg_scale=1 + 1e-9
    )
    for a, b, c in zip(one, none, nearly, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_a_sequence_does_not_depend_on_its_batch(model):
    together = generate_tokens(
        model, VOCABULARY, PROMPTS, "text", max_tokens=20, seed=7, cfg_scale=1.5
    )
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate_tokens(
            model, VOCABULARY, [prompt], "text", max_tokens=20, seed=7, cfg_scale=1.5, indices=[i]
        )
        assert np.array_equal(alone, together[i])
    in_twos = generate_tokens(
        model, VOCABULARY, PROMPTS, "text", max_tokens=20, seed=7, cfg_scale=1.5, max_slots=2
    )
    assert all(np.array_equal(a, b) for a, b in zip(together, in_twos, strict=True))
    assert not np.array_equal(together[0], together[5])  # one prompt twice: two samples
    other = generate_tokens(
        model, VOCABULARY, PROMPTS, "text", max_tokens=20, seed=8, cfg_scale=1.5
    )
    assert any(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))


def test_dropping_finished_sequences_changes_nothing(model):
    prompts = PROMPTS * 3
    runs = [
        generate_tokens(
            model,
            VOCABULARY,
            prompts,
            "text",
            max_tokens=30,
            seed=1,
            decoder={"kind": "ar", "drop_share": share},
        )
        for share in (0.01, 0.5, 1.0)
    ]
    lengths = {len(s) for s in runs[0]}
    assert len(lengths) > 3  # they do end at different steps
    for other in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_inside_a_span_the_probability_of_everything_else_is_exactly_zero():
    model, seen = tiny(), []

    def spy(logits, session):
        seen.append(torch.softmax(logits, -1))
        return logits

    with torch.no_grad():  # a model that would rather leave the span
        for to in ("text", "image", "audio"):
            r = VOCABULARY.range(to)
            seen.clear()
            ids = torch.stack(
                list(
                    stream_tokens(
                        model,
                        VOCABULARY,
                        PROMPTS,
                        to,
                        max_tokens=None if to == "image" else 8,
                        temperature=5.0,
                        rules=[spy],
                    )
                ),
                1,
            )
            outside = [
                i for i in range(seen[0].shape[1]) if not (r.first <= i < r.stop or i == r.end)
            ]
            assert len(outside) >= 30
            assert all((p[:, outside] == 0).all() for p in seen)
            assert all(torch.allclose(p.sum(-1), torch.ones(len(p), dtype=p.dtype)) for p in seen)
            assert (((ids >= r.first) & (ids < r.stop)) | (ids == r.end) | (ids == -1)).all()


def test_spans_have_the_lengths_that_the_grammar_allows():
    model = tiny()
    generate = lambda to, **kw: generate_tokens(
        model, VOCABULARY, PROMPTS, to, temperature=3.0, **kw
    )
    assert all(1 <= len(s) <= 7 for s in generate("text", max_tokens=7))
    assert all(len(s) == 6 for s in generate("image"))
    for span in generate("audio", max_tokens=7):
        assert len(span) in (2, 4, 6)
        assert (span // 5 == np.arange(len(span)) % 2).all()
    for span in generate("deep"):
        assert len(span) == 6 and (span // 4 == np.arange(6) % 3).all()


def test_continuation_goes_on_in_the_same_span(model):
    (whole,) = generate_tokens(model, VOCABULARY, [[IMAGE]], "text", temperature=0, max_tokens=9)
    assert len(whole) >= 3
    begun = [[IMAGE, text(*whole[:2], role="target")]]
    (again,) = generate_tokens(model, VOCABULARY, begun, "text", temperature=0, max_tokens=7)
    assert np.array_equal(whole, again)
    (image,) = generate_tokens(
        model, VOCABULARY, [[Segment("image", np.array([5, 1]))]], "image", temperature=0
    )
    assert image[:2].tolist() == [5, 1] and len(image) == 6


@pytest.mark.parametrize(
    "prompt, to, message",
    [
        (
            [Segment("image", np.arange(4), role="condition")],
            "text",
            "image span is unfinished: it has 4 ids and needs 6",
        ),
        (
            [Segment("image", np.arange(4))],
            "text",
            "image span is unfinished: it has 4 ids and needs 6",
        ),
        ([Segment("image", np.arange(6))], "image", "image span is complete"),
        (
            [Segment("audio", np.array([0, 5, 1]), role="condition")],
            "text",
            "3 ids and needs a multiple of 2",
        ),
        (
            [Segment("audio", np.array([5, 0]), role="condition")],
            "text",
            "codebooks are out of order",
        ),
        ([text()], "image", "text span is empty"),
        ([text(20)], "image", "ids must be in 0..19"),
        ([text(1)], "imag", "did you mean 'image'"),
    ],
)
def test_impossible_prompts_are_named(prompt, to, message):
    with pytest.raises(UserError, match=message):
        generate_tokens(tiny(), VOCABULARY, [[text(1)], prompt], to)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 3, "to": "image"}, "always has 6 ids"),
        ({"max_tokens": 1, "to": "audio"}, "one frame"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        generate_tokens(tiny(), VOCABULARY, [[text(1)]], **{"to": "text", **settings})


def test_damaged_weights_are_named_with_the_step():
    model = tiny()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="step 0.*not finite"):
        generate_tokens(model, VOCABULARY, [[text(1)]], "text")


def test_nll_is_the_log_probability_of_each_target(model):
    documents = [
        [text(3, 4), IMAGE._replace(role="target")],
        [text(5, 6, 7, role="target")],
        [AUDIO, IMAGE, text(1, role="target")],
    ]
    scores = sequence_nll(model, VOCABULARY, documents)
    assert [sorted(s) for s in scores] == [["image"], ["text"], ["text"]]
    assert [s[m][1] for s, m in zip(scores, ("image", "text", "text"), strict=True)] == [7, 4, 2]
    for document, score in zip(documents, scores, strict=True):
        (modality,) = score
        r = VOCABULARY.range(modality)
        prefix = stream_of(document[:-1], modality) if len(document) > 1 else [r.begin]
        total = 0.0
        for target in [*(int(i) + r.first for i in document[-1].ids), r.end]:
            total -= float(torch.log_softmax(full_logits(model, prefix)[0], -1)[target])
            prefix.append(target)
        assert score[modality][0] == pytest.approx(total, rel=1e-9)
    one_by_one = sequence_nll(model, VOCABULARY, documents, max_places=1)
    for a, b in zip(scores, one_by_one, strict=True):
        assert next(iter(a.values()))[0] == pytest.approx(next(iter(b.values()))[0], rel=1e-9)


def test_saved_files_hold_what_was_generated(tmp_path):
    import soundfile
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = save_media(picture, tmp_path / "new" / "a")
    assert file.name == "a.png" and np.array_equal(np.asarray(Image.open(file)), picture)
    wave = Waveform(np.array([0.0, 0.5, -0.5, 3.0], np.float32), 8000)
    samples, rate = soundfile.read(save_media(wave, tmp_path / "a.wav"))
    assert rate == 8000 and np.allclose(samples, [0, 0.5, -0.5, 1.0], atol=1e-4)
    assert save_media("zw\u00f6lf", tmp_path / "a").read_text(encoding="utf-8") == "zw\u00f6lf"
    assert save_media(b"\xff\x00", tmp_path / "b.txt").read_bytes() == b"\xff\x00"
    with pytest.raises(UserError, match="dict"):
        save_media({}, tmp_path / "c")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model of bytes with its tokenizer beside it."""
    root = tmp_path_factory.mktemp("saved")
    BytesConfig(modality="text").build().save(root / "tokenizer")
    vocabulary = extend_vocabulary([load_tokenizer(root / "tokenizer").spec])
    model = tiny("hybrid", vocabulary=vocabulary).float()
    model.save_pretrained(
        root / "run" / "model", vocabulary=vocabulary, tokenizers={"text": root / "tokenizer"}
    )
    return root, model, vocabulary


def test_from_pretrained_takes_a_saved_model_and_its_run_folder(saved):
    root, model, vocabulary = saved
    here = Generator(model, vocabulary, {"text": load_tokenizer(root / "tokenizer")})
    expected = here.generate([{"text": "ab"}], "text", seed=3, max_tokens=12)
    assert len(expected[0]) > 2 and expected[0].startswith(b"ab")
    for folder in (root / "run", root / "run" / "model"):
        assert generate(folder, "ab", to="text", seed=3, max_tokens=12) == expected[0]


def test_from_pretrained_takes_the_newest_good_checkpoint_of_a_run_without_model(saved, tmp_path):
    root, model, vocabulary = saved
    vocabulary.save(tmp_path / "vocabulary.json")
    config = {
        "model": model.config.to_dict(), "vocabulary": str(tmp_path / "vocabulary.json"),
        "tokenizers": {"text": str(root / "tokenizer")},
    }  # fmt: skip
    run = tmp_path / "run"
    other = tiny("hybrid", seed=9, vocabulary=vocabulary).float()
    for step, network in ((5, other), (10, model), (15, other)):
        moment = Moment.of({"step": step}, {"model": network.state_dict()})
        save(run / "checkpoints", moment, keep_last=9)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    newest = run / "checkpoints" / "step_000015" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")  # damaged: passed over
    settings = {"to": "text", "seed": 3, "max_tokens": 12}
    assert generate(run, "ab", **settings) == generate(root / "run", "ab", **settings)


def test_missing_models_and_changed_tokenizers_are_named(saved, tmp_path):
    root, model, _ = saved
    with pytest.raises(UserError, match="no such folder"):
        generate(tmp_path / "nothing", to="text")
    with pytest.raises(UserError, match="mm train"):
        generate(tmp_path, to="text")
    stranger = extend_vocabulary([TokenSpec("text", 256, fingerprint="another")])
    model.save_pretrained(
        tmp_path / "m", vocabulary=stranger, tokenizers={"text": root / "tokenizer"}
    )
    with pytest.raises(UserError, match="was tokenised by"):
        generate(tmp_path / "m", "ab", to="text")
    model.save_pretrained(tmp_path / "n")
    with pytest.raises(UserError, match="no tokenizer for 'text'"):
        generate(tmp_path / "n", "ab", to="text")


def test_a_file_is_asked_for_after_the_modality_is_known(tmp_path):
    """An unknown modality must not be answered with "name a file"."""
    BytesConfig(modality="image").build().save(tmp_path / "tokenizer")
    vocabulary = extend_vocabulary([load_tokenizer(tmp_path / "tokenizer").spec])
    tiny("hybrid", vocabulary=vocabulary).float().save_pretrained(
        tmp_path / "model", vocabulary=vocabulary, tokenizers={"image": tmp_path / "tokenizer"}
    )
    with pytest.raises(UserError, match="vidio"):
        command(tmp_path, to="vidio")
    with pytest.raises(UserError, match="-o FILE"):
        command(tmp_path, to="image")
