"""`dpo` by hand: margins of whole documents against a reference; what learns and what stays."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import png
from generation_toys import VOCABULARY, V
from start_toys import packed, values
from trainer_runs import rows

from mm.batch import Batch
from mm.data.pack.job import pack
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.folder import load_tensors
from mm.model.layer import ModelOut, init_weights
from mm.objectives.dpo import DpoConfig, preference
from mm.registry import NETWORKS
from mm.run import Run
from mm.trainer.env import TrainerEnv
from mm.trainer.loop import train

PROMPT, ANSWER = 3, 5


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    net = NETWORKS.parse({"kind": "lm", "d_model": 32}).build(VOCABULARY)
    init_weights(net)
    return net


def answers(n: int, seed: int, prompt: torch.Tensor) -> Batch:
    """``n`` documents, two a row: each its prompt and an answer of its own length."""
    g = torch.Generator().manual_seed(seed)
    lengths = [ANSWER + int(torch.randint(3, (), generator=g)) for _ in range(n)]
    rows, layout = [], []
    for i in range(0, n, 2):
        row = [
            torch.cat([prompt[j], torch.randint(16, V, (lengths[j],), generator=g)])
            for j in (i, i + 1)
        ]
        rows.append(torch.cat(row))
        layout.append([Doc(len(r)) for r in row])
    T = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (0, T - len(r)), value=0) for r in rows])
    made = Batch.of_ids(ids, Layout.from_rows(layout, T, n))
    document = made.layout.fields.document
    same = torch.nn.functional.pad(document[:, 1:] == document[:, :-1], (0, 1)) & (document > 0)
    targets = torch.where(same, torch.roll(ids, -1, 1), -1)[..., None].int()
    return replace(made, targets=targets, weight=same.float())


def pairs(n: int = 4) -> Batch:
    prompt = torch.randint(16, V, (n, PROMPT), generator=torch.Generator().manual_seed(5))
    return replace(answers(n, 1, prompt), parts={"rejected": answers(n, 2, prompt)})


def answer_log_prob(net: Any, b: Batch, m: int) -> torch.Tensor:
    """Log-probability of document m's answer alone, its prompt given."""
    here = (b.layout.fields.document == m).nonzero()
    ids = b.ids[here[:, 0], here[:, 1], 0][None]
    logits = net(Batch.of_ids(ids, Layout.from_rows([[Doc(ids.shape[1])]])), loss=False)
    log = logits.heads["tokens"].dist.logits.log_softmax(-1)
    at = range(PROMPT - 1, ids.shape[1] - 1)
    return sum(log[t, ids[0, t + 1]] for t in at)  # type: ignore[return-value]


def step(config: DpoConfig, nets: Mapping[str, Callable[..., ModelOut]], b: Batch) -> Any:
    objective = config.build()
    (term,) = objective.terms([b], nets, None)  # type: ignore[arg-type]
    return objective, term, objective.counts(b)


@pytest.mark.parametrize("form", ["sigmoid", "hinge", "ipo"])
def test_the_loss_is_that_of_the_answers_alone(form: Any) -> None:
    """Packed two a row, prompts and all: as each answer given its prompt, document by document."""
    policy, reference, b = model(1), model(2), pairs()
    config = DpoConfig(loss=form, beta=0.3)
    _, term, n = step(config, {"model": policy, "reference": reference}, b)
    margins = torch.stack(
        [
            (answer_log_prob(policy, b, m) - answer_log_prob(reference, b, m))
            - (answer_log_prob(policy, b.parts["rejected"], m))
            + answer_log_prob(reference, b.parts["rejected"], m)
            for m in range(1, 5)
        ]
    )
    wanted = preference(margins, form, 0.3).sum()
    torch.testing.assert_close(term.losses["dpo"], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(term.losses["margin"], margins.sum(), rtol=1e-4, atol=1e-4)
    assert n["dpo"] == 4 and term.losses["accuracy"] == (margins > 0).sum()
    gradient = torch.autograd.grad(term.losses["dpo"], [*policy.parameters()])
    direct = torch.autograd.grad(wanted, [*policy.parameters()])
    for a, c in zip(gradient, direct, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


def test_forms_by_hand() -> None:
    h = torch.tensor([-2.0, 0.0, 4.0])
    torch.testing.assert_close(preference(h, "hinge", 0.5), torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(preference(h, "ipo", 0.25), torch.tensor([16.0, 4.0, 4.0]))
    log = torch.tensor([1.0, 0.0, -2.0]).exp().log1p()
    torch.testing.assert_close(preference(h, "sigmoid", 0.5), log)
    torch.testing.assert_close(preference(h, "sigmoid", 0.5, 0.1), log + 0.05 * h)
    with pytest.raises(UserError, match="label_smoothing is of loss: sigmoid"):
        DpoConfig(loss="ipo", label_smoothing=0.1).build()


@pytest.mark.parametrize("form", ["kto", "orpo"])
def test_forms_of_answers_alone_by_hand(form: Any) -> None:
    """The papers' equations over the answers' tokens, the prompt nowhere in them."""
    policy, reference, b = model(1), model(2), pairs()
    time = b.layout.fields.position[..., 0]
    b = replace(b, weight=b.weight * (time >= PROMPT - 1))
    config = DpoConfig(loss=form, beta=0.3, undesirable=0.5 if form == "kto" else 1.0)
    nets = {"model": policy, "reference": reference}
    objective = config.build()
    env = TrainerEnv(0, torch.device("cpu"), "fp32")
    (term,) = objective.terms([b], nets, env)
    other = b.parts["rejected"]
    log = lambda net, x: torch.stack([answer_log_prob(net, x, m) for m in range(1, 5)])
    if form == "kto":
        assert set(objective.networks) == {"reference"}
        r_w, r_l = (log(policy, x) - log(reference, x) for x in (b, other))
        z_w, z_l = (r.mean().clamp_min(0).detach() for r in (r_w, r_l))
        wanted = 1 - (0.3 * (r_w - z_l)).sigmoid() + 0.5 * (1 - (0.3 * (z_w - r_l)).sigmoid())
        margin = r_w - r_l
    else:
        assert not objective.networks, "it needs no reference"
        counts = [
            torch.tensor([int((x.layout.fields.document == m).sum()) - PROMPT for m in range(1, 5)])
            for x in (b, other)
        ]
        p_w, p_l = ((log(policy, x) / n).exp() for x, n in zip((b, other), counts, strict=True))
        margin = (p_w / (1 - p_w)).log() - (p_l / (1 - p_l)).log()
        wanted = -margin.sigmoid().log()
        assert objective.weights["dpo"] == 0.3 and objective.weights["nll"] == 1.0
        nll = -log(policy, b).sum()
        torch.testing.assert_close(term.losses["nll"], nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(term.losses["dpo"], wanted.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(term.losses["margin"], margin.sum(), rtol=1e-4, atol=1e-3)
    if form == "kto":  # the means are of a step, whatever its micro-batches
        alone = objective._mean_gains([b], nets, env)
        torch.testing.assert_close(objective._mean_gains([b, b], nets, env), alone)
    with pytest.raises(UserError, match="orpo has no reference"):
        DpoConfig.model_validate({"loss": "orpo", "reference": "runs/x"}).build()


def test_a_document_without_a_rejected_answer_is_no_pair() -> None:
    b = pairs()
    other = b.parts["rejected"]
    gone = (other.layout.fields.document == 3)[..., None]
    left = replace(other, targets=torch.where(gone, -1, other.targets))
    b = replace(b, parts={"rejected": left})
    nets = {"model": model(1), "reference": model(2)}
    _, term, n = step(DpoConfig(), nets, b)
    assert n["dpo"] == 3
    kept = sum(
        preference(
            (answer_log_prob(nets["model"], b, m) - answer_log_prob(nets["reference"], b, m))
            - answer_log_prob(nets["model"], other, m)
            + answer_log_prob(nets["reference"], other, m),
            "sigmoid",
            0.1,
        )
        for m in (1, 2, 4)
    )
    torch.testing.assert_close(term.losses["dpo"], kept, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no second sequence 'rejected', only none"):
        step(DpoConfig(), nets, replace(b, parts={}))


def test_what_is_preferred_becomes_likelier_than_the_reference_has_it() -> None:
    policy, reference, b = model(1), model(1), pairs(8)
    reference.requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    first = {}
    for _ in range(15):
        objective, term, n = step(DpoConfig(nll=0.1), {"model": policy, "reference": reference}, b)
        first = first or {k: float(v.detach() / n[k]) for k, v in term.losses.items()}
        scales = objective.scales(n)
        optimizer.zero_grad()
        sum(scales[k] * v / n[k] for k, v in term.losses.items()).backward()  # type: ignore[union-attr]
        optimizer.step()
    last = {k: float(v.detach() / n[k]) for k, v in term.losses.items()}
    assert first["dpo"] == pytest.approx(0.6931, abs=1e-3) and abs(first["margin"]) < 1e-4
    assert last["accuracy"] == 1.0 and last["margin"] > 5 and last["dpo"] < 0.4
    assert last["nll"] < first["nll"]


def test_pairs_from_raw_files_train_and_resume(tmp_path: Path) -> None:
    """`a.000.txt a.001.png a.002.png`: red is preferred; the reference stays the base model."""
    root = packed(tmp_path / "base")
    base = Run.model_validate(values(root, tmp_path, "base", steps=3))
    train(base)
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(24):
        (raw / f"{i}.000.txt").write_text(f"a cat {i % 3}")
        (raw / f"{i}.001.png").write_bytes(png(2 * i))
        (raw / f"{i}.002.png").write_bytes(png(2 * i + 1))
    pack(raw, tmp_path / "data", segments=True, progress=False)
    words = tmp_path / "base" / "model" / "vocabulary.json"
    given = {"tokenizers": root / "tokenizers", "vocabulary": words, "progress": False}
    pack(tmp_path / "data", tmp_path / "tokens", **given)
    made = values(root, tmp_path, "whole", steps=4)
    made["stages"][0]["data"]["sources"] = [{"path": str(tmp_path / "tokens")}]
    made["stages"][0]["objective"] = {"kind": "dpo", "transform": "preference"}
    made |= {"init_from": str(base.folder), "checkpoints": {"every": 2, "keep_last": 9}}
    whole = Run.model_validate(made)
    train(whole)
    found = rows(whole)
    assert found[0]["loss/dpo"] == pytest.approx(math.log(2)) and found[0]["loss/margin"] == 0
    assert found[-1]["loss/margin"] != 0
    saved = load_tensors(base.folder / "model" / "model.safetensors")
    kept = whole.folder / "checkpoints" / "step_000004" / "reference.safetensors"
    reference = load_tensors(kept)
    assert all(torch.equal(saved[k], reference[k]) for k in saved)
    again = whole.model_copy(update={"out": tmp_path / "again"})
    shutil.copytree(whole.folder, again.folder)
    shutil.rmtree(again.folder / "checkpoints" / "step_000004")
    assert train(again)["resumed_from"] == 2
    a, b = (load_tensors(r.folder / "model" / "model.safetensors") for r in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
