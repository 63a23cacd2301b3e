"""Heads by hand: densities, alignments, tokens further ahead, and a State of a head's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical as Weights
from torch.distributions import Independent, MixtureSameFamily, Normal, StudentT, Uniform
from torch.distributions import TransformedDistribution as Transformed
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from mm.batch import Batch
from mm.data.batching.collate import to_batch
from mm.decoders.blockwise import decode_blocks
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.heads.ctc import Alignments, sum_alignments
from mm.model.heads.mixture import MixtureConfig
from mm.model.heads.multi_token import MultiTokenConfig
from mm.model.heads.softmax import Softmax, SoftmaxConfig
from mm.model.layer import HeadOut, init_weights
from mm.registry import HEADS, MIXERS, NETWORKS, OBJECTIVES
from mm.specs import Segment, TokenSpec
from mm.vocabulary import extend_vocabulary

VOCABULARY = extend_vocabulary(
    [TokenSpec("text", 5), TokenSpec("series", 0, continuous=True, n_features=3)]
)
MODEL: dict[str, Any] = {
    "kind": "lm",
    "d_model": 16,
    "adapters": {"series": {"kind": "linear", "d_in": 3}},
    "backbone": {"kind": "stack", "depth": 1, "pattern": "attention"},
}


def build(**heads: Any) -> Any:
    module = NETWORKS.parse({**MODEL, "heads": {"tokens": "softmax", **heads}}).build(VOCABULARY)
    torch.manual_seed(0)
    init_weights(module.double())
    return module.eval()


def context(rows: list[list[int]]) -> Ctx:
    layout = Layout.from_rows([[Doc(n) for n in row] for row in rows])
    return Ctx(layout, Causal())


def logistic(loc: Tensor, scale: Tensor) -> Any:
    base = Uniform(torch.zeros_like(loc), torch.ones_like(loc))
    return Transformed(base, [SigmoidTransform().inv, AffineTransform(loc, scale)])


@pytest.mark.parametrize("density", ["gaussian", "student_t", "logistic"])
def test_mixtures_are_the_densities_that_they_say(density: Any) -> None:
    head = MixtureConfig(density=density, components=3, d_out=2).build(8, 20).double()
    torch.manual_seed(1)
    init_weights(head)
    h = torch.randn(1, 6, 8, dtype=torch.float64)
    ctx, places = context([[6]]), torch.tensor([1, 4])
    dist: Any = head(h, ctx, places).dist
    each = {
        "gaussian": lambda: Normal(dist.loc, dist.scale),
        "student_t": lambda: StudentT(dist.df, dist.loc, dist.scale),
        "logistic": lambda: logistic(dist.loc, dist.scale),
    }[density]()
    value = torch.randn(2, 2, dtype=torch.float64)
    wanted = Weights(logits=dist.weight).log_prob(torch.arange(3)[:, None]).T
    wanted = (wanted + Independent(each, 1).log_prob(value[:, None])).logsumexp(-1)
    torch.testing.assert_close(dist.log_prob(value), wanted)
    nll = head(h, ctx, places, value).nll
    torch.testing.assert_close(nll, -wanted)
    if density == "gaussian":
        same = MixtureSameFamily(Weights(logits=dist.weight), Independent(each, 1))
        torch.testing.assert_close(dist.mean, same.mean)
    generator = torch.Generator().manual_seed(2)
    many = type(dist)(
        *(
            None if t is None else t[:1].expand(40000, *t.shape[1:])
            for t in (dist.weight, dist.loc, dist.scale, dist.df)
        ),
        density,  # fmt: skip
    )
    drawn = many.sample(generator)
    # Medians of both, and their densities, agree: Student's t has heavy tails.
    mine = drawn[:, 0].sort().values
    tail = Weights(logits=dist.weight[0]).sample((40000,))
    other = each.sample((40000,))[:, 0].gather(1, tail[:, None, None].expand(-1, 1, 2))[:, 0, 0]
    for q in (0.1, 0.5, 0.9):
        a, b = mine.detach().quantile(q), other.detach().quantile(q)
        assert abs(float(a - b)) < 0.08, (q, float(a), float(b))
    assert torch.equal(many.sample(generator, 0.0), many.mean)


def test_ctc_sums_over_every_alignment() -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(2, 4, 4, dtype=torch.float64).log_softmax(-1)
    dist = Alignments(log_probs, torch.tensor([4, 3]))
    labels = torch.tensor([[1, 1, -1], [3, 2, -1]])
    wanted = []
    for i, n in enumerate((4, 3)):
        ids = [x for x in labels[i].tolist() if x >= 0]
        total = 0.0
        for path in itertools.product(range(4), repeat=n):
            kept = [k for k, _ in itertools.groupby(path) if k != 0]
            if kept == ids:
                total += math.exp(sum(float(log_probs[i, t, c]) for t, c in enumerate(path)))
        wanted.append(math.log(total))
    torch.testing.assert_close(dist.log_prob(labels), torch.tensor(wanted, dtype=torch.float64))
    # The form for accelerators says the same, gradients too, of empty labels and too few frames.
    # (torch's own gradient is one of logits, not of log-probabilities.)
    more = torch.tensor([[1, 1, 1], [-1, -1, -1]])
    for asked in (labels, more):
        x = [log_probs.clone().requires_grad_() for _ in range(2)]
        sizes, n = (asked >= 0).sum(-1), dist.length
        one = Alignments(x[0].log_softmax(-1), n).log_prob(asked)
        two = sum_alignments(x[1].log_softmax(-1), asked.clamp_min(0), n, sizes)
        torch.testing.assert_close(one, two)
        for each in (one, two):
            each[torch.isfinite(each)].sum().backward()
        torch.testing.assert_close(x[0].grad, x[1].grad)
    best = torch.full((1, 5, 4), -9.0)
    best[0, torch.arange(5), torch.tensor([1, 1, 0, 1, 2])] = 0.0
    read = Alignments(best, torch.tensor([5])).sample(torch.Generator())
    assert read.tolist() == [[1, 1, 2, -1, -1]]
    assert Alignments(best, torch.tensor([4])).sample(torch.Generator()).tolist()[0][:3] == [
        1,
        1,
        -1,
    ]


def test_ctc_reads_each_document_alone_and_tells_what_is_too_short() -> None:
    model = build(text={"kind": "ctc", "split": 2})
    rng = np.random.default_rng(0)
    documents = []
    for n in (2, 5, 1):
        values = rng.normal(size=(n, 3)).astype(np.float32)
        series = Segment("series", np.full(n, -1), values, role="condition")
        documents.append([series, Segment("text", rng.integers(0, 5, n), role="label")])
    documents.append([Segment("text", np.array([0]), role="target")])  # no label
    together = to_batch([documents[:3], documents[3:]], VOCABULARY)
    out = model(together)
    assert together.places["text"].tolist() == [0, 4, 11]
    assert together.head_targets["text"].shape == (3, 5)
    for i, document in enumerate(documents[:3]):
        alone = model(to_batch([[document]], VOCABULARY)).heads["text"].nll
        torch.testing.assert_close(out.heads["text"].nll[i : i + 1], alone)
    lost = out.heads["text"].aux["too_short"]
    assert float(lost.total) == 0 and float(lost.count) == 3
    long = [documents[2][0], Segment("text", np.zeros(9, int), role="label")]  # 6 frames, 17 needed
    found = model(to_batch([[long]], VOCABULARY))
    assert float(found.heads["text"].nll) == 0
    assert float(found.aux["heads.text.too_short"].total) == 1
    none = model(to_batch([[documents[3]]], VOCABULARY))
    assert "text" not in none.heads  # no batch of such a stream has it
    objective = OBJECTIVES.parse("next_token").build(VOCABULARY)
    counts = objective.counts(together)
    assert float(counts["text_label"]) == 8 and float(counts["text"]) == 2


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_class_is_told_of_the_whole_document(pool: str) -> None:
    model = build(text={"kind": "classes", "pool": pool})
    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    series = Segment("series", np.full(3, -1), values, role="condition")
    rows = [[[series, Segment("text", np.array([k]), role="label")] for k in (1, 4)]]
    batch = to_batch(rows, VOCABULARY)
    out = model(batch)
    at = slice(5, 10) if pool == "mean" else slice(5, 6)  # of the second document
    logits = out.hidden[0, at].mean(0) @ model.heads["text"].weight.T
    span = VOCABULARY.range("text")
    torch.testing.assert_close(
        out.heads["text"].nll[1], -logits.log_softmax(-1)[span.first + 4], rtol=1e-5, atol=1e-6
    )


def test_values_and_ids_are_predicted_side_by_side() -> None:
    model = build(series={"kind": "mixture", "d_out": 3})
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 3)).astype(np.float32)
    series = Segment("series", np.full(4, -1), values, weight=0.5)
    text = Segment("text", np.array([1, 2]), role="condition")
    batch = to_batch([[[text, series]]], VOCABULARY)
    assert batch.places["series"].tolist() == [4, 5, 6, 7] and batch.places["tokens"].tolist() == [
        8
    ]
    assert np.array_equal(batch.head_targets["series"].numpy(), values)
    out = model(batch)
    objective = OBJECTIVES.parse("next_token").build(VOCABULARY)
    counts = objective.counts(batch)
    assert float(counts["series_values"]) == 2 and float(counts["series"]) == 0.5
    (term,) = objective.terms([batch], {"model": lambda b: out}, None)  # type: ignore[arg-type]
    torch.testing.assert_close(
        term.losses["series_values"].double(), 0.5 * out.heads["series"].nll.float().sum().double()
    )
    # Each place is told from what stands before it alone.
    changed = values.copy()
    changed[2:] += 5
    other = model(to_batch([[[text, series._replace(values=changed)]]], VOCABULARY))
    a, b = out.hidden[0], other.hidden[0]
    assert torch.equal(a[:7], b[:7]) and not torch.equal(a[7], b[7])
    for head, said in (
        ({"kind": "mixture", "d_out": 2}, "predicts 2 values a place, the data have 3"),
        ({"kind": "softmax"}, "predicts no values a place"),
    ):
        with pytest.raises(UserError, match=f"model.heads.series {said}"):
            build(series=head)


def test_further_heads_stay_in_their_document() -> None:
    head = MultiTokenConfig(ahead=2, hidden=4).build(8, 20).double()
    init_weights(head)
    ctx = context([[5, 3], [4]])
    h = torch.randn(2, 8, 8, dtype=torch.float64)
    places, target = torch.tensor([0, 1, 2, 3, 5, 6, 9]), torch.tensor([3, 4, 5, 6, 7, 8, 9])
    out = head(h, ctx, places, target)
    flat = h.flatten(0, 1)
    states = head.states(flat)
    logits = nn.functional.linear(states, head.weight).log_softmax(-1)
    pairs = [(1, 0, 4), (1, 1, 5), (1, 2, 6), (1, 5, 8), (2, 0, 5), (2, 1, 6)]  # (k, place, id)
    wanted = -sum(logits[k - 1, place, i] for k, place, i in pairs)
    torch.testing.assert_close(out.aux["multi_token"].total.double(), wanted, rtol=1e-5, atol=1e-5)
    assert float(out.aux["multi_token"].count) == len(pairs)
    plain = SoftmaxConfig().build(8, 20).double()
    plain.weight = head.weight
    torch.testing.assert_close(out.nll, plain(h, ctx, places, target).nll)


class LookingBack(Softmax):
    """A head with a layer of its own, so with a State."""

    def __init__(self, d_model: int, n_ids: int, config: SoftmaxConfig):
        super().__init__(d_model, n_ids, config)
        self.mixer = MIXERS.parse({"kind": "attention", "heads": 2}).build(d_model)

    def forward(
        self, h: Any, ctx: Any, places: Any, target: Any = None, state: Any = None
    ) -> HeadOut:
        y, state, *_ = self.mixer(h, ctx, state)
        return super().forward(h + y, ctx, places, target)._replace(state=state)


def test_the_state_of_a_head_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole = step by step, also where a draft is accepted in part."""
    monkeypatch.setattr(SoftmaxConfig, "build", lambda self, d, n: LookingBack(d, n, self))
    model = build()
    ids = torch.randint(16, 23, (2, 6))
    whole = model(Batch.of_ids(ids), loss=False).heads["tokens"].dist.logits.view(2, 6, -1)
    state = model.initial_state(2, 6)
    assert model.state_bytes(2, 6) == state.n_bytes()

    def step(begin: int, end: int, state: Any, draft: bool = False) -> tuple[Tensor, Any]:
        rows = [[Doc(end - begin, slot=b, fresh=begin == 0, start=begin)] for b in range(2)]
        batch = Batch.of_ids(ids[:, begin:end], Layout.from_rows(rows))
        out = model(batch, state=state, loss=False, draft=draft)
        return out.heads["tokens"].dist.logits.view(2, end - begin, -1), out.state

    first, state = step(0, 2, state)
    _, drafted = step(2, 5, state.fork(), draft=True)
    state = drafted.accept(torch.tensor([2, 2]))
    rest, _ = step(4, 6, state)
    torch.testing.assert_close(first, whole[:, :2])
    torch.testing.assert_close(rest, whole[:, 4:])


@pytest.mark.parametrize("kind", list(HEADS))
def test_every_head_runs_without_any_place(kind: str) -> None:
    """A micro-batch may have no target for it: every parameter still gets a gradient."""
    head = HEADS.get(kind).smallest().build(8, 20)
    init_weights(head)
    none = torch.zeros(0, dtype=torch.int64)
    shape = {"mixture": (0, 3), "ctc": (0, 0)}.get(kind, (0,))
    dtype = torch.float32 if kind == "mixture" else torch.int64
    out = head(torch.randn(1, 4, 8), context([[4]]), none, torch.zeros(shape, dtype=dtype))
    total = out.nll.sum() + sum(s.total for s in out.aux.values())
    total.backward()
    for name, p in head.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_blocks_write_what_greedy_writes() -> None:
    """Whatever the further heads propose: here what an untrained one does, and an oracle."""
    model = build(tokens={"kind": "multi_token", "ahead": 3, "hidden": 8})
    begin = VOCABULARY.range("text").begin
    given = [np.array([begin, 18, 19]), np.array([begin]), np.array([begin, 20, 21, 22, 18])]
    plain = decode_blocks(model, VOCABULARY, given, 9, block=1)
    assert plain.forwards == [9, 9, 9]
    made = decode_blocks(model, VOCABULARY, given, 9)
    for a, b in zip(made.ids, plain.ids, strict=True):
        assert np.array_equal(a, b) and made.ids
    assert all(n <= 9 for n in made.forwards)
    model.heads["tokens"].down.data.zero_()  # each further head says what the first one does
    again = decode_blocks(model, VOCABULARY, given, 9)
    assert all(np.array_equal(a, b) for a, b in zip(again.ids, plain.ids, strict=True))
    with pytest.raises(UserError, match="multi_token, ahead"):
        decode_blocks(build(), VOCABULARY, given, 2)


def test_layers_inside_adapters_report_by_their_own_names() -> None:
    """Experts of an encoder: their losses reach the objective, their statistics their module."""
    experts = {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 8}
    backbone = {"kind": "stack", "depth": 1, "pattern": "attention", "ffn": experts}
    inner = {"kind": "linear", "d_in": 3}
    encoder = {"kind": "encoder", "inner": inner, "width": 8, "backbone": backbone}
    for adapter, path in (
        (encoder, "adapters.series"),
        (
            {"kind": "resampler", "inner": encoder, "queries": 2, "heads": 2},
            "adapters.series.inner",
        ),
    ):
        given = {**MODEL, "adapters": {"series": adapter}}
        model: Any = NETWORKS.parse(given).build(VOCABULARY).double()
        init_weights(model)
        values = np.ones((4, 3), np.float32)
        series = Segment("series", np.full(4, -1), values, role="condition")
        text = Segment("text", np.array([1]))
        source = [series._replace(part="source"), series, text]
        out = model(to_batch([[source]], VOCABULARY))
        own = {k: v for k, v in out.aux.items() if k.startswith("adapters.")}
        assert own
        for key in own:
            owner = model.get_submodule(key.rpartition(".")[0])
            assert owner.path == f"{path}.backbone.layers.0.ffn", key
        counted = OBJECTIVES.parse({"kind": "next_token", "aux_weights": {"balance": 0.1}})
        losses = counted.build(VOCABULARY).aux_losses(out, to_batch([[source]], VOCABULARY))
        assert float(losses["balance"].detach()) > 0
