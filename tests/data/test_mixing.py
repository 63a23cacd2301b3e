"""Mixing: shares of samples, tokens and modalities, schedules, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_toys import ToyTokenizer, token_shards

from mm.data.pack.job import pack
from mm.data.streams.mixing import plan, reach
from mm.data.streams.order import Windows
from mm.data.streams.packed import PackedConfig
from mm.data.streams.shuffle import key_of
from mm.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long and short texts under one vocabulary, and samples of all modalities."""
    root = tmp_path_factory.mktemp("mixing")
    for name, words in (("long", 30), ("short", 3)):
        rows = [{"key": f"{name}{i}", "text": "x" * (words + i % 7)} for i in range(50)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        pack(
            root / f"{name}.jsonl",
            root / name,
            tokenizers={"text": ToyTokenizer("text", 64)},
            progress=False,
        )
    token_shards(root, 40)
    return root


def stream(*sources: dict, **kw):
    kw = {"seq_len": 64, "batch_size": 4, "block_samples": 64, "prefetch": 0} | kw
    return PackedConfig(sources=sources, **kw).build(seed=1)


def test_weights_in_tokens(data: Path) -> None:
    """Documents differ tenfold in length, the tokens are shared as asked."""
    sources = [{"path": data / "long", "weight": 1}, {"path": data / "short", "weight": 3}]
    by_tokens = stream(*sources, weights="tokens")
    for _ in range(80):
        by_tokens.next()
    share = by_tokens.stats["source_shares"]
    assert share["0"] == pytest.approx(0.25, abs=0.02) and sum(share.values()) == 1
    by_samples = stream(*sources)
    for _ in range(80):
        by_samples.next()
    assert by_samples.stats["source_shares"]["0"] == pytest.approx(35 / (35 + 3 * 8), abs=0.03)
    assert by_samples.plan["mix"] != by_tokens.plan["mix"]


def test_weights_in_tokens_count_what_the_transforms_leave(data: Path) -> None:
    cut = [{"kind": "chunk", "tokens": 4}]
    sources = [{"path": data / "long", "transform": cut}, {"path": data / "long"}]
    s = stream(*sources, weights="tokens")
    for _ in range(60):
        s.next()
    assert s.stats["source_shares"]["0"] == pytest.approx(0.5, abs=0.02)


def test_epochs_are_counted_of_the_source_that_was_seen_least(data: Path) -> None:
    """Also inside a block: a source of few samples is not at 0 until it is at several passes."""
    s = stream({"path": data / "long", "weight": 1}, {"path": data / "short", "weight": 3})
    passes = []
    for _ in range(30):
        s.next()
        seen = s.stats["source_samples"]
        passes.append(min(seen[str(k)] / len(of) for k, of in enumerate(s.sources)))
        assert s.stats["epoch"] == pytest.approx(passes[-1], abs=0.25)
    assert passes[0] < 0.5 and passes[-1] > 1


def test_tokens_by_modality(data: Path) -> None:
    """Three sources of other modalities each are mixed until the modalities have their shares."""
    task = lambda name: [{"kind": "any_to_any", "tasks": {name: 1}, "condition_dropout": 0}]
    sources = [
        {"path": data / "tokens", "transform": task(name)} for name in ("text", "image", "audio")
    ]
    s = stream(*sources, modality_tokens={"text": 5, "image": 3, "audio": 2})
    for _ in range(80):
        s.next()
    shares = s.stats["token_shares"]
    assert shares == pytest.approx({"text": 0.5, "image": 0.3, "audio": 0.2}, abs=0.02)
    assert sum(s.stats["tokens_seen"].values()) == sum(s.stats["source_tokens"].values())
    with pytest.raises(UserError, match="no mixture of these sources has .*image 0.500"):
        stream({"path": data / "long"}, modality_tokens={"text": 1, "image": 1})


def test_a_schedule_moves_the_shares(data: Path) -> None:
    """Linear between its points; every block is a function of its number alone."""
    sources = [
        {"path": data / "long", "weight": {0: 1, 640: 0}},
        {"path": data / "short", "weight": {0: 0, 640: 1}},
    ]
    s = stream(*sources)
    counts = np.diff([s.mix.drawn_before(b) for b in range(15)], axis=0)
    assert counts.sum(1).tolist() == [64] * 14 and (counts >= 0).all()
    assert (np.diff(counts[:10, 0]) < 0).all() and (counts[10:, 0] == 0).all()
    assert counts[:10, 0].sum() == 320, "half of the first ten blocks"
    for b in (11, 3):  # in any order
        documents = [d for row in s.plan_block(b).rows for d in row]
        assert sum(d.source == 0 for d in documents) == counts[b, 0]


def test_the_report_goes_on_after_a_resume(data: Path) -> None:
    sources = [{"path": data / "long"}, {"path": data / "short", "weight": {0: 1, 300: 5}}]
    whole = stream(*sources, weights="tokens")
    for _ in range(9):
        whole.next()
    again = stream(*sources, weights="tokens")
    for _ in range(4):
        again.next()
    state = json.loads(json.dumps(again.state_dict()))
    resumed = stream(*sources, weights="tokens")
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.next()
    assert resumed.stats == whole.stats and resumed.state_dict() == whole.state_dict()


def test_rounding_never_drifts() -> None:
    mix = plan([{0: 1, 7000: 2}, 3.0, {0: 0.001}], 10)
    for block in (1, 13, 700, 4001):
        n = block * 10  # by hand: the shares are linear until 7,000 samples, constant after
        start, stop = np.array([1, 3, 0.001]) / 4.001, np.array([2, 3, 0.001]) / 5.001
        first = min(n, 7000)
        exact = first * start + (stop - start) * first**2 / 14000 + (n - first) * stop
        assert np.abs(np.array(mix.drawn_before(block)) - exact).max() <= 0.5 + 1e-6
    with pytest.raises(UserError, match="every weight is 0 after 5 samples"):
        plan([{0: 1, 5: 0}], 10)
    with pytest.raises(UserError, match=r"sources\[1\]: its samples have no tokens"):
        plan([1.0, 1.0], 10, "tokens", None, [{"text": 3.0}, {}])


def test_the_points_of_schedules_are_put_in_order() -> None:
    mix = plan([{4096: 2.0, 0: 1.0}, {9: 3.0, 0: 1.0}], 2)
    assert mix.at.tolist() == [0, 4.5, 2048]
    first = 1 + 9 / 4096  # nine samples on the way from 1 to 2
    np.testing.assert_allclose(mix.shares[:, 0], [1 / 2, first / (first + 3), 2 / 5])


def test_reach_changes_no_more_than_it_has_to() -> None:
    tokens = [{"text": 9.0, "image": 1.0}, {"text": 9.0, "image": 1.0}, {"image": 4.0}]
    share = reach({"text": 0.45, "image": 0.55}, np.array([0.6, 0.2, 0.2]), tokens)
    np.testing.assert_allclose(share, [0.375, 0.125, 0.5], atol=1e-4)


def test_samples_keep_their_ratio_where_modalities_allow_it() -> None:
    """By hand: text in half of the tokens at 0.9, so sources 0 and 1 give half of all tokens."""
    tokens = [{"text": 9.0, "image": 1.0}, {"text": 18.0, "image": 2.0}, {"image": 4.0}]
    goal = {"text": 0.45, "image": 0.55}
    (share,) = plan([1.0, 1.0, 1.0], 100, "samples", goal, tokens).shares
    # 10 and 20 tokens of the first two are 1/6 and 1/3, 4 of the third 1/2
    np.testing.assert_allclose(share, np.array([1, 1, 7.5]) / 9.5, atol=1e-4)
    (share,) = plan([1.0, 1.0, 1.0], 100, "tokens", goal, tokens).shares
    np.testing.assert_allclose(share, np.array([1, 0.5, 5]) / 6.5, atol=1e-4)


def test_window_order_reads_shard_after_shard() -> None:
    groups = np.repeat(np.arange(20), 50)
    window_order = lambda sizes, window, key: Windows(np.array(sizes), window, key)(
        np.arange(sum(sizes))
    )
    order = window_order([50] * 20, 100, key_of(3))
    assert sorted(order) == list(range(1000))
    for start in range(0, 1000, 100):
        assert len(set(groups[order[start : start + 100]])) == 2, "two shards fill a window"
    firsts = groups[order[::100]]
    assert firsts.tolist() != sorted(firsts.tolist()), "shards are permuted"
    assert (np.diff(order[:100]) == 1).mean() < 0.1, "and samples within the window"
    assert (window_order([50] * 20, 100, key_of(4)) != order).mean() > 0.5
    assert sorted(window_order([4, 0, 1, 2], 3, 1)) == list(range(7))
    some = np.array([999, 3, 512, 513])
    assert (Windows(np.array([50] * 20), 100, key_of(3))(some) == order[some]).all()
