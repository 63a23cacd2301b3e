"""Codes of several codebooks in one place: the layout, its heads, what is generated, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch
from mm.data.batching.codebooks import flat_codes, flat_stream, lay_out
from mm.data.batching.collate import Declared, to_batch
from mm.data.batching.document import document_tokens
from mm.data.transforms.chunk import window
from mm.data.transforms.delay import Delay
from mm.decoders.generate import generate_tokens, sequence_nll
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.heads import depth
from mm.model.layer import init_weights
from mm.registry import NETWORKS, OBJECTIVES
from mm.specs import Segment, TokenSpec
from mm.tasks.bits_per_byte import windows
from mm.vocabulary import extend_vocabulary

C, V = 3, 5
VOCABULARY = extend_vocabulary(
    [TokenSpec("text", 7), TokenSpec("audio", V, C), TokenSpec("image", 4, 2, grid=(2, 2))]
)
DELAYS = {"audio": (0, 1, 2), "image": (0, 0)}
FLAT = {"audio": (0, 0, 0), "image": (0, 1)}
LAYOUTS = [
    pytest.param("parallel", DELAYS, id="parallel"),
    pytest.param("depth", FLAT, id="depth"),
    pytest.param("depth", {"audio": (0, 2, 1), "image": (0, 0)}, id="depth-delayed"),
]


def build(kind: str, delays: dict[str, tuple[int, ...]], seed: int = 0, **more: Any) -> Any:
    codes: dict[str, Any] = {"kind": kind, "delays": delays}
    if kind == "depth":
        codes |= {"width": 16, "backbone": {"kind": "stack", "depth": 1, "pattern": "attention"}}
        codes |= more
    config = {
        "kind": "lm",
        "d_model": 16,
        "backbone": {"kind": "stack", "depth": 2, "pattern": "attention gated_scan"},
        "heads": {"tokens": "softmax", "codes": codes},
    }
    model = NETWORKS.parse(config).build(VOCABULARY)
    torch.manual_seed(seed)
    init_weights(model.double())
    return model.eval()


def item(modality: str, frames: int, seed: int) -> np.ndarray:
    spec = VOCABULARY.spec(modality)
    n = spec.n_codebooks
    codes = np.random.default_rng(seed).integers(0, spec.vocab_size, (frames, n))
    return (codes + np.arange(n) * spec.vocab_size).reshape(-1).astype(np.int32)


def document(seed: int, frames: int = 4) -> list[Segment]:
    text = np.random.default_rng(seed).integers(0, 7, 3).astype(np.int32)
    return [
        Segment("image", item("image", 4, seed), role="condition"),
        Segment("text", text, role="condition"),
        Segment("audio", item("audio", frames, seed + 1)),
    ]


@pytest.mark.parametrize("delays", [(0, 0, 0), (0, 1, 2), (0, 3, 1)])
def test_a_layout_is_taken_back_to_the_bit(delays: tuple[int, ...]) -> None:
    """By hand, and through a row of the batch: codes, `end` and all."""
    codes = item("audio", 4, 0)
    laid = lay_out(codes, delays)
    assert laid.shape == (4 + max(delays), C)
    for t in range(4):
        for q, delay in enumerate(delays):
            assert laid[t + delay, q] == codes[t * C + q]
    assert (laid >= 0).sum() == len(codes) and np.array_equal(flat_codes(laid), codes)
    documents = [document(0), document(7, 1)]
    transform = Delay({"audio": delays, "image": (0, 1)})
    batch = to_batch([[transform(list(d)) for d in documents]], VOCABULARY)
    flat = to_batch([documents], VOCABULARY)
    assert np.array_equal(flat_stream(batch.ids[0].numpy(), VOCABULARY), flat.ids[0, :, 0].numpy())
    # As many targets: each code once, and one `end`.
    here = batch.targets.flatten(0, 1)
    n = len(batch.places["tokens"]) + int((here[batch.places["codes"].long(), 1:] >= 0).sum())
    assert n == len(flat.places["tokens"])


def test_the_end_fills_the_first_codebook_and_is_predicted_once() -> None:
    """Two frames with delays 0, 1, 2, written by hand."""
    r = VOCABULARY.range("audio")
    (segment,) = Delay(DELAYS)([Segment("audio", np.array([1, 6, 12, 3, 8, 14], np.int32))])
    d = document_tokens([segment], VOCABULARY)
    at = lambda *codes: [-1 if c < 0 else r.first + c for c in codes]
    assert d.ids.tolist() == [r.begin, *at(1, 3), r.end, r.end, r.end]
    assert d.codes is not None and d.code_targets is not None
    assert d.codes.T.tolist() == [at(-1, -1, 6, 8, -1, -1), at(-1, -1, -1, 12, 14, -1)]
    assert d.targets.tolist() == [*at(1, 3), r.end, -1, -1, -1]
    assert d.code_targets.T.tolist() == [at(-1, 6, 8, -1, -1, -1), at(-1, -1, 12, 14, -1, -1)]
    assert d.weights.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("kind,delays", LAYOUTS)
def test_what_is_generated_is_what_a_forward_says(kind: str, delays: Any) -> None:
    """Greedy codes are the likeliest of each place of one forward over the whole document.

    Several prompts at once, of several lengths; one goes on with frames that are given.
    """
    model = build(kind, delays)
    given = item("audio", 2, 3)
    prompts = [document(0)[:2], document(1)[:1], [*document(2)[:2], Segment("audio", given)]]
    limit = 5 * C
    spans = generate_tokens(model, VOCABULARY, prompts, "audio", temperature=0, max_tokens=limit)
    assert np.array_equal(spans[2][: len(given)], given)
    r = VOCABULARY.range("audio")
    for prompt, span, have in zip(prompts, spans, (0, 0, 2), strict=True):
        whole = [*prompt[: 1 if prompt is prompts[1] else 2], Segment("audio", span)]
        batch = to_batch([[Delay(delays)(whole)]], VOCABULARY)
        out = model(Batch.of_ids(batch.ids, batch.layout), loss=False)
        begin = int(np.flatnonzero(batch.ids[0, :, 0].numpy() == r.begin)[-1])
        frames = len(span) // C
        assert 0 < frames <= 5 + have
        laid = batch.ids[0, begin + 1 :].long()
        logits = out.heads["tokens"].dist.logits[begin:-1]
        first = logits[:, r.first : r.first + V].argmax(-1) + r.first
        assert torch.equal(first[have:frames], laid[have:frames, 0])
        # The end is where it is likelier than a code, and not before.
        ends = logits[:, r.end] > logits[:, r.first : r.first + V].max(-1).values
        assert not ends[max(1, have) : frames].any() and (frames == 5 + have or ends[frames])
        places = torch.arange(begin, begin + len(laid))
        for q in range(1, C):
            told = model.heads["codes"](
                out.hidden, _ctx(batch), places, known=batch.targets[0, begin:-1, :q]
            ).dist.logits
            wait = delays["audio"][q]
            drawn = slice(wait + have, wait + frames)
            own = slice(r.first + q * V, r.first + (q + 1) * V)
            assert torch.equal(told[drawn, own].argmax(-1) + own.start, laid[drawn, q])


def _ctx(batch: Batch) -> Any:
    from mm.mask import Causal
    from mm.model.context import Ctx

    return Ctx(batch.layout, Causal())


@pytest.mark.parametrize("kind,delays", LAYOUTS)
def test_packed_is_separate_and_the_loss_counts_codes(kind: str, delays: Any) -> None:
    """Documents in one row, with one of text alone, cost what each costs alone; so `mm eval` says.

    A place's cost is the sum of its codebooks' conditionals.
    """
    model = build(kind, delays)
    documents = [document(0), [Segment("text", np.array([1, 2]))], document(5, 2)]
    laid = [Delay(delays)(list(d)) for d in documents]
    declared = Declared(codebooks=("audio", "image"))
    objective = OBJECTIVES.parse("next_token").build(VOCABULARY)

    def totals(rows: list[Any]) -> tuple[dict[str, float], dict[str, float]]:
        batch = to_batch(rows, VOCABULARY, declared=declared)
        (term,) = objective.terms([batch], {"model": model}, None)
        counts = {k: float(n) for k, n in objective.counts(batch).items()}
        return {k: float(v.detach()) for k, v in term.losses.items()}, counts

    packed, counts = totals([laid])
    alone = [totals([[d]]) for d in laid]
    for name, value in packed.items():
        assert value == pytest.approx(sum(losses[name] for losses, _ in alone), rel=1e-6)
    assert counts["audio"] == 4 * C + 1 + 2 * C + 1 and counts["text"] == 3
    scored = sequence_nll(model, VOCABULARY, documents)
    assert sum(s.get("audio", (0, 0))[1] for s in scored) == counts["audio"]
    assert sum(s.get("audio", (0, 0))[0] for s in scored) == pytest.approx(packed["audio"])
    # By hand: each codebook's conditional, from the distribution that is asked for one at a time.
    batch = to_batch([[laid[0]]], VOCABULARY, declared=declared)
    out = model(batch)
    places = batch.places["codes"].long()
    target = batch.targets.flatten(0, 1)[places].long()
    by_hand = torch.zeros(len(places), dtype=torch.float64)
    for q in range(1, C):
        dist = model.heads["codes"](out.hidden, _ctx(batch), places, known=target[:, :q]).dist
        first = VOCABULARY.range("audio").first + q * V
        own = dist.logits[:, first : first + V].log_softmax(-1)
        at = (target[:, q] - first).clamp_min(0)
        by_hand -= torch.where(target[:, q] >= 0, own.gather(1, at[:, None])[:, 0], 0.0)
        known = target[:, 0] >= 0  # of a modality: no id of another is possible
        torch.testing.assert_close(
            dist.logits.log_softmax(-1)[known, first : first + V], own[known]
        )
    torch.testing.assert_close(out.heads["codes"].nll, by_hand)


@pytest.mark.parametrize("delays", [(0, 0, 0), (0, 1, 2)])
def test_windows_score_each_code_once(delays: tuple[int, ...]) -> None:
    """Flat windows that overlap, laid out: the targets are those that the flat ones have."""
    flat = Segment("audio", item("audio", 7, 0))
    whole = to_batch([[[flat]]], VOCABULARY).targets
    found: list[int] = []
    for piece in windows(flat, VOCABULARY.spec("audio"), 4 * C, 0.5):
        (laid,) = Delay({"audio": delays})([piece])
        batch = to_batch([[[laid]]], VOCABULARY)
        targets = batch.targets.flatten(0, 1)
        found += targets[batch.places["tokens"].long(), 0].tolist()
        codes = targets[batch.places["codes"].long(), 1:]
        found += codes[codes >= 0].tolist()
    assert sorted(found) == sorted(whole[whole >= 0].tolist())
    # Places that are cut after the layout: what stands in a window is predicted there.
    (laid,) = Delay({"audio": delays})([flat])
    cut = window(laid, 2, 5)
    d = document_tokens([cut], VOCABULARY)
    assert d.code_targets is not None
    assert (d.code_targets[:3] >= 0).sum() == (laid.ids[2:5, 1:] >= 0).sum()
    assert (d.targets >= 0).sum() == 4 and (d.weights > 0).sum() == 3


@pytest.mark.parametrize("kind,delays", LAYOUTS)
def test_chunks_of_streams_are_the_whole(kind: str, delays: Any) -> None:
    model = build(kind, delays)
    ids = to_batch([[Delay(delays)(document(0))]], VOCABULARY).ids
    whole = model(Batch.of_ids(ids), loss=False).hidden
    state, parts = model.initial_state(1, ids.shape[1]), []
    for begin, end in ((0, 3), (3, 4), (4, ids.shape[1])):
        row = [[Doc(end - begin, slot=0, fresh=begin == 0, start=begin)]]
        out = model(Batch.of_ids(ids[:, begin:end], Layout.from_rows(row)), state=state, loss=False)
        state, parts = out.state, [*parts, out.hidden]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("pattern", ["attention", "gated_scan attention"])
def test_the_depth_transformer_steps_from_codebook_to_codebook(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes one after another from its State, or several at once, say what all from nothing say."""
    monkeypatch.setattr(depth, "REPAYS", 0)
    backbone = {"kind": "stack", "depth": 2, "pattern": pattern}
    model = build("depth", FLAT, backbone=backbone)
    head, batch = model.heads["codes"], to_batch([[Delay(FLAT)(document(0))]], VOCABULARY)
    hidden, ctx = torch.randn(1, 9, 16, dtype=torch.float64), _ctx(batch)
    r, places = VOCABULARY.range("audio"), torch.arange(9)
    known = r.first + torch.randint(0, V, (9, 4)) + torch.arange(4).clamp_max(C - 1) * V
    known[2, 1:] = known[5, 0] = -1
    for calls in ((1, 2, 3, 4), (2, 3), (1, 4)):
        state = head.initial_state(9, 4)
        for n in calls:
            out = head(hidden, ctx, places, state=state, known=known[:, :n])
            plain = head(hidden, ctx, places, known=known[:, :n])
            assert plain.state is None
            torch.testing.assert_close(out.dist.logits, plain.dist.logits, rtol=0, atol=1e-12)
            state = out.state
    prompts = [document(seed)[:2] for seed in range(3)]
    write = lambda: generate_tokens(model, VOCABULARY, prompts, "audio", max_tokens=4 * C, seed=1)
    stepped = write()
    monkeypatch.setattr(depth, "REPAYS", 10**9)
    assert head.initial_state(9, 4) is None
    for one, other in zip(stepped, write(), strict=True):
        assert np.array_equal(one, other)


def test_what_is_drawn_follows_the_depth_transformers_conditionals() -> None:
    """Frequencies of one frame's codes, drawn 2,000 times, beside the products of conditionals."""
    model = build("depth", FLAT)
    n = 2000
    prompt = document(0)[:2]
    spans = generate_tokens(
        model, VOCABULARY, [prompt] * n, "audio", max_tokens=C, seed=3, max_slots=n
    )
    drawn = np.stack(spans).reshape(n, C) - np.arange(C) * V
    every = np.stack(np.meshgrid(*[np.arange(V)] * C, indexing="ij"), -1).reshape(-1, C)
    codes = (every + np.arange(C) * V).astype(np.int32)
    documents = [[*prompt, Segment("audio", each)] for each in codes]
    batch = to_batch([[Delay(FLAT)(d)] for d in documents], VOCABULARY)
    out = model(batch)
    r = VOCABULARY.range("audio")
    at = batch.places["codes"].long()
    every_place = Batch.of_ids(batch.ids, batch.layout)
    said = model(every_place, loss=False).heads["tokens"].dist.logits[at][:, r.first : r.first + V]
    first = said.log_softmax(-1).gather(1, torch.from_numpy(every[:, :1]))[:, 0]
    p = (first - out.heads["codes"].nll).exp().detach().numpy()
    assert p.sum() == pytest.approx(1)
    found = np.bincount((drawn * V ** np.arange(C)[::-1]).sum(1), minlength=V**C) / n
    assert np.abs(found - p).sum() < 3 * np.sqrt(p * (1 - p) / n).sum()


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="5 codes are no whole frames of 3"):
        Delay(DELAYS)([Segment("audio", item("audio", 2, 0)[:5])])
    masked = {"masked": np.ones(6, bool)}
    with pytest.raises(UserError, match="'audio' was masked or placed"):
        Delay(DELAYS)([Segment("audio", item("audio", 2, 0), fields=masked)])
    wrong = np.array([[1, 2, 3]], np.int32)
    with pytest.raises(UserError, match="sample 'a': segment 'audio': code 2 is not of codebook 1"):
        to_batch([[[Segment("audio", wrong)]]], VOCABULARY, keys=["a"])
    with pytest.raises(ValueError, match="2 codes a place of 3 codebooks"):
        to_batch([[[Segment("audio", wrong[:, :2])]]], VOCABULARY)
    with pytest.raises(ValueError, match="audio: the first codebook's delay must be 0"):
        build("parallel", {"audio": (1, 0, 0)})
