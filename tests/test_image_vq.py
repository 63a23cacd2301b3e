"""Image VQ.

The network, its objective with and without a critic, and what it learns from real scans of digits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm.batch import Batch, Sum, Values
from mm.errors import UserError
from mm.model.layer import ModelOut, init_weights
from mm.objectives.vq import VqObjective, VqObjectiveConfig
from mm.run import Run
from mm.specs import Encoded
from mm.tokenizers.image.critic import PatchCriticConfig
from mm.tokenizers.image.tokenizer import CHUNK, ImageVqTokenizerConfig, fit
from mm.tokenizers.image.vq import ImageVq, ImageVqConfig
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.quantizers.base import perplexity, usage_share


def build(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = config.build()
    init_weights(net)
    return net


def batch(image: Tensor, length: Tensor | None = None) -> Batch:
    return Batch.of_values({"image": Values.items(image, length)})


class HandEnv:
    """What the trainer lends, for a loop written by hand."""

    def __init__(self, networks: dict[str, nn.Module]):
        self.networks, self.step = networks, 0
        self.device, self.rng = torch.device("cpu"), torch.Generator()

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        self.networks[name].requires_grad_(False)
        yield self.networks[name]
        self.networks[name].requires_grad_(True)

    def gather(self, x: Tensor) -> Tensor:
        return x


def run_step(
    objective: VqObjective,
    micros: list[Batch],
    env: HandEnv,
    optimizers: dict[str, torch.optim.Optimizer] | None = None,
) -> dict[str, float]:
    """One step of the loop: sums over global counts, backward a LossTerm, step where it says.

    Returns global means.
    """
    scheduled = objective.scheduled(env.step, np.random.default_rng(0))
    counts: dict[str, Tensor] = {}
    for b in micros:
        for name, n in objective.counts(b).items():
            counts[name] = counts.get(name, torch.zeros(())) + n
    scales = objective.scales(counts)
    stats: dict[str, dict[str, Sum]] = {name: {} for name in env.networks}

    def caller(name: str) -> Callable[..., ModelOut]:
        def call(b: Batch, **kw: Any) -> ModelOut:
            out = env.networks[name](b, scheduled=scheduled, **kw)
            if torch.is_grad_enabled():
                for key, each in out.aux.items():
                    old = stats[name].get(key)
                    stats[name][key] = each.detach() if old is None else old + each.detach()
            return out

        return call

    means: dict[str, float] = {}
    for term in objective.terms(micros, {name: caller(name) for name in env.networks}, env):
        each = {k: scales[k] * v / counts[k] for k, v in term.losses.items()}
        torch.stack(list(each.values())).sum().backward()
        for k, v in term.losses.items():
            means[k] = means.get(k, 0.0) + float(v.detach() / counts[k])
        if term.step and optimizers:
            nn.utils.clip_grad_norm_(env.networks[term.network].parameters(), 1.0)
            optimizers[term.network].step()
            optimizers[term.network].zero_grad()
            if hasattr(env.networks[term.network], "after_step"):
                env.networks[term.network].after_step(stats[term.network])
    env.step += 1
    return means


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("quantizer", ["fsq", "vq", "lfq"])
def test_forward_gives_an_image_and_a_grid_of_ids(
    channels: int, colours: int, quantizer: str
) -> None:
    config = ImageVqConfig(
        size=16, channels=channels, down=(2, 2), widths=(8, 8), blocks=(1, 1), quantizer=quantizer
    )
    net = build(config)
    out = net(batch(torch.rand(3, colours, 16, 16)))
    assert out.intermediates["image"].shape == (3, channels, 16, 16)
    assert out.intermediates["ids"].shape == (3, 4, 4, 1) == (3, *config.grid, 1)
    assert out.aux["usage"].total.sum() == 48


def test_gray_and_its_three_equal_colours_are_the_same_picture() -> None:
    net = build(ImageVqConfig.smallest()).eval()
    gray = torch.rand(2, 1, 8, 8)
    one, three = net(batch(gray)), net(batch(gray.expand(-1, 3, -1, -1)))
    assert torch.equal(one.intermediates["ids"], three.intermediates["ids"])


def test_init_fills_nan_storage_built_on_meta() -> None:
    for config in (
        ImageVqConfig.smallest(),
        ImageVqConfig(quantizer="vq"),
        PatchCriticConfig.smallest(),
    ):
        with torch.device("meta"):
            net = config.build()
        net = net.to_empty(device="cpu")
        with torch.no_grad():
            for t in (*net.parameters(), *net.buffers()):
                t.fill_(float("nan") if t.is_floating_point() else -(10**6))
        init_weights(net)
        for name, t in (*net.named_parameters(), *net.named_buffers()):
            assert t.isfinite().all() and (t > -(10**6)).all(), name


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        build(ImageVqConfig.smallest())(batch(torch.rand(1, 3, 10, 10)))
    with pytest.raises(ValueError, match="no multiple of the total stride 8"):
        ImageVqConfig(size=20)
    with pytest.raises(ValueError, match="name the same levels"):
        ImageVqConfig(down=(4,))


def test_saved_network_is_a_tokenizer_and_comes_back(tmp_path: Path) -> None:
    net = build(ImageVqConfig(size=16, down=(4,), widths=(8,), blocks=(1,), quantizer="vq")).train()
    for step in range(3):
        out = net(batch(torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))))
        net.after_step({k: v.detach() for k, v in out.aux.items()})
    net.eval()
    net.save_pretrained(tmp_path / "model", vocabulary=None, tokenizers={})
    image = torch.rand(4, 3, 16, 16)
    again = ImageVq.from_pretrained(tmp_path / "model")
    assert torch.equal(
        again(batch(image)).intermediates["image"], net(batch(image)).intermediates["image"]
    )
    tokenizer = load_tokenizer(tmp_path)
    pixels = [(x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for x in image]
    ids = net(batch(torch.stack([fit(p, 16) for p in pixels]))).intermediates["ids"]
    assert np.array_equal(tokenizer.encode(pixels)[2].ids, ids[2].flatten().numpy())
    assert tokenizer.spec.grid == (4, 4) and tokenizer.spec.vocab_size == 512
    with pytest.raises(UserError, match="no usable image_vq"):
        ImageVq.from_pretrained(tmp_path)


# ---- the tokenizer -------------------------------------------------------------------------------


def test_fit_resizes_the_short_side_and_keeps_the_middle() -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    assert fit(wide, 4).min() == 1.0
    assert fit(wide, 8).shape == (3, 8, 8) and fit(wide, 8)[:, :, 2:6].min() == 1.0
    assert fit(np.full((40, 3), 128, np.uint8), 8).shape == (3, 8, 8)


def test_transparent_pixels_are_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255
    image = fit(rgba, 8)
    assert image[:, :4].max() == 0 and image[:, 4:].min() == 1


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        3,
    ],
)
def test_what_is_no_image_is_refused(raw: Any) -> None:
    with pytest.raises(UserError, match="expected uint8"):
        ImageVqTokenizerConfig.smallest_tokenizer().encode([raw])


def test_many_images_equal_one_by_one_across_chunk_borders() -> None:
    tokenizer = ImageVqTokenizerConfig.smallest_tokenizer()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(2 * CHUNK + 5)]
    codes = tokenizer.encode(images)
    assert all(
        np.array_equal(c.ids, tokenizer.encode([x])[0].ids)
        for c, x in zip(codes, images, strict=True)
    )
    assert all(
        np.array_equal(a, tokenizer.decode([c])[0])
        for a, c in zip(tokenizer.decode(codes), codes, strict=True)
    )


def test_decode_fills_missing_ids_and_drops_surplus_ones() -> None:
    tokenizer = ImageVqTokenizerConfig.smallest_tokenizer()
    full, short, long = tokenizer.decode(
        [
            Encoded(np.array([5, 3, 0, 0])),
            Encoded(np.array([5, 3])),
            Encoded(np.array([5, 3, 0, 0, 7])),
        ]
    )
    assert np.array_equal(full, short) and np.array_equal(full, long) and full.shape == (8, 8, 3)


# ---- the objective -------------------------------------------------------------------------------


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantizer", ["fsq", "vq"])
@pytest.mark.parametrize("adversarial", [False, True])
def test_micro_batches_change_nothing(quantizer: str, adversarial: bool) -> None:
    config = ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer=quantizer)
    critic = (
        {"critic": {"kind": "patch_critic", "width": 8, "depth": 1}, "start_step": 0}
        if adversarial
        else None
    )
    objective = VqObjectiveConfig(l1=0.3, adversarial=critic).build()
    image = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for sizes in ([12], [4, 4, 4], [1, 11]):
        nets = {"model": build(config)} | (
            {"critic": build(PatchCriticConfig(width=8, depth=1))} if adversarial else {}
        )
        means = run_step(objective, [batch(x) for x in image.split(sizes)], HandEnv(nets))
        results.append((means, {name: gradients(net) for name, net in nets.items()}))
    for means, grads in results[1:]:
        assert means == pytest.approx(results[0][0], rel=1e-4)
        for name in grads:
            assert grads[name].keys() == results[0][1][name].keys() and grads[name]
            for key, grad in grads[name].items():
                torch.testing.assert_close(grad, results[0][1][name][key], rtol=1e-3, atol=1e-6)


def test_losses_are_what_they_say() -> None:
    net = build(ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer="vq"))
    image = torch.rand(5, 3, 8, 8)
    out = net(batch(image))
    means = run_step(VqObjectiveConfig(l1=0.25).build(), [batch(image)], HandEnv({"model": net}))
    error = (out.intermediates["image"] - image).detach()
    assert means["reconstruction"] == pytest.approx(
        float(0.75 * error.square().mean() + 0.25 * error.abs().mean()), rel=1e-5
    )
    assert means["commitment"] == pytest.approx(
        float(out.aux["commitment"].mean().detach()), rel=1e-5
    )


def test_the_zero_item_of_a_rank_without_images_counts_nowhere() -> None:
    objective = VqObjectiveConfig().build()
    image = torch.rand(3, 3, 8, 8)
    padded = torch.cat([image, torch.zeros(1, 3, 8, 8)])
    one, two = (
        build(ImageVqConfig(size=8, down=(4,), widths=(8,), blocks=(1,), quantizer="vq"))
        for _ in range(2)
    )
    a = run_step(objective, [batch(image)], HandEnv({"model": one}))
    b = run_step(objective, [batch(padded, torch.tensor([3, 3, 3, 0]))], HandEnv({"model": two}))
    assert a == pytest.approx(b, rel=1e-5)
    for key, grad in gradients(one).items():
        torch.testing.assert_close(gradients(two)[key], grad, rtol=1e-4, atol=1e-7)
    assert objective.counts(batch(torch.zeros(1, 3, 8, 8), torch.zeros(1)))["reconstruction"] == 0


def test_warm_up_leaves_the_quantizer_out() -> None:
    objective = VqObjectiveConfig(bypass_steps=2).build()
    assert [objective.scheduled(step, None)["bypass"] for step in range(4)] == [1, 1, 0, 0]
    net = build(
        ImageVqConfig(
            size=8, down=(4,), widths=(8,), blocks=(0,), quantizer={"kind": "fsq", "levels": (2,)}
        )
    ).eval()
    image = torch.rand(16, 3, 8, 8)
    soft = net(batch(image), scheduled={"bypass": 1.0}).intermediates["image"]
    hard = net(batch(image), scheduled={"bypass": 0.0}).intermediates["image"]
    assert not torch.allclose(soft, hard)
    means = run_step(
        objective, [batch(image)], HandEnv({"model": build(ImageVqConfig(quantizer="vq", size=8))})
    )
    assert means["commitment"] == 0


def test_the_critic_waits_for_its_step_then_both_networks_step_once() -> None:
    critic = {
        "critic": {"kind": "patch_critic", "width": 8, "depth": 2},
        "start_step": 1,
        "weight": 0.1,
    }
    objective = VqObjectiveConfig(adversarial=critic).build()
    assert (
        objective.networks["critic"].mode == "train" and VqObjectiveConfig().build().networks == {}
    )
    nets = {
        "model": build(ImageVqConfig.smallest()),
        "critic": build(PatchCriticConfig(width=8, depth=2)),
    }
    env = HandEnv(nets)
    micros = [batch(x) for x in torch.rand(4, 3, 8, 8).split(2)]
    calls = {name: net for name, net in nets.items()}
    assert [(t.network, t.step) for t in objective.terms(micros, calls, env)] == [
        ("model", False),
        ("model", True),
    ]
    env.step = 1
    terms = [(t.network, t.step, set(t.losses)) for t in objective.terms(micros, calls, env)]
    model = {"reconstruction", "adversarial", "feature"}
    assert terms == [
        ("critic", False, {"critic"}),
        ("critic", True, {"critic"}),
        ("model", False, model),
        ("model", True, model),
    ]


def test_each_pass_moves_its_own_network_only() -> None:
    critic = {"critic": {"kind": "patch_critic", "width": 8, "depth": 2}, "start_step": 0}
    objective = VqObjectiveConfig(adversarial=critic).build()
    nets = {
        "model": build(ImageVqConfig.smallest()),
        "critic": build(PatchCriticConfig(width=8, depth=2)),
    }
    env = HandEnv(nets)
    for term in objective.terms([batch(torch.rand(4, 3, 8, 8))], nets, env):
        for net in nets.values():
            net.zero_grad()
        torch.stack(list(term.losses.values())).sum().backward()
        other = nets["critic" if term.network == "model" else "model"]
        assert all(p.grad is None or not p.grad.any() for p in other.parameters())
        assert any(p.grad is not None and p.grad.any() for p in nets[term.network].parameters())
    assert all(p.requires_grad for p in nets["critic"].parameters())


def test_a_critic_learns_to_tell_noise_from_digits() -> None:
    real, _ = digits()
    critic = build(PatchCriticConfig(channels=1, width=8, depth=2))
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3)
    from mm.objectives import adversarial

    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x = real[torch.randint(0, len(real), (16,), generator=generator)]
        fake = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        (term,) = adversarial.critic_terms(critic, [batch(x)], [batch(fake)])
        loss = term.losses["critic"] / 16
        if step == 0:
            assert float(loss.detach()) == pytest.approx(2.0, abs=0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0


# ---- what it learns ------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """Training and held-out scans, ``(N, 1, 32, 32)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[360:]], x[order[:360]]


def learn(
    run: Run, steps: int, quantizer: Any = None, **weights: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Train the run's network by hand.

    Held-out PSNR in dB, and usage and perplexity of each book.
    """
    train, held_out = digits()
    stage = run.stages[0]
    config = (
        run.model if quantizer is None else run.model.model_copy(update={"quantizer": quantizer})
    )
    net = build(config)
    change = {"aux_weights": weights} if weights else {}
    objective = stage.objective.model_copy(update=change).build()
    env = HandEnv({"model": net})
    optimizer = stage.optimizer.build(net)
    schedule = stage.schedule
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.optimizer.lr * schedule(step, steps)
        picked = torch.randint(
            0, len(train), (stage.data.batch_size,), generator=torch.Generator().manual_seed(step)
        )
        run_step(objective, [batch(train[picked])], env, {"model": optimizer})
    net.eval()
    with torch.no_grad():
        out = net(batch(held_out))
    mse = (out.intermediates["image"].clamp(0, 1) - held_out).square().mean((1, 2, 3))
    h = out.aux["usage"].total
    return float(-10 * mse.log10().mean()), usage_share(h), perplexity(h)


@pytest.fixture(scope="module")
def shipped() -> Run:
    return Run.load("configs/tokenizer/image.yaml")


def test_shipped_yaml_learns_digits_in_a_few_seconds(shipped: Run) -> None:
    """200 of its 1,000 steps; PSNR of the mean image is about 11 dB."""
    psnr, share, _ = learn(shipped, 200)
    assert psnr > 20.5
    assert share.min() >= 0.9


@pytest.mark.parametrize(
    ("quantizer", "weights"),
    [
        ({"kind": "vq", "codebook_size": 64, "d": 8}, {}),
        ({"kind": "lfq", "bits": 6}, {"commitment": 0.01, "entropy": 0.01}),
    ],
    ids=lambda value: value.get("kind"),
)
def test_other_quantizers_learn_in_the_same_network(
    shipped: Run, quantizer: dict[str, Any], weights: dict[str, float]
) -> None:
    from mm.registry import QUANTIZERS

    psnr, share, spread = learn(shipped, 120, QUANTIZERS.parse(quantizer), **weights)
    assert psnr > 19
    assert share.min() >= 0.75 and spread.min() > 20


@pytest.mark.slow
def test_shipped_yaml_reaches_its_bar(shipped: Run) -> None:
    """The quickstart's bar.

    Held-out PSNR of at least 24 dB with at least 90 % of the codes in use.
    """
    psnr, share, _ = learn(shipped, shipped.stages[0].budget.steps)
    assert psnr >= 25
    assert share.min() >= 0.9
    assert math.prod(shipped.model.grid) == 16
