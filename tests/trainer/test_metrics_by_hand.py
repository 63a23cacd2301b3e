"""Lines of metrics.jsonl and what is made of them, counted by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mm.batch import Batch, Sum, Values
from mm.data.batching.collate import to_batch
from mm.layout import Doc, Layout
from mm.specs import Segment, TokenSpec
from mm.tokenizers.text.bytes import BytesConfig
from mm.trainer.callbacks.progress import Progress, ProgressConfig
from mm.trainer.callbacks.times import Times
from mm.trainer.log import metrics
from mm.trainer.log.summary import Summary
from mm.vocabulary import Vocabulary, extend_vocabulary


def training(**values: Any) -> Any:
    """What callbacks may ask of a training, as plain values."""
    return SimpleNamespace(**{"is_main": True, "step": 0, "steps": 10} | values)


def test_a_file_that_is_gone_on_with_loses_what_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.post_step(training(), step, {"loss": 0.5, "bad": math.inf, "worse": math.nan})
    file.write({"step": 4, "name": "x", "n": 7})
    file.close()
    assert (
        path.read_text().splitlines()[0] == '{"step": 1, "loss": 0.5, "bad": null, "worse": null}'
    )
    with path.open("a") as cut:
        cut.write('{"no step": 1}\n[]\n{"step": 2, "cut by a ki')
    assert [row["step"] for row in metrics.read(path)[:4]] == [1, 2, 3, 4]
    assert len(metrics.read(path)) == 6, "only a line that is no JSON is left out"
    again = metrics.MetricsFile(path, 3)
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2, 3]
    again.on_stage_start(training(step=2))
    again.write({"step": 3})
    again.close()
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_sums_of_a_step_add_up_over_micro_batches() -> None:
    found = metrics.MetricSum()
    for a, n in ((1.0, 2.0), (4.0, 3.0)):
        leaf = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        found.add_losses({"b": leaf * 2, "a": leaf})
        found.add_aux({"y": Sum(leaf * 1, torch.tensor(n)), "x": Sum(leaf * 10, torch.tensor(1.0))})
    found.reduce()
    assert {k: (float(v), v.dtype) for k, v in found.losses.items()} == {
        "a": (5.0, torch.float32),
        "b": (10.0, torch.float32),
    }
    assert {k: (float(s.total), float(s.count)) for k, s in found.aux.items()} == {
        "x": (50.0, 2.0),
        "y": (5.0, 5.0),
    }
    assert not any(t.requires_grad for t in (*found.losses.values(), found.aux["x"].total))
    assert metrics.all_reduce([]) == []


def test_codebook_usage_forgets_after_about_a_hundred_steps() -> None:
    usage = metrics.CodebookUsage()
    seen = lambda *counts: {"usage": Sum(torch.tensor([counts]), torch.tensor(1.0))}
    first = usage.update(seen(1.0, 1.0, 0.0, 0.0) | {"other": Sum(torch.ones(1), torch.ones(1))})
    assert {k: float(v) for k, v in first.items()} == pytest.approx(
        {"codebook/usage": 0.5, "codebook/dead_codes": 2.0, "codebook/perplexity": 2.0}
    )
    for _ in range(98):
        last = usage.update(seen(0.0, 0.0, 1.0, 0.0))
    assert float(last["codebook/usage"]) == 0.75, "0.97 ** 98 is above 0.05"
    assert float(usage.update(seen(0.0, 0.0, 1.0, 0.0))["codebook/usage"]) == 0.25
    old, new = 0.97, 1.0  # shares after one more step of another code
    fresh = metrics.CodebookUsage()
    fresh.update({"net.q/usage": seen(1.0, 0.0)["usage"]})
    found = fresh.update({"net.q/usage": seen(0.0, 1.0)["usage"]})
    p = [old / (old + new), new / (old + new)]
    entropy = -sum(x * math.log(x) for x in p)
    assert float(found["codebook/net.q/perplexity"]) == pytest.approx(math.exp(entropy))


TEXT = BytesConfig(modality="text").build()
WORDS = extend_vocabulary([TEXT.spec, TokenSpec("audio", 4)])


def rows_of(*texts: str, vocabulary: Vocabulary = WORDS) -> Batch:
    ids = TEXT.encode(list(texts))
    return to_batch([[[Segment("text", code.ids)]] for code in ids], vocabulary)


def test_bytes_per_token_from_the_first_documents() -> None:
    """A byte a token and one more for the end: 5 + 3 bytes, 6 + 4 tokens."""
    found = metrics.BytesPerToken(documents=3)
    cut = rows_of("never ends")
    cut = dataclasses.replace(cut, ids=cut.ids[:, :4], targets=cut.targets[:, :4])
    found.observe([rows_of("hello", "abc"), cut], WORDS, {"text": TEXT})
    assert found.totals == {"text": [2, 10, 8], "audio": [0, 0, 0]}
    assert found.ratio() == {"text": 0.8}
    found.observe([rows_of("ab", "defg")], WORDS, {"text": TEXT})
    assert found.totals["text"] == [3, 13, 10], "three documents are enough"
    found.observe([rows_of("ab")], WORDS, {"text": TEXT})
    assert found.totals["text"] == [3, 13, 10]
    other = metrics.BytesPerToken()
    other.load(found.totals)
    assert other.ratio() == {"text": 10 / 13} and other.totals["text"] is not found.totals["text"]


def test_bytes_per_token_where_codes_of_a_condition_are_hidden() -> None:
    """`mask_conditions` leaves the mask id, which no tokenizer knows; the target has the code."""
    code = TEXT.encode(["hello"])[0]
    given = Segment("text", code.ids, role="condition", fields={"masked": np.arange(5) != 2})
    answer = Segment("audio", np.zeros(2, np.int32))
    found, read = metrics.BytesPerToken(), []
    spy = SimpleNamespace(decode=lambda codes: read.extend(codes) or TEXT.decode(codes))
    found.observe([to_batch([[[given, answer]]], WORDS)], WORDS, {"text": spy})
    assert found.totals["text"] == [1, 6, 5]
    assert read[0].ids.tolist() == code.ids.tolist()


@pytest.mark.parametrize("tokenizers", [{"text": TEXT}, {"text": TEXT, "audio": None}])
def test_modalities_that_are_not_there_hide_no_later_ones(tokenizers: dict[str, Any]) -> None:
    words = extend_vocabulary([TokenSpec("audio", 4), TEXT.spec])
    found = metrics.BytesPerToken()
    found.observe([rows_of("abc", vocabulary=words)], words, tokenizers)
    assert found.totals == {"audio": [0, 0, 0], "text": [1, 4, 3]}


def test_bits_per_byte_stand_beside_the_losses() -> None:
    found = metrics.BytesPerToken()
    given = training(
        stream=SimpleNamespace(), vocabulary=WORDS, tokenizers={"text": TEXT},
        run=SimpleNamespace(tokenizers={"text": "x"}), batches=[rows_of("hello")],
    )  # fmt: skip
    row = {"loss/text": 2.0}
    found.post_step(given, 1, row)
    assert row["bits_per_byte/text"] == pytest.approx(2.0 / math.log(2) * 6 / 5)
    for change in ({"is_main": False}, {"vocabulary": None}):
        row = {"loss/text": 2.0}
        metrics.BytesPerToken().post_step(training(**vars(given) | change), 1, row)
        assert list(row) == ["loss/text"]
    own = training(**vars(given) | {"stream": SimpleNamespace(bytes_per_token={"text": 4.0})})
    row = {"loss/text": 2.0, "loss/total": 1.0}
    found.post_step(own, 1, row)
    assert row["bits_per_byte/text"] == pytest.approx(0.5 / math.log(2)) and len(row) == 3


def test_tokens_by_modality_leave_padding_out() -> None:
    doc = lambda *m: Doc(len(m), modality=list(m))
    layout = Layout.from_rows([[doc(0, 1, 1), doc(2)], [doc(1)]], 6)
    host = Batch.of_ids(torch.zeros(2, 6, dtype=torch.int64), layout)
    assert metrics.tokens_by_modality([host, host], 3).tolist() == [2, 6, 2, 0]


def test_a_line_of_a_step() -> None:
    """``stream``: the counts of the stream over all ranks, in the order of its own."""
    facts = {"tokens/step": 30, "items/step": 6, "loss/total": 1.0, "stream": [6.0, 2.0]}

    def summarize(totals: dict[str, int]) -> dict[str, Any]:
        assert totals == {"tokens": 6, "too_long": 2}
        stats = {"padding_share": 0.25, "tokens_seen": {"text": 3}, "rejects": {"too_long": 2}}
        return stats | {"token_shares": {"text": 1.0}, "name": "x"}

    stream = SimpleNamespace(counts={"tokens": 3, "too_long": 1}, summarize=summarize)
    row = metrics.of_step(facts, 1.5, 0.5, stream)
    assert row == {
        "loss/total": 1.0,
        "perf/tokens_per_second": 20.0,
        "perf/items_per_second": 4.0,
        "perf/step_seconds": 1.5,
        "data/wait_seconds": 0.5,
        "data/padding_share": 0.25,
        "data/rejects/too_long": 2,
        "data/token_shares/text": 1.0,
    }
    bare = metrics.of_step({}, 2.0, 0.0, SimpleNamespace())
    assert bare == {"perf/step_seconds": 2.0, "data/wait_seconds": 0.0}
    row = {"optim/grad_norm": math.inf, "optim/critic/grad_norm": math.nan, "loss/total": math.inf}
    assert metrics.skipped_networks(row) == ["model", "critic"]
    assert metrics.skipped_networks({"optim/grad_norm": 1.0}) == []


def test_items_are_counted_once_whatever_a_batch_holds_of_them() -> None:
    n = torch.tensor([3, 3, 3], dtype=torch.int32)
    values = Values(torch.zeros(3, 4), n, 0 * n, n)
    raw = Batch.of_values({"image": values, "audio": values})
    assert metrics.n_items([raw, raw]) == 6 and metrics.n_items([]) == 0


def test_a_summary_is_of_the_last_tenth() -> None:
    summary = Summary(Times())
    for step in range(1, 31):
        row: dict[str, Any] = {"loss/total": float(step), "skipped": step // 10, "text": "no"}
        if step == 20:
            row |= {"val/loss": 7.0}
        if step == 29:
            row["loss/total"] = math.inf
        summary.post_step(training(), step, row)
    found = summary.result(training(steps=30))
    assert found["steps"] == 3 and found["held_out"] == {"val/loss": 7.0}
    assert found["means"] == {"loss/total": 29.0, "skipped": 3.0}, "of 28 and 30; the last count"
    assert summary.result(training(steps=2))["steps"] == 1
    for step in range(31, 200):
        summary.post_step(training(), step, {"loss/total": 1.0})
    assert summary.result(training(steps=10**6))["steps"] == 100


def test_times_go_on_after_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text('{"seconds": {"step": 100.0, "save": 5.0}}')
    times = Times()
    times.on_stage_start(training(folder=tmp_path, step=4))
    times.on_stage_start(training(folder=tmp_path / "elsewhere", step=4))
    times.on_phase(training(), "step", 1)
    times.on_save(training(folder=tmp_path, is_main=False), 1)
    assert json.loads(file.read_text())["seconds"] == {"step": 100.0, "save": 5.0}
    times.on_save(training(folder=tmp_path), 1)
    seconds = json.loads(file.read_text())["seconds"]
    assert set(seconds) == {"step", "save", "start"} and seconds["save"] == 5.0
    assert 100 <= seconds["step"] < 101 and 0 <= seconds["start"] < 5
    assert times.by_phase()["step"] < 1, "of this process alone"
    new = Times()
    new.on_stage_start(training(folder=tmp_path, step=0))
    new.on_end(training(folder=tmp_path))
    assert json.loads(file.read_text())["seconds"].keys() == {"start"}
    file.write_text("damaged")
    late = Times()
    late.on_stage_start(training(folder=tmp_path, step=9))
    late.on_end(training(folder=tmp_path))
    assert json.loads(file.read_text())["seconds"].keys() == {"start"}


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = SimpleNamespace(name="toys")
    main = training(run=run, step=2, steps=12)
    for every, lines in ((1e-9, 2), (3600.0, 0)):
        shown = Progress(ProgressConfig(every_s=every))
        shown.on_stage_start(main)
        shown.post_step(main, 3, {"loss/total": 1.5, "val/loss": 2.0})
        shown.post_step(main, 4, {"loss/total": 1.25, "perf/tokens_per_second": 1234.5})
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
        if lines:
            assert said[0] == "toys 3/12 loss 1.5000 held-out 2.0000 ETA 0:00"
            assert said[1].startswith("toys 4/12 loss 1.2500 held-out 2.0000 1,234 tokens/s ETA")
        shown.on_end(training(run=run, step=12, steps=12))
        (end,) = capsys.readouterr().err.splitlines()
        assert end.startswith("toys 12/12 loss 1.2500 held-out 2.0000 1,234 tokens/s in 0:0")
    other = training(run=run, is_main=False)
    quiet = Progress(ProgressConfig(every_s=1e-9))
    quiet.on_stage_start(other)
    quiet.post_step(other, 1, {"loss/total": 1.0})
    quiet.on_end(other)
    assert capsys.readouterr().err == ""


def test_arrays_of_whole_spans() -> None:
    span = WORDS.range("text")
    ids = np.array([span.begin, 9, 8, span.end, span.end, span.begin, span.end, span.begin, 7])
    host = Batch.of_ids(torch.from_numpy(ids)[None])
    found = [s.tolist() for s in metrics._spans(host, WORDS, span.begin, span.end)]
    assert found == [[9, 8], []], "the last one does not end"
